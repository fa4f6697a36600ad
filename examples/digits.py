"""Train a Flax network to read scikit-learn's handwritten digits, with RMSprop.

    pip install -e ".[examples]"
    python examples/digits.py

ends with a line like

    held-out accuracy 99.6% (448 of 450 digits), figure in examples/output/digits.png

Activation, decay, momentum and weight decay are EfficientNet's (arXiv:1905.11946).
"""

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib import style
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optax_rmsprop

HELD_OUT = 450
TRAINED_ON = 1797 - HELD_OUT
PROMISED_ACCURACY = 0.98
STYLE = Path(__file__).parents[1] / "docs" / "figures" / "site.mplstyle"


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), padding="VALID", rngs=rngs)
        self.conv3 = nnx.Conv(64, 64, (3, 3), padding="VALID", rngs=rngs)
        self.dense = nnx.Linear(4 * 4 * 64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images[..., None]
        for conv in (self.conv1, self.conv2, self.conv3):
            # Smooth: at a ReLU's kink, rounding would part this run from torch's.
            x = nnx.silu(conv(x))
        return self.dense(x.reshape(len(x), -1))


def loss_and_accuracy(
    model: Network, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(-1) == labels).mean()


evaluate = nnx.jit(loss_and_accuracy)


@nnx.jit
def train_step(
    model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    gradient = nnx.value_and_grad(loss_and_accuracy, has_aux=True)
    (loss, _), grads = gradient(model, images, labels)
    optimizer.update(model, grads)
    return loss


def split_digits() -> list[np.ndarray]:
    """Images to train on and held out, then the labels of either."""
    scans = load_digits()
    return train_test_split(
        (scans.images / 16).astype(np.float32),
        scans.target.astype(np.int32),
        test_size=HELD_OUT,
        stratify=scans.target,
        random_state=0,  # whatever the seed: the same digits are held out
    )


def shifted_batches(
    images: np.ndarray, labels: np.ndarray, size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch in random order, each digit moved by up to a pixel either way."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    moved = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))
    steps = len(labels) // size  # the rest, of another shape, would compile again
    for index in rng.permutation(len(labels))[: steps * size].reshape(steps, size):
        down, right = rng.integers(3, size=(2, size))
        yield moved[index, down, right], labels[index]


def recipe(
    options: argparse.Namespace,
) -> tuple[optax.Schedule, optax.GradientTransformationExtraArgs]:
    steps = options.epochs * (TRAINED_ON // options.batch_size)
    # An average that starts at zero makes the first steps the longest: warm up.
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, warmup_steps=steps // 10, decay_steps=steps
    )
    tx = optax_rmsprop.rmsprop(
        schedule,
        options.decay,
        options.eps,
        momentum=options.momentum,
        centered=options.centered,
        weight_decay=options.weight_decay,
    )
    return schedule, tx


def train(options: argparse.Namespace) -> np.ndarray:
    """Train, and return losses and accuracies: (epochs, training or held out, 2)."""
    images, held_out_images, labels, held_out_labels = split_digits()
    schedule, tx = recipe(options)
    model = Network(nnx.Rngs(options.seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(options.seed)
    twin = None
    if options.compare_torch:
        from digits_torch import Twin

        twin = Twin(model, schedule, options)
    history = []
    with tqdm(range(1, options.epochs + 1), unit="epoch") as bar:
        for epoch in bar:
            losses, twin_losses = [], []
            for batch in shifted_batches(images, labels, options.batch_size, rng):
                losses.append(train_step(model, optimizer, *batch))
                if twin:
                    twin_losses.append(twin.step(*batch))
            on_training = evaluate(model, images, labels)
            on_held_out = evaluate(model, held_out_images, held_out_labels)
            history.append((on_training, on_held_out))
            loss, accuracy = map(float, on_held_out)
            bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.1%}")
            if twin:
                bar.write(
                    f"epoch {epoch:2}: loss {np.mean(losses):.6f} in JAX, "
                    f"{np.mean(twin_losses):.6f} in torch; largest difference of a "
                    f"parameter {twin.difference(model):.1e}"
                )
    return np.array(history)


def new_figure(height: float) -> Figure:
    """Nine inches wide, in the look of the documentation where that is at hand."""
    if STYLE.exists():
        style.use(STYLE)
    return Figure(figsize=(9, height), layout="constrained")


def draw(history: np.ndarray, path: Path) -> None:
    figure = new_figure(3.8)
    figure.suptitle("RMSprop learns to read scikit-learn's digits")
    epochs = np.arange(1, len(history) + 1)
    for column, quantity in enumerate(("cross-entropy loss", "accuracy (%)")):
        axes = figure.add_subplot(1, 2, column + 1)
        for row, digits in enumerate(("training digits", "held-out digits")):
            values = history[:, row, column] * (1, 100)[column]
            axes.plot(epochs, values, ".-", label=digits)
        axes.set(xlabel="epoch", ylabel=quantity, yscale=("log", "linear")[column])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.savefig(path, dpi=150)


def between(kind: type, low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            message = f"must be in [{low}, {high}], got {text}"
            raise argparse.ArgumentTypeError(message)
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def make_folder_of_figure(parser: argparse.ArgumentParser, output: Path) -> None:
    if output.suffix != ".png":
        parser.error(f"--output: must end in .png, got {output}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: must be in a folder that can be made: {error}")


def parse(
    doc: str | None, file: str, argv: list[str] | None, **numbers: tuple[int, str]
) -> argparse.Namespace:
    """The options of a small example: --output, and positive integers, explained.

    `doc` is None under `python -OO`.
    """
    parser = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    figure = Path(file).parent / "output" / Path(file).with_suffix(".png").name
    parser.add_argument(
        "--output",
        type=Path,
        default=os.path.relpath(figure),
        help="file of the figure",
    )
    for name, (default, text) in numbers.items():
        kind = between(int, 1, 100_000)
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    options = parser.parse_args(argv)
    make_folder_of_figure(parser, options.output)
    return options


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    figure = os.path.relpath(Path(__file__).with_name("output") / "digits.png")
    for name, kind, default, text in (
        ("epochs", between(int, 1, 1000), 20, "passes over the training digits"),
        ("batch-size", between(int, 1, TRAINED_ON), 32, "digits in a step"),
        ("learning-rate", between(float, 0, 1), 5e-4, "its peak, after the warm-up"),
        ("decay", float, 0.9, "weight of the old average; torch's alpha"),
        ("eps", float, 1e-3, "added to the root of the average"),
        ("momentum", float, 0.9, "weight of the old step"),
        ("weight-decay", float, 1e-5, "factor of the parameter in its gradient"),
        ("seed", between(int, 0, 2**32 - 1), 0, "of the first weights and the batches"),
        ("output", Path, figure, "file of the figure"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument(
        "--centered", action="store_true", help="divide by the standard deviation"
    )
    parser.add_argument(
        "--compare-torch", action="store_true", help="train the same in torch beside it"
    )
    return parser


def main(argv: list[str] | None = None) -> float:
    """Train, draw, report; return the held-out accuracy."""
    parser = command_line()
    options = parser.parse_args(argv)
    formats = Figure().canvas.get_supported_filetypes()
    if options.output.suffix[1:] not in formats:
        parser.error(f"--output must end in one of {', '.join(formats)}")
    if options.compare_torch and importlib.util.find_spec("torch") is None:
        parser.error("--compare-torch needs torch: pip install torch")
    try:
        recipe(options)
        options.output.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    history = train(options)
    draw(history, options.output)
    accuracy = history[-1, 1, 1]
    print(
        f"held-out accuracy {accuracy:.1%} ({accuracy * HELD_OUT:.0f} of {HELD_OUT} "
        f"digits), figure in {options.output}"
    )
    free = {"seed", "output", "compare_torch"}
    same_recipe = all(
        value == parser.get_default(name)
        for name, value in vars(options).items()
        if name not in free
    )
    if same_recipe and accuracy < PROMISED_ACCURACY:
        raise SystemExit(f"expected at least {PROMISED_ACCURACY:.0%}: please report it")
    return accuracy


if __name__ == "__main__":
    main()
