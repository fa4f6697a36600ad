"""Parts that several examples share: command line, digits, steps in torch, figures.

torch, scikit-learn and matplotlib are imported where they are used, because not every
example needs them.
"""

import argparse
import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import _errors
import jax
import numpy as np
import optax

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import nn

Item = TypeVar("Item")
HELD_OUT = 450
TRAINED_ON = 1797 - HELD_OUT
STYLE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "site.mplstyle"
FORMATS = ".png", ".pdf", ".svg"


def positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def writable_folder(text: str) -> Path:
    """A folder, made if it is not there, in which a file can be written."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write there: {error}") from error
    return folder


def figure_file(text: str) -> Path:
    """Where a figure can be drawn: found out before the training, not after it."""
    import matplotlib.figure  # noqa: F401  if it is missing, that shows now too

    path = Path(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(FORMATS)}: {text}")
    writable_folder(str(path.parent))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"is a folder: {text}")
    return path


def parse_options(
    doc: str | None,
    argv: list[str] | None,
    *,
    figure: bool = True,
    **options: tuple[int | bool | Path, str],
) -> argparse.Namespace:
    """Read `options`, each given as (default, explanation), and `--output FIGURE`.

    An integer must be positive. A path is that of a folder. An option with the default
    False is a flag. `doc` is the docstring of the example, which is None under
    `python -OO`.
    """
    parser = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, (default, explanation) in options.items():
        option = "--" + name.replace("_", "-")
        if default is False:
            parser.add_argument(option, action="store_true", help=explanation)
        else:
            kind = positive_integer if isinstance(default, int) else writable_folder
            # argparse checks a default too, if it is text.
            text = str(default)
            parser.add_argument(option, type=kind, default=text, help=explanation)
    if figure:
        explanation = "draw the result in this file"
        kind = figure_file
        parser.add_argument("--output", type=kind, metavar="FIGURE", help=explanation)
    return parser.parse_args(argv)


def shown(items: Sequence[Item], name: str) -> Iterator[Item]:
    """The items, with a line for every tenth part of them: "step 60 of 600".

    Without a name there are no lines, for the processes that should not repeat it.
    """
    for done, item in enumerate(items, 1):
        yield item
        if name and done * 10 // len(items) > (done - 1) * 10 // len(items):
            print(f"{name} {done} of {len(items)}", flush=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second process in a folder. The system unlocks it, after a kill too."""
    import fcntl  # not on Windows

    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another process is at work in {folder}") from None
        yield


def run_processes(function: Callable, count: int, *arguments: Any) -> None:
    """Call `function(index, *arguments)` in processes, until all are done or one fails.

    Its error is shown once, and so is Ctrl-C, which is for all processes.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=spawn) as pool:
        # They start by ignoring Ctrl-C, if it is ignored here then.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        runs = [pool.submit(function, index, *arguments) for index in range(count)]
        signal.signal(signal.SIGINT, handler)
        try:
            for run in as_completed(runs):
                run.result()
        except BaseException as error:
            # The others may wait for the one that failed.
            for process in multiprocessing.active_children():
                process.kill()
            if _errors.line_of(error) or not error.__cause__:
                raise
            # The cause is the traceback in that process. The one here tells no more.
            raise SystemExit(str(error.__cause__).strip('\n"')) from None


def split_digits() -> list[np.ndarray]:
    """scikit-learn's digits: images to train on, held-out images, labels of each."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    return train_test_split(
        (scans.images / 16).astype(np.float32),
        scans.target.astype(np.int32),
        test_size=HELD_OUT,
        stratify=scans.target,
        random_state=0,
    )


def shifted_batches(
    images: np.ndarray, labels: np.ndarray, size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch in random order, each digit moved by up to a pixel either way."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    moved = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))
    steps = len(labels) // size  # a smaller last batch would need a second compilation
    for index in rng.permutation(len(labels))[: steps * size].reshape(steps, size):
        down, right = rng.integers(3, size=(2, size))
        yield moved[index, down, right], labels[index]


def loss_and_accuracy(
    logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy, and the share of correct guesses."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(-1) == labels).mean()


def largest_difference(ours: Any, theirs: Any) -> float:
    """The largest difference of two trees of arrays; NaN if there is one."""
    differences = jax.tree.map(lambda p, q: np.abs(p - q).max(), ours, theirs)
    return float(np.max(jax.tree.leaves(differences)))


def bound(difference: float) -> str:
    """The power of ten above a difference, whose digits vary with the machine."""
    with np.errstate(divide="ignore"):  # a difference of 0 gives 0e+00
        return f"{10 ** np.ceil(np.log10(difference)):.0e}"


def torch_weights(network: "nn.Module") -> dict[str, np.ndarray]:
    """Copies of torch's arrays, because torch changes them in its next step."""
    return {name: w.numpy().copy() for name, w in network.state_dict().items()}


def torch_step(
    network: "nn.Module",
    optimizer: "torch.optim.Optimizer",
    scheduler: "torch.optim.lr_scheduler.LRScheduler",
    images: np.ndarray,
    labels: np.ndarray,
) -> float:
    """One step of training in torch; returns the loss.

    The scheduler counts updates, as optax's schedules do, not epochs.
    """
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(1)  # more would compete with JAX for the cores
    network.train()
    logits = network(torch.from_numpy(images))
    loss = cross_entropy(logits, torch.from_numpy(labels).long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    return loss.item()


def torch_accuracy(
    network: "nn.Module", images: np.ndarray, labels: np.ndarray
) -> float:
    import torch

    with torch.no_grad():
        guesses = network.eval()(torch.from_numpy(images)).argmax(1).numpy()
    return float((guesses == labels).mean())


def new_figure(height: float) -> "Figure":
    """A figure nine inches wide, in the style of the documentation."""
    from matplotlib import style
    from matplotlib.figure import Figure

    if STYLE.exists():  # absent where the examples were copied without the pages
        style.use(STYLE)
    return Figure(figsize=(9, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    figure.savefig(path, dpi=150)
