"""RMSprop for JAX: torch's numbers, never NaN, at home in optax."""

import importlib
from typing import TYPE_CHECKING, Any

from optax import add_decayed_weights as add_decayed_weights
from optax import trace as trace

from optax_rmsprop.optimizer import rmsprop as rmsprop
from optax_rmsprop.transforms import ScaleByRmsState as ScaleByRmsState
from optax_rmsprop.transforms import ScaleByStddevState as ScaleByStddevState
from optax_rmsprop.transforms import scale_by_rms as scale_by_rms
from optax_rmsprop.transforms import scale_by_stddev as scale_by_stddev

if TYPE_CHECKING:
    from optax_rmsprop import dialects as dialects
    from optax_rmsprop import torch_layers as torch_layers
    from optax_rmsprop.diagnostics import Diagnosis as Diagnosis
    from optax_rmsprop.diagnostics import diagnose as diagnose
    from optax_rmsprop.keras_port import from_keras as from_keras
    from optax_rmsprop.low_precision import CompressedState as CompressedState
    from optax_rmsprop.low_precision import compress_state as compress_state
    from optax_rmsprop.low_precision import decompress_state as decompress_state
    from optax_rmsprop.low_precision import (
        stochastic_apply_updates as stochastic_apply_updates,
    )
    from optax_rmsprop.optax_port import from_optax as from_optax
    from optax_rmsprop.sharding import check_state_shardings as check_state_shardings
    from optax_rmsprop.sharding import state_shardings as state_shardings
    from optax_rmsprop.torch_port import TorchRun as TorchRun
    from optax_rmsprop.torch_port import from_torch as from_torch
    from optax_rmsprop.torch_port import from_torch_checkpoint as from_torch_checkpoint
    from optax_rmsprop.torch_port import to_torch as to_torch

__version__ = "0.1.0"

# What is imported at its first use, and from where.
_LATER = {
    "CompressedState": "low_precision",
    "Diagnosis": "diagnostics",
    "check_state_shardings": "sharding",
    "compress_state": "low_precision",
    "decompress_state": "low_precision",
    "diagnose": "diagnostics",
    "dialects": "",
    "state_shardings": "sharding",
    "stochastic_apply_updates": "low_precision",
    "TorchRun": "torch_port",
    "from_keras": "keras_port",
    "from_optax": "optax_port",
    "from_torch": "torch_port",
    "from_torch_checkpoint": "torch_port",
    "to_torch": "torch_port",
    "torch_layers": "",
}


def __getattr__(name: str) -> Any:
    # Importing less, we seldom trigger the garbage collection of all of optax's
    # objects that is due soon after its import: 50 ms, where ours takes 3.
    if name in _LATER:
        module = importlib.import_module(f"{__name__}.{_LATER[name] or name}")
        return getattr(module, name) if _LATER[name] else module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
