"""Functions for the state of any optax transformation, not only of ours.

`compress_state` wraps a transformation and stores its state in one or two bytes per
number (`_small_state.py`); the 8-bit codes are in `_codes.py`.
`stochastic_apply_updates` adds updates to 16-bit parameters. Both round at random
(`_rounding.py`). `state_shardings` finds the sharding of each array of a state on a
mesh of devices, and `check_state_shardings` checks that a state has it
(`_shardings.py`). `single_pass` gives a step the form in which XLA's CPU backend can
join its loops (`_single_pass.py`). `_transformation.py` has what they share.

Nothing here depends on RMSprop: a state is taken apart by the paths, shapes and dtypes
of its leaves.
"""

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
    "check_state_shardings",
    "compress_state",
    "decompress_state",
    "joins_loops",
    "single_pass",
    "state_shardings",
    "stochastic_apply_updates",
]
