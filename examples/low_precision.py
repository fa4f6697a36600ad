"""Digits in float32, with a state of one byte per number, and in bfloat16 throughout.

    pip install -e ".[examples]"
    python examples/low_precision.py

trains the same network four times, draws the losses over each other, and ends with

    bytes and loss, relative to 450 KiB and 0.013: float32 100%, 100%; \
uint8 state 51%, 100%; bfloat16 50%, 100%; bfloat16, to nearest 50%, 160%

In bfloat16 a step is often shorter than half the way to the next number, and rounding
to the nearest loses it. `stochastic_apply_updates` rounds up or down at random, so that
the mean is the exact sum. `compress_state` rounds the optimizer's state in this way.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop import rmsprop
from optax_rmsprop.wrappers import compress_state, stochastic_apply_updates

EVERY = 20  # steps from one measurement of the loss to the next
LOOKS = ("C5-", 6), ("C0-", 2.5), ("C2:", 1.2), ("C3--", 1)  # some curves coincide
Params = dict[str, jax.Array]
Way = tuple[Any, optax.GradientTransformation, Callable]


def to_nearest(params: Params, updates: Params, key: jax.Array) -> Params:
    return optax.apply_updates(params, updates)


def ways(tx: optax.GradientTransformation) -> dict[str, Way]:
    """How runs are stored: the parameters' dtype, the transformation, the rounding."""
    half = compress_state(tx, jnp.bfloat16)
    return {
        "float32": (jnp.float32, tx, to_nearest),
        "uint8 state": (jnp.float32, compress_state(tx, jnp.uint8), to_nearest),
        "bfloat16": (jnp.bfloat16, half, stochastic_apply_updates),
        "bfloat16, to nearest": (jnp.bfloat16, half, to_nearest),
    }


def first_params(dtype: Any) -> Params:
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(64, 512)) / 8, "in_bias": np.zeros(512)}
    params |= {"out": rng.normal(size=(512, 10)) / 23, "out_bias": np.zeros(10)}
    return {name: jnp.asarray(p, dtype) for name, p in params.items()}


def measure(
    params: Params, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Computed in float32, whatever the parameters are stored in.
    p = {name: p.astype(jnp.float32) for name, p in params.items()}
    hidden = jnp.tanh(images.reshape(len(images), -1) @ p["in"] + p["in_bias"])
    return _common.loss_and_accuracy(hidden @ p["out"] + p["out_bias"], labels)


def train(name: str, way: Way, steps: int) -> tuple[np.ndarray, list[float]]:
    """KiB of parameters and of state, and the training loss every few steps."""
    dtype, tx, apply_updates = way
    images, _, labels, _ = _common.split_digits()

    @jax.jit
    def train_step(
        params: Params, state: optax.OptState, step: int, *batch: jax.Array
    ) -> tuple[Params, optax.OptState]:
        grads, _ = jax.grad(measure, has_aux=True)(params, *batch)
        updates, state = tx.update(grads, state, params)
        key = jax.random.fold_in(jax.random.key(0), step)
        return apply_updates(params, updates, key), state

    params, evaluate, losses = first_params(dtype), jax.jit(measure), []
    state, rng = jax.jit(tx.init)(params), np.random.default_rng(0)
    for step, index in enumerate(rng.integers(len(labels), size=(steps, 32))):
        params, state = train_step(params, state, step, images[index], labels[index])
        if step % EVERY == 0 or step == steps - 1:
            losses.append(float(evaluate(params, images, labels)[0]))
        if step % (10 * EVERY) == 0:
            print(f"{name}, step {step}: loss {losses[-1]:.4f}", flush=True)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (params, state)]
    return np.array(sizes) / 1024, losses


def draw(runs: dict[str, tuple[np.ndarray, list[float]]], path: Path) -> None:
    figure = _common.new_figure(3.8)
    memory, curves = figure.subplots(1, 2, width_ratios=(2, 3))
    for (name, (_, losses)), (look, width) in zip(runs.items(), LOOKS, strict=True):
        steps = EVERY * np.arange(len(losses))
        curves.semilogy(steps, losses, look, linewidth=width, label=name)
    curves.set(xlabel="step", ylabel="cross-entropy", title="Training loss")
    params, state = np.transpose([sizes for sizes, _ in runs.values()])
    memory.barh(list(runs), params, color="C5", label="parameters")
    memory.barh(list(runs), state, left=params, color="C0", label="state")
    memory.set(xlabel="KiB", title="Memory")
    memory.invert_yaxis()
    memory.legend()
    curves.legend()
    _common.save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    options = _common.parse_options(__doc__, argv, steps=(1000, "of training"))
    # An average that starts at zero makes the first steps the longest: warm up.
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 3e-4, warmup_steps=options.steps // 10, decay_steps=options.steps
    )
    tx = rmsprop(schedule, momentum=0.9)
    runs = {name: train(name, way, options.steps) for name, way in ways(tx).items()}
    sizes = np.array([sum(sizes) for sizes, _ in runs.values()])
    losses = np.array([losses[-1] for _, losses in runs.values()])
    # Losses to the nearest 10 %, because machines differ by less.
    each = zip(runs, sizes / sizes[0], (losses / losses[0]).round(1), strict=True)
    text = "; ".join(f"{name} {size:.0%}, {loss:.0%}" for name, size, loss in each)
    print(f"bytes and loss, relative to {sizes[0]:.0f} KiB and {losses[0]:.3f}: {text}")
    if options.output:
        draw(runs, options.output)


if __name__ == "__main__":
    main()
