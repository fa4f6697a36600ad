"""Parts that several examples share: command line, digits, steps in torch, figures.

torch, scikit-learn and matplotlib are imported where they are used, because not every
example needs them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import nn

HELD_OUT = 450
TRAINED_ON = 1797 - HELD_OUT
STYLE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "site.mplstyle"


def positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse_options(
    doc: str | None,
    argv: list[str] | None,
    *,
    figure: bool = True,
    **options: tuple[int | bool | Path, str],
) -> argparse.Namespace:
    """Read `options`, each given as (default, explanation), and `--output FIGURE`.

    An integer must be positive. An option with the default False is a flag. `doc` is
    the docstring of the example, which is None under `python -OO`.
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
            kind = positive_integer if isinstance(default, int) else type(default)
            parser.add_argument(option, type=kind, default=default, help=explanation)
    if figure:
        explanation = "draw the result in this file"
        parser.add_argument("--output", type=Path, metavar="FIGURE", help=explanation)
    return parser.parse_args(argv)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
