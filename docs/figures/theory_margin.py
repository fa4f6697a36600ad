"""Draw theory_margin.png: RMSprop and gradient descent fit the same data otherwise.

python docs/figures/theory_margin.py

The data are made after Wilson et al. (arXiv:1705.08292). An example with label y has
the features

    y, 1, 1   and, for itself alone,   1 if y is 1,   1, 1, 1, 1, 1 if y is -1

so the first feature is the answer. More than half of the labels are 1.
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

TRAINED, HELD_OUT, OF_ONE = 100, 1000, 0.6
KINDS = ("the answer", "always 1", "its own, y = 1", "its own, y = -1")


def labels():
    """Labels to train on, then those held out."""
    random = np.random.default_rng(0)
    y = np.where(random.random(TRAINED + HELD_OUT) < OF_ONE, 1.0, -1.0)
    return y[:TRAINED], y[TRAINED:]


def examples(y):
    """A row of 3 + 5 n features for each of n labels."""
    own = np.where((y[:, None] == -1) | (np.arange(5) == 0), 1.0, 0.0)
    own = np.einsum("ij,ik->ijk", np.eye(len(y)), own).reshape(len(y), -1)
    return np.hstack([y[:, None], np.ones((len(y), 2)), own])


def kinds(w, y):
    """The weights of the four kinds of features, which differ only by rounding."""
    own = w[3:].reshape(-1, 5)[:, 0]
    return np.array([w[0], w[1:3].mean(), own[y == 1].mean(), own[y == -1].mean()])


def minimum_norm(y):
    """The least weights that fit: a for each example with y = 1, and -d with y = -1.

    These are combinations of the examples, by two equations:

        (3 n_1 + 1) a - n_-1 d = 1          for y = 1
        n_1 a - (3 n_-1 + 5) d = -1         for y = -1
    """
    ones, others = np.sum(y == 1), np.sum(y == -1)
    a, d = np.linalg.solve([[3 * ones + 1, -others], [ones, -3 * others - 5]], [1, -1])
    return np.array([ones * a + others * d, ones * a - others * d, a, -d])


def signs():
    """sign(Xᵀy) / 4 fits too, because X sign(Xᵀy) = 4 y."""
    return np.array([1, 1, 1, -1]) / 4


def wrong(w, y):
    """The part of new examples on the wrong side: their own features have weight 0."""
    return np.mean(np.sign(w[0] * y + w[1] + w[2]) != y)


def fit(tx, y, steps=600):
    """The last weights, from 0, and the loss at each step."""
    features, y = jnp.asarray(examples(y), jnp.float32), jnp.asarray(y, jnp.float32)

    def loss_of(w):
        return jnp.mean((features @ w - y) ** 2) / 2

    def step(run, _):
        w, state = run
        loss, grads = jax.value_and_grad(loss_of)(w)
        updates, state = tx.update(grads, state, w)
        return (w + updates, state), loss

    w = jnp.zeros(features.shape[1])
    (w, _), losses = jax.lax.scan(step, (w, tx.init(w)), length=steps)
    return np.asarray(w), np.asarray(losses)


# Features that never occur have gradient 0, and 0/0 is 0: eps may be 0, as in theory.
OPTIMIZERS = {
    "RMSprop": rmsprop(optax.exponential_decay(0.01, 1, 0.98), decay=0.9, eps=0.0),
    "gradient descent": optax.sgd(0.3),
}


def main():
    plt.style.use(Path(__file__).with_name("site.mplstyle"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(2, 3))
    y, new = labels()
    exact = {"RMSprop": signs(), "gradient descent": minimum_norm(y)}
    looks = {
        "RMSprop": ("C0", "-", "", -0.2),
        "gradient descent": ("C1", "--", "///", 0.2),
    }
    for name, tx in OPTIMIZERS.items():
        w, losses = fit(tx, y)
        color, style, hatch, shift = looks[name]
        left.semilogy(losses, color=color, linestyle=style, label=name)
        found, error = kinds(w, y), wrong(w, new)
        label = f"{name}: {error:.1%} of new examples wrong"
        look = {"edgecolor": color, "facecolor": "none" if hatch else color}
        right.bar(np.arange(4) + shift, found, 0.36, hatch=hatch, label=label, **look)
        of_others = wrong(w, new[new == -1])
        print(
            f"{name}: loss {losses[-1]:.1e}, {error:.1%} of new examples wrong, and "
            f"{of_others:.1%} of those with y = -1"
        )
        for kind, value, expected in zip(KINDS, found, exact[name], strict=True):
            print(f"  weight of {kind}: {value:.5f}, exactly {expected:.5f}")
    left.set(title="Training loss", xlabel="step", ylim=(1e-15, 1))
    left.legend(loc="upper right")
    right.axhline(0, color="C5", linewidth=0.8)
    right.set_xticks(range(4), [kind.replace(", ", ",\n") for kind in KINDS])
    right.set(title="Weights, by kind of feature", ylim=(-0.35, 1.35))
    right.grid(axis="x", visible=False)
    right.legend(loc="upper right")
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
