"""RMSprop for JAX: torch's numbers, never NaN, at home in optax."""

import importlib
from typing import TYPE_CHECKING, Any

from optax import add_decayed_weights, trace

from optax_rmsprop.optimizer import rmsprop
from optax_rmsprop.transforms import (
    ScaleByRmsState,
    ScaleByStddevState,
    scale_by_rms,
    scale_by_stddev,
)

if TYPE_CHECKING:
    from optax_rmsprop import dialects, torch_layers
    from optax_rmsprop.diagnostics import Diagnosis, diagnose
    from optax_rmsprop.keras_port import from_keras
    from optax_rmsprop.low_precision import (
        CompressedState,
        compress_state,
        decompress_state,
        stochastic_apply_updates,
    )
    from optax_rmsprop.optax_port import from_optax
    from optax_rmsprop.sharding import check_state_shardings, state_shardings
    from optax_rmsprop.torch_port import (
        TorchRun,
        from_torch,
        from_torch_checkpoint,
        to_torch,
    )

__all__ = [
    "CompressedState",
    "Diagnosis",
    "ScaleByRmsState",
    "ScaleByStddevState",
    "TorchRun",
    "add_decayed_weights",
    "check_state_shardings",
    "compress_state",
    "decompress_state",
    "diagnose",
    "dialects",
    "from_keras",
    "from_optax",
    "from_torch",
    "from_torch_checkpoint",
    "rmsprop",
    "scale_by_rms",
    "scale_by_stddev",
    "state_shardings",
    "stochastic_apply_updates",
    "to_torch",
    "torch_layers",
    "trace",
]

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
    return sorted({*globals(), *__all__})
