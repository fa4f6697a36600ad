"""Parameter groups: a frozen stem, a backbone with a tenth of the rate, a new head.

    pip install -e ".[examples]"
    python examples/groups.py

trains a network on scikit-learn's digits 0 to 4, gives it a new head for all ten, and
goes on in three groups, in which kernels decay, and biases and norms do not:

    held-out accuracy 94.7%; moved: stem 0.0%, backbone 22.2%, head 202.3%

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


RECIPE = {"decay": 0.9, "eps": 1e-3, "momentum": 0.9, "weight_decay": 1e-3}
RECIPE |= {"weight_decay_mask": kernels}


def in_groups() -> optax.GradientTransformation:
    # inject_hyperparams would take the mask for a schedule, were it not static.
    group = optax.inject_hyperparams(rmsprop, static_args="weight_decay_mask")
    transforms = {"backbone": group(RATE / 10, **RECIPE), "head": group(RATE, **RECIPE)}
    transforms["stem"] = optax.set_to_zero()
    # A label may stand for a whole subtree, here for each module of the network.
    return optax.partition(transforms, {name: name for name in GROUPS})


def train(
    params: Any,
    tx: optax.GradientTransformation,
    images: np.ndarray,
    labels: np.ndarray,
    steps: int,
) -> Iterator[tuple[Any, optax.OptState]]:
    @jax.jit
    def train_step(
        params: Any, state: optax.OptState, images: jax.Array, labels: jax.Array
    ) -> tuple[Any, optax.OptState]:
        grads, _ = jax.grad(measure, has_aux=True)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, rng = jax.jit(tx.init)(params), np.random.default_rng(0)
    for index in rng.integers(len(labels), size=(steps, 32)):
        params, state = train_step(params, state, images[index], labels[index])
        yield params, state


def lower_rates(state: optax.OptState) -> None:
    """Divide the learning rates by 10, in the state itself."""
    for name in ("backbone", "head"):
        state.inner_states[name].inner_state.hyperparams["learning_rate"] *= 0.1


@jax.jit
def distances(params: Any, first: Any) -> list[jax.Array]:
    """How far each group has moved, relative to where it started."""
    ways = jax.tree.map(lambda p, q: p - q, params, first)
    return [optax.tree.norm(ways[g]) / optax.tree.norm(first[g]) for g in GROUPS]


def main(argv: list[str] | None = None) -> None:
    options = _common.parse_options(__doc__, argv, steps=(600, "of both trainings"))
    images, held_out_images, labels, held_out_labels = _common.split_digits()
    few, tx = labels < 5, rmsprop(RATE, **RECIPE)
    init = jax.jit(Network().init)
    old, new = (init(jax.random.key(k), images[:1])["params"] for k in (0, 1))
    *_, (known, _) = train(old, tx, images[few], labels[few], options.steps)
    first, ways = {**known, "head": new["head"]}, []
    for params, state in train(first, in_groups(), images, labels, options.steps):
        ways.append(distances(params, first))
        if len(ways) == options.steps // 2:
            lower_rates(state)

    if options.output:
        axes = _common.new_figure(3.6).subplots()
        axes.plot(100 * np.array(ways), label=GROUPS)
        axes.set(xlabel="step (half way, rates fall to a tenth)", ylabel="moved, %")
        axes.legend()
        _common.save_figure(axes.figure, options.output)
    _, accuracy = measure(params, held_out_images, held_out_labels)
    each = ", ".join(f"{g} {way:.1%}" for g, way in zip(GROUPS, ways[-1], strict=True))
    print(f"held-out accuracy {accuracy:.1%}; moved: {each}")


if __name__ == "__main__":
    main()
