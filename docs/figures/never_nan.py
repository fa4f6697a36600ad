"""Draw never_nan_cases.png: six ways in which optax's RMSprop breaks and ours does not.

python docs/figures/never_nan.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax

from optax_rmsprop import rmsprop

LR = 0.01
OURS, THEIRS = "C0", "C3"


def theirs(learning_rate, decay, eps, **options):
    """optax's RMSprop with torch's epsilon."""
    return optax.rmsprop(learning_rate, decay, eps, eps_in_sqrt=False, **options)


@jax.jit
def total(updates):
    return jnp.cumsum(updates.astype(jnp.float32))


def updates_of(make, gradients, *settings, **options):
    tx = make(LR, *settings, **options)

    def step(state, g):
        update, state = tx.update(g, state)
        return state, update

    return jax.jit(lambda g: jax.lax.scan(step, tx.init(g[0]), g)[1])(gradients)


def steady(steps):
    """Gradients of 1 ± 0.0001."""
    noise = np.random.default_rng(0).normal(size=steps)
    return np.asarray(1 + 1e-4 * noise, np.float32)


def centered(make, steps=1000):
    return total(updates_of(make, jnp.array(steady(steps)), 0.9, 1e-2, centered=True))


def spike(make, decay=0.9, steps=1200):
    gradients = jnp.ones(steps).at[50].set(3e25)
    return total(updates_of(make, gradients, decay, 1e-8))


def dead_unit(make, steps=1200):
    gradients = jnp.where(jnp.arange(steps) < 100, 1.0, 0.0)
    return total(updates_of(make, gradients, 0.9, 0.0))


SIZES = np.logspace(-5, np.log10(6e4), 200)


def float16_steps(make, sizes=SIZES):
    """The last of 100 steps with gradients of one size, in learning rates."""
    gradients = jnp.tile(jnp.asarray(sizes, jnp.float16), (100, 1))
    return np.abs(np.asarray(updates_of(make, gradients, 0.9, 1e-8)[-1], float)) / LR


def bfloat16_steps(make, steps=15_000, loud=2000):
    """Steps in learning rates, of gradients of 1 and then of 0.01."""
    gradients = jnp.where(jnp.arange(steps) < loud, 1.0, 0.01).astype(jnp.bfloat16)
    return np.abs(np.asarray(updates_of(make, gradients, 0.999, 1e-8), float)) / LR


def learned_rates(make, outer=40, absent=20):
    """A learning rate after every step of its own gradient descent."""
    features = np.random.default_rng(0).normal(size=(outer, 8, 2)).astype(np.float32)
    features[absent, :, 1] = 0  # no example of this batch has the second feature
    weights = jnp.array([1.0, -1.0])

    def loss_of(params, x):
        return jnp.mean((x @ (params - weights)) ** 2)

    def loss_after_five_steps(log_rate, x):
        tx = make(jnp.exp(log_rate), 0.9, 1e-8)
        params = jnp.zeros(2)
        state = tx.init(params)
        for _ in range(5):
            updates, state = tx.update(jax.grad(loss_of)(params, x), state, params)
            params = optax.apply_updates(params, updates)
        return loss_of(params, x)

    def step(log_rate, x):
        log_rate = log_rate - 0.2 * jax.grad(loss_after_five_steps)(log_rate, x)
        return log_rate, jnp.exp(log_rate)

    start = jnp.log(jnp.float32(LR))
    return jax.jit(lambda x: jax.lax.scan(step, start, x)[1])(features)


def first_nan(values):
    """Its index, or None."""
    where = np.flatnonzero(~np.isfinite(values))
    return int(where[0]) if len(where) else None


def draw(axes, case, title, **labels):
    for make, color, line, label in (
        (rmsprop, OURS, "-", "optax_rmsprop"),
        (theirs, THEIRS, "--", "optax.rmsprop"),
    ):
        values = np.asarray(case(make))
        axes.plot(np.arange(1, len(values) + 1), values, line, color=color, label=label)
        end = first_nan(values)
        if end is not None:
            axes.plot(end, values[end - 1], "x", color=color, ms=9, mew=2)
            axes.annotate(
                "NaN",
                (end, values[end - 1]),
                (8, 4),
                textcoords="offset points",
                color=color,
            )
    axes.set(title=title, xlabel="step", **labels)


def draw_float16(axes):
    axes.plot(SIZES, float16_steps(rmsprop), color=OURS)
    steps = float16_steps(theirs)
    axes.plot(SIZES, np.where(np.isfinite(steps), steps, np.nan), "--", color=THEIRS)
    infinite = SIZES[~np.isfinite(steps)]
    axes.plot(infinite[::8], np.full(len(infinite[::8]), 2.2), "x", color=THEIRS, mew=2)
    axes.text(infinite[0], 2.4, "infinite", color=THEIRS)
    axes.text(6e2, 0.14, "none", color=THEIRS)
    axes.set(
        title="float16, equal gradients",
        xlabel="size of the gradient",
        ylabel="step / learning rate",
        xscale="log",
        ylim=(-0.1, 2.8),
    )


def main():
    plt.style.use(Path(__file__).with_name("site.mplstyle"))
    figure, panels = plt.subplots(2, 3, figsize=(9, 5.2))
    draw(panels[0, 0], centered, "Centered, gradients 1 ± 0.0001", ylabel="parameter")
    draw_float16(panels[0, 1])
    draw(
        panels[0, 2],
        bfloat16_steps,
        "bfloat16, decay 0.999",
        ylabel="step / learning rate",
        yscale="log",
    )
    draw(panels[1, 0], spike, "One gradient of 3e25", ylabel="parameter")
    draw(panels[1, 1], dead_unit, "eps=0, gradients end at 100", ylabel="parameter")
    draw(
        panels[1, 2],
        learned_rates,
        "A learned learning rate",
        ylabel="learning rate",
    )
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.savefig(Path(__file__).with_name("never_nan_cases.png"))


if __name__ == "__main__":
    main()
