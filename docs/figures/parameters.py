"""Draw figures of docs/parameters.md: the valley, learning_rate and eps.

python docs/figures/parameters.py

writes parameters_valley.png and so on beside this file; with names, only those.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from five_dialects import training

from optax_rmsprop import diagnose, rmsprop

plt.style.use(Path(__file__).with_name("site.mplstyle"))


def save(figures):
    """Draw those named on the command line, or all."""
    for name in sys.argv[1:] or figures:
        path = Path(__file__).with_name(f"parameters_{name}.png")
        figures[name]().savefig(path)


def steps(tx, gradients):
    """How far down each of the gradients, along the first axis, moves a parameter."""

    def step(carry, g):
        p, state = carry
        updates, state = tx.update(g, state, p)
        return (p + updates, state), -updates

    p = jnp.zeros(gradients.shape[1:])
    return jax.lax.scan(step, (p, tx.init(p)), gradients)[1]


def descent(tx, gradient, start, updates):
    """The points from the start on."""

    def step(carry, _):
        p, state = carry
        changes, state = tx.update(gradient(p), state, p)
        return (p + changes, state), p

    start = jnp.asarray(start, jnp.float32)
    return jax.lax.scan(step, (start, tx.init(start)), length=updates + 1)[1]


def turned(degrees):
    angle = np.radians(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def valley(updates=50):
    widths = (1, 1, 1.1)
    figure, panels = plt.subplots(1, 3, figsize=(9, 3), width_ratios=widths)
    optimizers = {"SGD": optax.sgd(0.018), "RMSprop": rmsprop(0.1, 0.9)}
    looks = ("C1", "^:"), ("C0", ".-")
    for axes, degrees, style in zip(panels[:2], (0, 45), ("-", "--"), strict=True):
        turn = turned(degrees)
        curvature = jnp.asarray(turn @ np.diag([1.0, 100.0]) @ turn.T, jnp.float32)
        x, y = np.meshgrid(np.linspace(-3.6, 1.4, 250), np.linspace(-3, 2, 250))
        along, across = np.einsum("ij,jkl->ikl", turn.T, np.stack([x, y]))
        heights = (along**2 + 100 * across**2) / 2
        levels = 0.3 * 4.0 ** np.arange(6)
        axes.contour(x, y, heights, levels, colors="0.5", linewidths=0.6, alpha=0.6)
        for (name, tx), (color, marker) in zip(optimizers.items(), looks, strict=True):
            start = turn @ (-3, 0.8)
            path = descent(tx, lambda p, c=curvature: c @ p, start, updates)
            axes.plot(*path.T, marker, color=color, linewidth=0.8, markersize=3)
            distance = np.hypot(*path.T)
            label = f"{name}, {'turned' if degrees else 'along'}"
            if name == "RMSprop":
                panels[2].plot(distance, color + style, label=label)
            elif not degrees:  # SGD's is the same in both
                panels[2].plot(distance, color + ":", label="SGD, either")
        axes.plot(0, 0, "+", color="C5", markersize=12)
        axes.set(xlabel="parameter 1", aspect="equal")
        axes.grid(False)
    panels[0].set(title="Along the axes", ylabel="parameter 2")
    panels[1].set(title="Turned by 45°")
    panels[2].set(title="Distance to the minimum", xlabel="updates", ylim=(0, 5.5))
    panels[2].legend(fontsize="small")
    return figure


def learning_rate(updates=400, window=40):
    lr = 1e-3
    tx = rmsprop(lr, 0.99)
    factors, changes = training(
        tx, lambda _, changes, state: (diagnose(state, lr).step_size, changes), updates
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    layers = {"in": "first layer", "out": "second layer"}
    for (key, name), color in zip(layers.items(), ("C0", "C2"), strict=True):
        band(left, np.arange(1, updates + 1), factors[key], color, name)
        squares = (
            np.asarray(changes[key] / lr).reshape(-1, window, changes[key][0].size) ** 2
        )
        middles = window * (np.arange(len(squares)) + 0.5)
        band(right, middles, np.sqrt(squares.mean(1)), color, name)
    left.set(title="Factor on the gradient", ylabel="factor", ylim=(1e-3, 1e3))
    right.set(
        title=f"Steps, root mean square of {window}",
        ylabel="learning rates",
        ylim=(1e-3, 1e3),
    )
    for axes in (left, right):
        axes.set(xlabel="updates", yscale="log", xlim=(0, updates))
    left.legend(loc="lower right")
    return figure


def band(axes, at, values, color, label):
    """The median of the rest of the axes, between the quantiles of 10 and 90 %."""
    values = np.asarray(values).reshape(len(values), -1)
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9), axis=1)
    axes.plot(at, median, color=color, label=label)
    axes.fill_between(at, low, high, color=color, alpha=0.25, linewidth=0)


def eps(updates=400, sizes=200):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    g = np.geomspace(1e-7, 1, sizes)
    for text, color in {"1e-5": "C4", "1e-4": "C0", "1e-3": "C2", "1e-2": "C1"}.items():
        value, label = float(text), f"eps {text}"
        steady = jnp.asarray(np.tile(g, (200, 1)), jnp.float32)
        left.loglog(g, steps(rmsprop(1.0, 0.9, value), steady)[-1], color, label=label)
        saturation = training(
            rmsprop(1e-3, 0.99, value),
            lambda _, __, state, value=value: diagnose(state, eps=value).saturation,
            updates,
        )
        every = np.concatenate([s.reshape(updates, -1) for s in saturation.values()], 1)
        right.plot(np.arange(1, updates + 1), np.median(every, 1), color, label=label)
    left.set(
        title="A steady gradient",
        xlabel="size of the gradient",
        ylabel="step (learning rates)",
        ylim=(1e-4, 2),
    )
    right.set(
        title="Training on digits",
        xlabel="updates",
        ylabel="eps / divisor, median",
        ylim=(0, 1),
    )
    left.legend()
    return figure


FIGURES = {f.__name__: f for f in (valley, learning_rate, eps)}

if __name__ == "__main__":
    save(FIGURES)
