"""Train a Flax network to read scikit-learn's handwritten digits, with RMSprop.

    pip install -e ".[examples]"
    python examples/digits.py

ends with a line like

    held-out accuracy 99.6% (448 of 450 digits)

With `--compare-torch` it starts from the weights of a torch network, which is trained
beside it on the same batches, and prints after each epoch how far the two are apart.

Activation, decay, momentum and weight decay are EfficientNet's (arXiv:1905.11946).
"""

from pathlib import Path
from typing import Any

import _common
import jax
import numpy as np
import optax
from _common import HELD_OUT, TRAINED_ON
from flax import nnx

from optax_rmsprop import rmsprop
from optax_rmsprop.carry import torch_layers

BATCH, PEAK, DECAY = 32, 5e-4, 0.9
RECIPE: dict[str, Any] = {"eps": 1e-3, "momentum": 0.9, "weight_decay": 1e-5}
Pair = tuple[jax.Array, jax.Array]


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), padding="VALID", rngs=rngs)
        self.conv3 = nnx.Conv(64, 64, (3, 3), padding="VALID", rngs=rngs)
        self.dense = nnx.Linear(4 * 4 * 64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images[..., None]
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.silu(conv(x))
        return self.dense(x.reshape(len(x), -1))


@nnx.jit
def measure(model: Network, images: jax.Array, labels: jax.Array) -> Pair:
    return _common.loss_and_accuracy(model(images), labels)


@nnx.jit
def train_step(
    model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    (loss, _), grads = nnx.value_and_grad(measure, has_aux=True)(model, images, labels)
    optimizer.update(model, grads)
    return loss


class Twin:
    """The same network and optimizer in torch, from which `model` takes its weights."""

    def __init__(self, model: Network, schedule: optax.Schedule):
        import torch
        from torch.nn import Conv2d, Flatten, Linear, SiLU, Unflatten
        from torch.optim.lr_scheduler import LambdaLR

        torch.manual_seed(0)
        self.network = torch.nn.Sequential(
            Unflatten(1, (1, 8)),  # from 8 rows to one channel of 8 rows
            *(Conv2d(1, 32, 3, padding=1), SiLU()),
            *(Conv2d(32, 64, 3), SiLU()),
            *(Conv2d(64, 64, 3), SiLU()),
            *(Flatten(), Linear(4 * 4 * 64, 10)),
        )
        params = self.network.parameters()
        optimizer = torch.optim.RMSprop(params, lr=1.0, alpha=DECAY, **RECIPE)
        scheduler = LambdaLR(optimizer, lambda step: float(schedule(step)))
        self.parts = self.network, optimizer, scheduler
        nnx.update(model, nnx.State(self.in_flax()))

    def in_flax(self) -> dict[str, dict[str, np.ndarray]]:
        weights = _common.torch_weights(self.network)
        return {
            "conv1": torch_layers.conv(weights, "1"),
            "conv2": torch_layers.conv(weights, "3"),
            "conv3": torch_layers.conv(weights, "5"),
            # Its input is an image of 64 channels and 4 x 4 pixels.
            "dense": torch_layers.linear(weights, "8", flattened=(64, 4, 4)),
        }

    def step(self, images: np.ndarray, labels: np.ndarray) -> float:
        return _common.torch_step(*self.parts, images, labels)


def draw(history: np.ndarray, path: Path) -> None:
    figure = _common.new_figure(3.8)
    epochs = np.arange(1, len(history) + 1)
    loss, accuracy = figure.subplots(1, 2)
    digits = ["training digits", "held-out digits"]
    loss.semilogy(epochs, history[..., 0], marker=".", label=digits)
    loss.set(xlabel="epoch", ylabel="cross-entropy loss")
    loss.legend()
    accuracy.plot(epochs, 100 * history[..., 1], marker=".")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
    _common.save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    options = _common.parse_options(
        __doc__,
        argv,
        epochs=(20, "of training"),
        compare_torch=(False, "train the same network in torch beside it"),
    )
    images, held_out_images, labels, held_out_labels = _common.split_digits()
    steps = options.epochs * (TRAINED_ON // BATCH)
    # An average that starts at zero makes the first steps the longest: warm up.
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK, steps // 10, steps)
    tx = rmsprop(schedule, DECAY, **RECIPE)
    model = Network(nnx.Rngs(0))
    twin = Twin(model, schedule) if options.compare_torch else None
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    rng, history = np.random.default_rng(0), []
    for epoch in range(1, options.epochs + 1):
        batches = list(_common.shifted_batches(images, labels, BATCH, rng))
        losses = [train_step(model, optimizer, *batch) for batch in batches]
        held_out = measure(model, held_out_images, held_out_labels)
        history.append((measure(model, images, labels), held_out))
        print(f"epoch {epoch:2}: loss {np.mean(losses):.6f}", flush=True)
        if twin:
            torchs = np.mean([twin.step(*batch) for batch in batches])
            params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            within = _common.bound(_common.largest_difference(params, twin.in_flax()))
            print(f"in torch: loss {torchs:.6f}, parameters within {within}")
    _, accuracy = held_out
    right = f"{accuracy * HELD_OUT:.0f} of {HELD_OUT} digits"
    print(f"held-out accuracy {accuracy:.1%} ({right})")
    if options.output:
        draw(np.array(history), options.output)


if __name__ == "__main__":
    main()
