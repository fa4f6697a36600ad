"""Functions for the state of optax transformations, not only of ours.

`compress_state` wraps a transformation and stores the arrays of its state that have the
shape of a parameter in one or two bytes per number (`_small_state.py`); the 8-bit codes
are in `_codes.py`.
`stochastic_apply_updates` adds updates to 16-bit parameters. Both round at random
(`_rounding.py`). `master_weights` makes bfloat16 parameters accurate to 24 or 32 bits;
`float32_params` and `bfloat16_params` convert them (`_master_weights.py`).
`state_shardings` finds the sharding of each array of a state on a mesh of devices, and
`check_state_shardings` checks that a state has it (`_shardings.py`). `single_pass`
gives a step the form in which XLA's CPU backend can join its loops (`_single_pass.py`).
`_transformation.py` has what they share.

Nothing here depends on RMSprop: a state is taken apart by the paths, shapes and dtypes
of its leaves.
"""

from optax_rmsprop.wrappers._master_weights import (
    MasterWeightsState,
    bfloat16_params,
    float32_params,
    master_weights,
)
from optax_rmsprop.wrappers._rounding import stochastic_apply_updates
from optax_rmsprop.wrappers._shardings import check_state_shardings, state_shardings
from optax_rmsprop.wrappers._single_pass import joins_loops, single_pass
from optax_rmsprop.wrappers._small_state import (
    CompressedState,
    compress_state,
    decompress_state,
)

__all__ = [
    "CompressedState",
    "MasterWeightsState",
    "bfloat16_params",
    "check_state_shardings",
    "compress_state",
    "decompress_state",
    "float32_params",
    "joins_loops",
    "master_weights",
    "single_pass",
    "state_shardings",
    "stochastic_apply_updates",
]
