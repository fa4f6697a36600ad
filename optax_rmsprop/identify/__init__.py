"""Which RMSprop made these numbers?

`identify` finds the implementation and its settings from the parameters and gradients
of a few dozen steps; `compare` says whether a given transformation makes them. `record`
(torch, Keras) and `recorded` (optax) record a run; `python -m optax_rmsprop.identify`
reads a file.

`_run.py` checks a recording and chooses coordinates of it. `_model.py` has every
RMSprop as one recurrence, which `_search.py` fits. `_calls.py` finds the dialects that
have these numbers, by running them, and `_hints.py` what the run may be if it is no
RMSprop's. `_identify.py`, `_compare.py` and `_recording.py` have the public functions.
"""

from optax_rmsprop.identify._compare import Comparison, compare
from optax_rmsprop.identify._identify import Finding, Findings, identify
from optax_rmsprop.identify._recording import (
    RecordedState,
    Recorder,
    Recording,
    load,
    record,
    recorded,
    recording_of,
)

__all__ = [
    "Comparison",
    "Finding",
    "Findings",
    "RecordedState",
    "Recorder",
    "Recording",
    "compare",
    "identify",
    "load",
    "record",
    "recorded",
    "recording_of",
]
