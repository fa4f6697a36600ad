"""RMSprop for JAX: torch's numbers, never NaN, at home in optax."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from optax import add_decayed_weights as add_decayed_weights
from optax import trace as trace

from optax_rmsprop.optimizer import rmsprop as rmsprop
from optax_rmsprop.transforms import ScaleByRmsState as ScaleByRmsState
from optax_rmsprop.transforms import ScaleByStddevState as ScaleByStddevState
from optax_rmsprop.transforms import scale_by_rms as scale_by_rms
from optax_rmsprop.transforms import scale_by_stddev as scale_by_stddev

if TYPE_CHECKING:
    from optax_rmsprop import dialects as dialects

__version__ = "0.1.0"

_AT_FIRST_USE = ("dialects",)


def __getattr__(name: str) -> ModuleType:
    # Importing less, we seldom trigger the garbage collection of all of optax's
    # objects that is due soon after its import: 50 ms, where ours takes 3.
    if name in _AT_FIRST_USE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_AT_FIRST_USE})
