"""Functions for the state of any optax transformation, not only of ours.

`compress_state` wraps a transformation and keeps its state in one or two bytes a number
(`_small_state.py`, with the codes in `_codes.py`). `stochastic_apply_updates` adds
updates to 16-bit parameters; both round at random (`_rounding.py`). `state_shardings`
says where a state belongs on a mesh of devices, and `check_state_shardings` whether it
is there (`_shardings.py`). Nothing here knows RMSprop: states are taken apart by the
paths, shapes and dtypes of their leaves.
"""

from optax_rmsprop.wrappers._rounding import stochastic_apply_updates
from optax_rmsprop.wrappers._shardings import check_state_shardings, state_shardings
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
    "state_shardings",
    "stochastic_apply_updates",
]
