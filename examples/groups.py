"""Parameter groups: a frozen stem, a backbone with a tenth of the rate, a new head.

    pip install -e ".[examples]"
    python examples/groups.py

trains a network on scikit-learn's digits 0 to 4, gives it a new head for all ten, and
goes on in three groups, in which kernels decay, and biases and norms do not:

    held-out accuracy 96%; moved: stem 0%, backbone 20%, head 200%

The same in torch:

    model.stem.requires_grad_(False)
    groups = [
        {"params": [model.linear.weight], "lr": 1e-4, "weight_decay": 1e-3},
        {"params": [model.linear.bias, *model.norm.parameters()], "lr": 1e-4},
        {"params": [model.head.weight], "lr": 1e-3, "weight_decay": 1e-3},
        {"params": [model.head.bias], "lr": 1e-3},
    ]
    optimizer = torch.optim.RMSprop(groups, alpha=0.9, eps=1e-3, momentum=0.9)
    for group in optimizer.param_groups: group["lr"] /= 10  # when half is done
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import _common
import jax
import numpy as np
import optax
from flax import linen

from optax_rmsprop import rmsprop

GROUPS, RATE = ("stem", "backbone", "head"), 1e-3


class Network(linen.Module):
    def setup(self) -> None:
        self.stem, self.head = linen.Dense(64), linen.Dense(10)
        self.backbone = linen.Sequential([linen.Dense(64), linen.LayerNorm()])

    def __call__(self, images: jax.Array) -> jax.Array:
        x = linen.silu(self.stem(images.reshape(len(images), -1)))
        return self.head(linen.silu(self.backbone(x)))


@jax.jit
def measure(
    params: Any, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _common.loss_and_accuracy(
        Network().apply({"params": params}, images), labels
    )


def kernels(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


RECIPE: dict[str, Any] = {"decay": 0.9, "eps": 1e-3, "momentum": 0.9}
RECIPE |= {"weight_decay": 1e-3, "weight_decay_mask": kernels}


def in_groups() -> optax.GradientTransformation:
    # Without static_args, inject_hyperparams would take the mask for a schedule.
    group = optax.inject_hyperparams(rmsprop, static_args="weight_decay_mask")
    transforms = {"backbone": group(RATE / 10, **RECIPE), "head": group(RATE, **RECIPE)}
    transforms["stem"] = optax.set_to_zero()
    # A label may stand for a whole subtree, here for each module of the network.
    return optax.partition(transforms, {name: name for name in GROUPS})


@partial(jax.jit, static_argnames="tx")
def train_step(
    tx: optax.GradientTransformation,
    params: Any,
    state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[Any, optax.OptState]:
    grads, _ = jax.grad(measure, has_aux=True)(params, images, labels)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def batches(
    images: np.ndarray, labels: np.ndarray, steps: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    indices = np.random.default_rng(0).integers(len(labels), size=(steps, 32))
    for index in _common.shown(list(indices), f"{labels.max() + 1} digits, step"):
        yield images[index], labels[index]


def lower_rates(state: optax.OptState) -> None:
    """Divide the learning rates by 10, by writing into the state."""
    for name in ("backbone", "head"):
        state.inner_states[name].inner_state.hyperparams["learning_rate"] *= 0.1


@jax.jit
def distances(params: Any, first: Any) -> list[jax.Array]:
    """How far each group has moved, relative to where it started."""
    moved = optax.tree.sub(params, first)
    return [optax.tree.norm(moved[g]) / optax.tree.norm(first[g]) for g in GROUPS]


def main(argv: list[str] | None = None) -> None:
    options = _common.parse_options(__doc__, argv, steps=(600, "of both trainings"))
    steps = options.steps
    images, held_out_images, labels, held_out_labels = _common.split_digits()
    init = jax.jit(Network().init)
    params, new = (init(jax.random.key(k), images[:1])["params"] for k in (0, 1))

    few, tx = labels < 5, rmsprop(RATE, **RECIPE)
    state = jax.jit(tx.init)(params)
    for batch in batches(images[few], labels[few], steps):
        params, state = train_step(tx, params, state, *batch)

    params = first = {**params, "head": new["head"]}
    tx, moved = in_groups(), []
    state = jax.jit(tx.init)(params)
    for step, batch in enumerate(batches(images, labels, steps)):
        if step == steps // 2:
            lower_rates(state)
        params, state = train_step(tx, params, state, *batch)
        moved.append(distances(params, first))

    _, accuracy = measure(params, held_out_images, held_out_labels)
    # To the nearest 10 %, because machines differ by less.
    last = (10 * round(10 * float(distance)) for distance in moved[-1])
    each = ", ".join(f"{g} {d}%" for g, d in zip(GROUPS, last, strict=True))
    print(f"held-out accuracy {accuracy:.0%}; moved: {each}")
    if options.output:
        figure = _common.new_figure(3.6)
        axes = figure.subplots()
        axes.plot(100 * np.array(moved), label=GROUPS)
        axes.set(xlabel="step (half way, rates fall to a tenth)", ylabel="moved, %")
        axes.legend()
        _common.save_figure(figure, options.output)


if __name__ == "__main__":
    main()
