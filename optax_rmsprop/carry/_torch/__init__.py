"""Carry a run from torch, live or from a checkpoint, and write it back.

`_read.py` makes a table of weights of a live model and optimizer, or of their
state_dicts, and `_write.py` writes one into them. `_format.py` has what both know of
torch's format, `_options.py` which optimizer of which version a group of options is of,
and `_memory.py` which tensors share memory. `_checkpoints.py` finds model and optimizer
in the files of several frameworks, and `_names.py` the names of the optimizer's
parameters. `_schedules.py` tabulates torch's schedulers.
"""

from optax_rmsprop.carry._torch._functions import (
    from_torch,
    from_torch_checkpoint,
    to_torch,
)
from optax_rmsprop.carry._torch._names import names_of
from optax_rmsprop.carry._torch._schedules import schedule_of

__all__ = [
    "from_torch",
    "from_torch_checkpoint",
    "names_of",
    "schedule_of",
    "to_torch",
]
