"""Say in one line what needs no traceback: a missing package, and Ctrl-C.

`_common.py` imports this first, so that it holds during all other imports too.
"""

import os
import signal
import sys
from pathlib import Path
from types import TracebackType

# The packages of modules that an example may miss.
PACKAGES = {
    "flax": "flax",
    "jax": "jax",
    "matplotlib": "matplotlib",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "torch": "torch",
}


def line_of(error: BaseException) -> str:
    """The line for an error, or "" if it needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return " ".join(["stopped", *map(str, error.args)])
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module in PACKAGES:
            return f"{module} is missing: pip install {PACKAGES[module]}"
    return ""


def show(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an error that ends the program."""
    if line := line_of(error):
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)
    if isinstance(error, KeyboardInterrupt):
        # The signal itself ends it, so that a shell sees status 130. Python would clean
        # up before, and crash where JAX was interrupted while it compiled.
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


sys.excepthook = show
