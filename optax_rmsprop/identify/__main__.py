"""Which RMSprop made the numbers of a recorded run? Prints its call.

Exit status: 0 if there is one, 1 if none makes these numbers, 2 if the file or an
argument is wrong, 130 after Ctrl-C.
"""

import argparse
import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from optax_rmsprop.identify._identify import identified
from optax_rmsprop.identify._model import Form
from optax_rmsprop.identify._recording import load
from optax_rmsprop.identify._rough import Progress

SUFFIXES = ".png", ".pdf", ".svg"


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m optax_rmsprop.identify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help=".npz of Recorder.save or numpy.savez")
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="a constant one, in place of that of the file; without both it is fitted",
    )
    parser.add_argument(
        "--figure",
        type=Path,
        help="draw the differences of the best fit by step and by coordinate",
    )
    args = parser.parse_args(argv)
    if args.figure and importlib.util.find_spec("matplotlib") is None:
        parser.error("--figure needs matplotlib: pip install matplotlib")
    if args.figure and not args.figure.absolute().parent.is_dir():
        parser.error(f"--figure: there is no folder {args.figure.parent}")
    if args.figure and args.figure.suffix not in SUFFIXES:
        parser.error(f"--figure must end in {', '.join(SUFFIXES)}, got {args.figure}")
    try:
        params, grads, rate = load(args.file)
        if args.learning_rate is not None:
            rate = args.learning_rate
        with _counter() as counted:
            found = identified(params, grads, rate, counted)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    print(found)
    if args.figure:
        try:
            found.draw(args.figure)
        except OSError as error:
            parser.error(f"--figure: {error}")
    return 0 if found else 1


@contextlib.contextmanager
def _counter() -> Iterator[Progress]:
    """Counts the fits of all loops, on a terminal, in a line that is cleared again.

    There is no total: how often the forms are fitted depends on the run.
    """
    if not sys.stderr.isatty():
        yield iter
        return
    number = itertools.count(1)

    def counted(forms: list[Form]) -> Iterator[Form]:
        for form in forms:
            print(f"\rfit {next(number)}", end="", file=sys.stderr, flush=True)
            yield form

    try:
        yield counted
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
