"""Carry a run of another framework to JAX in the middle of its training, and back.

A source (`_torch`, `_keras.py`) reads a run: its weights, the slots of its optimizer,
its parameter groups. Every source makes one table of weights (`_run.py`), from which
`carry` makes parameters, an optimizer and its state. `_slots.py` has the names of the
slots in each framework, and `_groups.py` the groups with their learning rates. The
user's port says how weights move; `_port.py` probes it, so that the same function moves
every slot. `_back.py` reverses all of that for `to_torch`.

`_port_of` makes the port of a live model, from the layers in `torch_layers` and
`keras_layers`. `_optax.py` converts a state of optax's own RMSprop, which needs no
port. `_flax.py` goes on in Flax NNX.

torch and Keras are imported only here, and only when one of these functions is called.
"""

from optax_rmsprop.carry import keras_layers, torch_layers
from optax_rmsprop.carry._flax import to_nnx
from optax_rmsprop.carry._keras import from_keras
from optax_rmsprop.carry._optax import from_optax
from optax_rmsprop.carry._port_of import port_of
from optax_rmsprop.carry._run import Run
from optax_rmsprop.carry._torch import (
    from_torch,
    from_torch_checkpoint,
    names_of,
    schedule_of,
    to_torch,
)

__all__ = [
    "Run",
    "from_keras",
    "from_optax",
    "from_torch",
    "from_torch_checkpoint",
    "keras_layers",
    "names_of",
    "port_of",
    "schedule_of",
    "to_nnx",
    "to_torch",
    "torch_layers",
]
