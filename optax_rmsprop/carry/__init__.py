"""Carry a run of another framework to JAX in the middle of its training, and back.

`from_torch`, `from_torch_checkpoint` and `from_keras` read a run: its weights, the
slots of its optimizer, its parameter groups. Each source has its own files; all of them
make one table of weights (`_run.py`), from which `carry` makes parameters, an optimizer
and its state. `_slots.py` has the names of the slots in each framework. The user's port
says how weights move; `_port.py` probes it, so that the same function moves every slot.
`_back.py` reverses all of that for `to_torch`. `_optax.py` converts a state of optax's
own RMSprop, which needs no port.

`port_of` makes the port of a live model: of torch from the layers in `torch_layers`, by
the rules in `_port_rules.py`, of Keras from those in `keras_layers`, by
`_keras_port.py`; `_port_like.py` fits it to a tree of Flax. `_checkpoints.py` finds
model and optimizer in the files of several frameworks, and `_names.py` names the
optimizer's parameters. `_schedules.py` tabulates torch's schedulers; `_flax.py` goes on
in Flax NNX.

torch and Keras are imported only here, and only when one of these functions is called.
"""

from optax_rmsprop.carry import keras_layers, torch_layers
from optax_rmsprop.carry._flax import to_nnx
from optax_rmsprop.carry._keras import from_keras
from optax_rmsprop.carry._names import names_of
from optax_rmsprop.carry._optax import from_optax
from optax_rmsprop.carry._port_of import port_of
from optax_rmsprop.carry._run import Run
from optax_rmsprop.carry._schedules import schedule_of
from optax_rmsprop.carry._torch import from_torch, from_torch_checkpoint, to_torch

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
