"""Draw unbreakable.png: two ways in which optax's RMSprop fails and ours does not.

python docs/figures/unbreakable.py
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

STEPS, LR, DECAY = 1000, 0.01, 0.9


def path(tx, gradients):
    """The parameter, from 0, after every gradient."""

    def step(carry, g):
        p, state = carry
        updates, state = tx.update(g, state, p)
        return (p + updates, state), p + updates

    p = jnp.zeros(())
    return jax.lax.scan(step, (p, tx.init(p)), gradients)[1]


def draw(axes, gradients, title, **options):
    ours = path(rmsprop(LR, DECAY, **options), gradients)
    other = path(optax.rmsprop(LR, DECAY, eps_in_sqrt=False, **options), gradients)
    axes.plot(ours, color="tab:blue", label="optax_rmsprop")
    axes.plot(other, color="tab:red", linestyle="--", label="optax.rmsprop")
    axes.set(title=title, xlabel="step", ylabel="parameter")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return other


def main():
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")

    noise = np.random.default_rng(0).normal(size=STEPS)
    steady = jnp.asarray(1 + 1e-4 * noise, jnp.float32)
    other = draw(
        left, steady, "Centered, gradients 1 ± 0.0001", centered=True, eps=1e-2
    )
    last = int(np.argmax(np.isnan(other))) - 1
    left.plot(last, other[last], "x", color="tab:red", markersize=9, markeredgewidth=2)
    left.annotate(
        "NaN", (last, other[last]), (10, 4), textcoords="offset points", color="tab:red"
    )

    spike = jnp.ones(STEPS).at[50].set(3e25)
    draw(right, spike, "Gradients 1, with one of 3e25 at step 50", eps=1e-8)
    right.annotate("never moves again", (300, -0.54), color="tab:red")

    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
