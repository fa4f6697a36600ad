"""Resume a torch run in Flax from its checkpoint, and take it back to torch.

    pip install -e ".[examples]" torch
    python examples/resume_from_torch.py

trains a network on scikit-learn's digits for five epochs in torch, saves a checkpoint,
goes on from it in Flax for five, and for the last five in torch again; and beside it a
run that stays in torch. It ends with lines like

    held-out accuracy 97.8% of the run that moved, 97.8% of the one that stayed
    parameters within 1e-06, losses within 3e-07, figure in \
examples/output/resume_from_torch.png
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import optax
import torch
from digits import (
    TRAINED_ON,
    between,
    make_folder_of_figure,
    new_figure,
    shifted_batches,
    split_digits,
)
from flax import linen
from torch import nn
from tqdm import tqdm

from optax_rmsprop import from_torch_checkpoint, to_torch, torch_layers

PROMISED_DIFFERENCE = 2e-4
LEGS = ("torch", "Flax", "torch again")
Batch = tuple[np.ndarray, np.ndarray]


class TorchNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.norm1(self.conv1(images[:, None])))
        x = nn.functional.silu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class FlaxNetwork(linen.Module):
    """The same, with the settings that differ by default as torch has them."""

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images[..., None]
        for name, channels, stride in ("1", 16, 1), ("2", 32, 2):
            conv = linen.Conv(
                channels,
                (3, 3),
                stride,
                padding=1,
                use_bias=False,
                name="conv" + name,
            )
            norm = linen.BatchNorm(
                use_running_average=False,
                momentum=0.9,
                epsilon=1e-5,
                name="norm" + name,
            )
            x = linen.silu(norm(conv(x)))
        return linen.Dense(10, name="head")(x.mean((1, 2)))


def port(weights: dict[str, np.ndarray]) -> dict[str, dict]:
    """torch's state_dict as the variables of the Flax network."""
    norms = ("norm1", "norm2")
    return {
        "params": {
            "conv1": torch_layers.conv(weights, "conv1"),
            "conv2": torch_layers.conv(weights, "conv2"),
            **{name: torch_layers.norm(weights, name) for name in norms},
            "head": torch_layers.linear(weights, "head"),
        },
        "batch_stats": {
            name: torch_layers.running_stats(weights, name) for name in norms
        },
    }


def make_torch(options: argparse.Namespace) -> tuple[nn.Module, torch.optim.RMSprop]:
    """The network and its optimizer: weight decay for kernels, none for the rest."""
    torch.manual_seed(options.seed)
    network = TorchNetwork()
    # Given with their names, so that the checkpoint has them.
    named = list(network.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [(n, p) for n, p in named if p.ndim <= 1]},
    ]
    recipe = {"alpha": 0.9, "eps": 0.0316, "momentum": 0.9}
    return network, torch.optim.RMSprop(groups, lr=options.learning_rate, **recipe)


def train_in_torch(
    network: nn.Module,
    optimizer: torch.optim.RMSprop,
    schedule: optax.Schedule,
    first_step: int,
    batches: Iterator[Batch],
) -> Iterator[float]:
    network.train()
    for step, (images, labels) in enumerate(batches, first_step):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        logits = network(torch.from_numpy(images))
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


class FlaxLeg:
    """The leg in Flax: from a checkpoint of torch to the state that goes back."""

    def __init__(self, checkpoint: Path, schedule: optax.Schedule):
        saved = torch.load(checkpoint, weights_only=True)
        # The schedule goes on at torch's step, for the state counts on from there.
        run = from_torch_checkpoint(
            saved["model"], saved["optimizer"], port, learning_rate=schedule
        )
        self.variables, self.state, tx = run.params, run.opt_state, run.tx
        network = FlaxNetwork()

        @jax.jit
        def train_step(variables, state, images, labels):
            def loss_and_statistics(variables):
                logits, changed = network.apply(
                    variables, images, mutable=["batch_stats"]
                )
                loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return loss.mean(), changed

            gradient = jax.value_and_grad(loss_and_statistics, has_aux=True)
            (loss, changed), grads = gradient(variables)
            # Statistics are in no group of the optimizer: it leaves them alone.
            updates, state = tx.update(grads, state, variables)
            variables = optax.apply_updates(variables, updates)
            return variables | changed, state, loss

        self.train_step = train_step

    def train(self, batches: Iterator[Batch]) -> Iterator[float]:
        for batch in batches:
            self.variables, self.state, loss = self.train_step(
                self.variables, self.state, *batch
            )
            yield float(loss)


