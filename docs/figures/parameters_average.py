"""Draw figures of docs/parameters.md: decay and all else that concerns averages.

python docs/figures/parameters_average.py

writes parameters_decay.png and so on beside this file; with names, only those.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from parameters import save, steps

from optax_rmsprop import rmsprop, scale_by_rms
from optax_rmsprop.wrappers import compress_state, decompress_state

DECAYS = {0.9: "C1", 0.99: "C0", 0.999: "C4"}


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def roots(tx, gradients, average=lambda state: state.nu):
    """The divisor without eps, after each of the gradients."""

    def step(state, g):
        state = tx.update(g, state)[1]
        return state, jnp.sqrt(average(state).astype(jnp.float32))

    return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]


def decay(updates=2000, numbers=256):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(1.6, 1))
    third = updates // 3
    size = np.where((np.arange(updates) // third) == 1, 10, 1).astype(np.float32)
    left.step(np.arange(updates), size, color="C5", linestyle=":", label="size of g")
    for d, color in DECAYS.items():
        root = roots(scale_by_rms(d), jnp.asarray(size * normal(updates)))
        left.plot(root, color=color, label=f"decay {d}", linewidth=1.2)
        relative = noise(d, updates, numbers)
        right.loglog(1 - d, relative, "o", color=color)
    a = np.geomspace(5e-4, 0.3)
    right.loglog(a, np.sqrt(a / (2 + 2 * (1 - a))), color="C5", label="formula")
    left.set(xlabel="updates", ylabel="divisor", yscale="log", ylim=(0.1, 30))
    right.set(xlabel="1 - decay", ylabel="noise of the divisor (relative)")
    left.legend(ncols=2, loc="lower center")
    right.legend()
    return figure


def noise(d, updates, numbers):
    """Standard deviation over mean of the divisor of normal gradients."""
    # From 1, their true mean square, there is no start to wait for.
    tx = scale_by_rms(d, initial_scale=1.0)
    late = np.asarray(roots(tx, jnp.asarray(normal(updates, numbers))))[updates // 2 :]
    return late.std() / late.mean()


def eps_in_sqrt(sizes=300):
    figure, axes = plt.subplots(figsize=(6, 3.4))
    g = np.geomspace(1e-7, 1, sizes)
    steady = jnp.asarray(np.tile(g, (200, 1)), jnp.float32)
    for text, under, style in (
        ("1e-4", False, "C0-"),
        ("1e-8", True, "C2--"),
        ("1e-4", True, "C1:"),
    ):
        tx = rmsprop(1.0, 0.9, float(text), eps_in_sqrt=under)
        label = f"{text} {'under the root' if under else 'outside'}"
        axes.loglog(g, steps(tx, steady)[-1], style, label=label)
    axes.set(xlabel="size of a steady gradient", ylabel="step (learning rates)")
    axes.set(ylim=(1e-4, 2))
    axes.legend()
    return figure


def initial_scale(updates=150):
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    at = np.arange(1, updates + 1)
    for axes, start in zip(panels, (0, 1), strict=True):
        tx = rmsprop(1.0, 0.9, initial_scale=start)
        for g, style in ((1.0, "C0-"), (0.1, "C2--"), (0.01, "C1:")):
            axes.plot(
                at, steps(tx, jnp.full(updates, g)), style, label=f"gradients {g:g}"
            )
        axes.set(title=f"initial_scale {start}", xlabel="updates", yscale="log")
    panels[0].set_ylabel("step (learning rates)")
    panels[1].legend()
    return figure


def bias_correction(updates=100):
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axes, correct in zip(panels, (False, True), strict=True):
        for (d, color), style in zip(DECAYS.items(), ("-", "--", ":"), strict=True):
            tx = rmsprop(1.0, d, bias_correction=correct)
            at = np.arange(1, updates + 1)
            axes.plot(
                at, steps(tx, jnp.ones(updates)), color + style, label=f"decay {d}"
            )
        axes.set(title=f"bias_correction {correct}", xlabel="updates", yscale="log")
    panels[0].set(ylabel="step (learning rates)", ylim=(0.7, 40))
    panels[0].legend()
    return figure


def centered(updates=2000, ratios=17, numbers=64):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    spread = np.geomspace(0.01, 100, ratios, dtype=np.float32)
    gradients = jnp.asarray(1 + spread * normal(updates, numbers, ratios))
    cases = {
        "plain": ({}, "C5-"),
        "centered, eps 0.1": ({"eps": 0.1, "centered": True}, "C2-."),
        "centered, eps 0.01": ({"eps": 0.01, "centered": True}, "C0:"),
        "centered, eps 1e-8": ({"centered": True}, "C3--"),
    }
    for label, (options, style) in cases.items():
        tx = rmsprop(1.0, 0.99, **options)
        late = steps(tx, gradients)[updates // 2 :]
        left.loglog(1 / spread, late.mean((0, 1)), style, label=label)
        right.semilogy(steps(tx, jnp.ones(updates)), style, label=label)
    left.set(
        title="A noisy gradient", xlabel="mean / standard deviation of the gradient"
    )
    left.set_ylabel("mean step (learning rates)")
    right.set(title="A constant gradient of 1", xlabel="updates")
    right.set_ylabel("step (learning rates)")
    left.legend()
    return figure


def accumulator_dtype(updates=4000, numbers=4096):
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    size = np.where(np.arange(updates) < updates // 2, 1, 0.1).astype(np.float32)
    gradients = jnp.asarray(size[:, None] * normal(updates, numbers))
    for axes, d in zip(panels, (0.99, 0.999), strict=True):
        tx = compress_state(scale_by_rms(d), jnp.bfloat16)
        lines = {
            "bfloat16, nearest": roots(
                optax.scale_by_rms(d), gradients.astype(jnp.bfloat16)
            ),
            "float32": roots(scale_by_rms(d), gradients),
            "bfloat16, at random": roots(
                tx, gradients, lambda state: decompress_state(state).nu
            ),
        }
        styles = (("C3:", 1.6), ("C0-", 4), ("C1--", 1.2))
        for (label, root), (style, width) in zip(lines.items(), styles, strict=True):
            axes.semilogy(root.mean(1), style, label=label, linewidth=width)
        axes.set(title=f"decay {d}", xlabel="updates", ylim=(0.05, 4))
    panels[0].set_ylabel("divisor, mean")
    panels[0].legend(loc="lower left")
    return figure


averages = (decay, eps_in_sqrt, initial_scale, bias_correction)
functions = (*averages, centered, accumulator_dtype)
FIGURES = {f.__name__: f for f in functions}

if __name__ == "__main__":
    save(FIGURES)
