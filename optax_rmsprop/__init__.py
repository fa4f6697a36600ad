"""RMSprop for JAX: torch's numbers, never NaN, at home in optax.

The optimizer and its parts, which are optax transformations:

    rmsprop                     the optimizer, with torch's defaults
    dialects                    a folder with the RMSprop of each framework, by its call
    scale_by_rms                g / (√ν + eps); its state is a ScaleByRmsState
    scale_by_stddev             the same, centered; its state is a ScaleByStddevState
    trace                       momentum (optax's own)
    add_decayed_weights         weight decay (optax's own)
    scaled_to_batch             settings of a run for batches of another size

For optax transformations, also those of others, in the folder wrappers:

    compress_state              a state of one or two bytes per number, CompressedState
    decompress_state            the state itself again
    stochastic_apply_updates    adds updates to 16-bit parameters, rounded at random
    state_shardings             where a state belongs on a mesh of devices
    check_state_shardings       whether it is there

For a run of another framework, in the folder carry:

    from_torch                  a run of torch in JAX; the result is a TorchRun
    from_torch_checkpoint       the same from a saved run
    from_keras                  the same from Keras 3
    from_optax                  the state of optax's own RMSprop as ours
    to_torch                    back to torch
    torch_layers                the usual layers of torch in Flax's layouts

What a run did:

    diagnose                    a state's effective step sizes, as a Diagnosis
    identify                    a folder: which RMSprop made recorded numbers

The folders have more; help(optax_rmsprop.wrappers) lists it.
"""

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
    from optax_rmsprop.batch_size import scaled_to_batch
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
    "scaled_to_batch",
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
    "scaled_to_batch": "batch_size",
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


# Hidden from type checkers, which would take any misspelt name for one that it makes.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # The core alone takes 3 ms to import. A longer import would often trigger
        # Python's garbage collection of all of optax's objects, which is due soon after
        # optax's import and takes 50 ms.
        if name in _FOLDERS:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _LAZY:
            module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
            return getattr(module, "Run" if name == "TorchRun" else name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
