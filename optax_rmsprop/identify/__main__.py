"""Which RMSprop made the numbers of a recorded run? Prints its call.

Exit status: 0 if there is one, 1 if none makes these numbers, 2 if the file or an
argument is wrong.
"""

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from optax_rmsprop.identify._identify import identified
from optax_rmsprop.identify._model import Form
from optax_rmsprop.identify._recording import load

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
        found = identified(params, grads, rate, _with_bar)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    print(found)
    if args.figure:
        try:
            found.draw(args.figure)
        except OSError as error:
            parser.error(f"--figure: {error}")
    return 0 if found else 1


def _with_bar(forms: list[Form]) -> Iterator[Form]:
    """The forms, with a bar of those that were tried, on a terminal."""
    width = 40 if sys.stderr.isatty() else 0
    for i, form in enumerate(forms):
        if width:
            done = width * i // len(forms)
            bar = "#" * done + "-" * (width - done)
            print(f"\r{bar} {i} of {len(forms)} forms", end="", file=sys.stderr)
        yield form
    if width:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
