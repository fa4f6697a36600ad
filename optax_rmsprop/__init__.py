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
    from optax_rmsprop import carry, dialects, identify, wrappers
    from optax_rmsprop.carry import Run as TorchRun
    from optax_rmsprop.carry import (
        from_keras,
        from_optax,
        from_torch,
        from_torch_checkpoint,
        to_torch,
        torch_layers,
    )
    from optax_rmsprop.diagnostics import Diagnosis, diagnose
    from optax_rmsprop.wrappers import (
        CompressedState,
        check_state_shardings,
        compress_state,
        decompress_state,
        state_shardings,
        stochastic_apply_updates,
    )

__all__ = [
    "CompressedState",
    "Diagnosis",
    "ScaleByRmsState",
    "ScaleByStddevState",
    "TorchRun",
    "add_decayed_weights",
    "carry",
    "check_state_shardings",
    "compress_state",
    "decompress_state",
    "diagnose",
    "dialects",
    "from_keras",
    "from_optax",
    "from_torch",
    "from_torch_checkpoint",
    "identify",
    "rmsprop",
    "scale_by_rms",
    "scale_by_stddev",
    "state_shardings",
    "stochastic_apply_updates",
    "to_torch",
    "torch_layers",
    "trace",
    "wrappers",
]

__version__ = "0.1.0"

_FOLDERS = {"carry", "dialects", "identify", "wrappers"}
# Names that are imported at their first use, with their folder or module. `TorchRun` is
# `carry.Run`.
_LAZY = {
    "Diagnosis": "diagnostics",
    "diagnose": "diagnostics",
    "CompressedState": "wrappers",
    "check_state_shardings": "wrappers",
    "compress_state": "wrappers",
    "decompress_state": "wrappers",
    "state_shardings": "wrappers",
    "stochastic_apply_updates": "wrappers",
    "TorchRun": "carry",
    "from_keras": "carry",
    "from_optax": "carry",
    "from_torch": "carry",
    "from_torch_checkpoint": "carry",
    "to_torch": "carry",
    "torch_layers": "carry",
}


def __getattr__(name: str) -> Any:
    # The core alone takes 3 ms to import. A longer import would often trigger Python's
    # garbage collection of all of optax's objects, which is due soon after optax's
    # import and takes 50 ms.
    if name in _FOLDERS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _LAZY:
        module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
        return getattr(module, "Run" if name == "TorchRun" else name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