def run_that_moves(
    options: argparse.Namespace,
    schedule: optax.Schedule,
    legs: list[Callable[[], Iterator[Batch]]],
    steps: int,
) -> tuple[nn.Module, list[list[float]]]:
    network, optimizer = make_torch(options)
    first = list(train_in_torch(network, optimizer, schedule, 0, legs[0]()))

    checkpoint = options.output.with_suffix(".pt")
    state_dicts = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state_dicts, checkpoint)
    in_flax = FlaxLeg(checkpoint, schedule)
    second = list(in_flax.train(legs[1]()))

    # As in a process of its own. What the port leaves out comes from the checkpoint.
    network, optimizer = make_torch(options)
    saved = torch.load(checkpoint, weights_only=True)
    network.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    to_torch(in_flax.variables, in_flax.state, network, optimizer, port)
    third = list(train_in_torch(network, optimizer, schedule, 2 * steps, legs[2]()))
    return network, [first, second, third]


def accuracy(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    network.eval()
    with torch.no_grad():
        guesses = network(torch.from_numpy(images)).argmax(1).numpy()
    return float((guesses == labels).mean())


def draw(moved: list[list[float]], stayed: list[float], path: Path) -> None:
    figure = new_figure(5.2)
    figure.suptitle("A torch run, resumed in Flax and taken back")
    losses, differences = figure.subplots(
        2, sharex=True, gridspec_kw={"height_ratios": [3, 1]}
    )
    losses.plot(stayed, color="C5", alpha=0.5, linewidth=4, label="stays in torch")
    start = 0
    for leg, name, color in zip(moved, LEGS, ("C1", "C0", "C1"), strict=True):
        steps = np.arange(start, start + len(leg))
        losses.plot(steps, leg, color=color, linewidth=1, label=f"moves: {name}")
        there = np.abs(np.subtract(leg, stayed[start : start + len(leg)]))
        differences.plot(steps, there, color=color, linewidth=1)
        start += len(leg)
        if start < len(stayed):
            for axes in (losses, differences):
                axes.axvline(start, color="C5", linewidth=0.8, linestyle=":")
    losses.set(ylabel="cross-entropy loss", yscale="log")
    losses.legend()
    differences.set_yscale("symlog", linthresh=1e-8)
    differences.set(xlabel="step", ylabel="|difference|", ylim=0)
    figure.savefig(path, dpi=150)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    name = "resume_from_torch.png"
    figure = os.path.relpath(Path(__file__).with_name("output") / name)
    for name, kind, default, text in (
        ("epochs", between(int, 1, 1000), 5, "of each of the three legs"),
        ("batch-size", between(int, 1, TRAINED_ON), 32, "digits in a step"),
        ("learning-rate", between(float, 0, 0.1), 0.01, "at first; falls as a cosine"),
        ("seed", between(int, 0, 2**32 - 1), 0, "of the first weights and the batches"),
        ("output", Path, figure, "file of the figure; the checkpoint is beside it"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train both runs, and report how far they are apart."""
    parser = command_line()
    options = parser.parse_args(argv)
    make_folder_of_figure(parser, options.output)
    torch.set_num_threads(1)  # more would fight with JAX's over the cores
    images, held_out_images, labels, held_out_labels = split_digits()
    steps = options.epochs * (TRAINED_ON // options.batch_size)
    schedule = optax.cosine_decay_schedule(options.learning_rate, 3 * steps)

    def leg(number: int) -> Iterator[Batch]:
        rng = np.random.default_rng([options.seed, number])
        with tqdm(range(options.epochs), f"leg {number + 1}", unit="epoch") as bar:
            for _ in bar:
                yield from shifted_batches(images, labels, options.batch_size, rng)

    legs = [lambda number=number: leg(number) for number in range(3)]
    # Unless told otherwise, JAX multiplies in fewer bits on a GPU or TPU.
    with jax.default_matmul_precision("float32"):
        moved, losses = run_that_moves(options, schedule, legs, steps)
    stayed, optimizer = make_torch(options)
    losses_there = [
        loss
        for number in range(3)
        for loss in train_in_torch(
            stayed, optimizer, schedule, number * steps, legs[number]()
        )
    ]
    draw(losses, losses_there, options.output)

    apart = max(
        float((p - q).abs().max().detach())
        for p, q in zip(moved.parameters(), stayed.parameters(), strict=True)
    )
    losses_apart = np.max(np.abs(np.concatenate(losses) - losses_there))
    accuracies = [
        accuracy(network, held_out_images, held_out_labels)
        for network in (moved, stayed)
    ]
    print(
        f"held-out accuracy {accuracies[0]:.1%} of the run that moved, "
        f"{accuracies[1]:.1%} of the one that stayed"
    )
    print(
        f"parameters within {apart:.0e}, losses within {losses_apart:.0e}, figure in "
        f"{options.output}"
    )
    if not apart <= PROMISED_DIFFERENCE:  # so that NaN fails too
        raise SystemExit(
            f"expected parameters within {PROMISED_DIFFERENCE:.0e}: please report it"
        )


if __name__ == "__main__":
    main()
