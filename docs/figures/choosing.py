"""Draw choosing.png: RMSprop, Adam and SGD on digits, over ten learning rates.

python docs/figures/choosing.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from optax_rmsprop import rmsprop

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
SEEDS, HIDDEN, BATCH = 5, 32, 64
OPTIMIZERS = {
    "RMSprop": lambda rate: rmsprop(rate),
    "RMSprop, momentum 0.9": lambda rate: rmsprop(rate, momentum=0.9),
    "Adam": lambda rate: optax.adam(rate),
    "SGD, momentum 0.9": lambda rate: optax.sgd(rate, momentum=0.9),
}


def digits():
    """Images and labels to train on, then those held out."""
    images, labels = load_digits(return_X_y=True)
    images, held_out, labels, held_out_labels = train_test_split(
        jnp.asarray(images / 16, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        test_size=450,
        stratify=labels,
        random_state=0,
    )
    return (images, labels), (held_out, held_out_labels)


def first_params(key):
    keys = jax.random.split(key)
    return {
        "in": jax.random.normal(keys[0], (64, HIDDEN)) / 8,
        "in_bias": jnp.zeros(HIDDEN),
        "out": jax.random.normal(keys[1], (HIDDEN, 10)) / HIDDEN**0.5,
        "out_bias": jnp.zeros(10),
    }


def loss_of(params, images, labels):
    hidden = jnp.tanh(images @ params["in"] + params["in_bias"][None])
    logits = hidden @ params["out"] + params["out_bias"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def train(make, rate, seed, training, held_out, steps):
    """The held-out loss after every tenth step of one run."""
    start, order = jax.random.split(jax.random.key(seed))
    params, tx = first_params(start), make(rate)

    def ten_steps(run, keys):
        def step(run, key):
            params, state = run
            batch = jax.random.randint(key, (BATCH,), 0, len(training[1]))
            grads = jax.grad(loss_of)(params, training[0][batch], training[1][batch])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        run, _ = jax.lax.scan(step, run, keys)
        return run, loss_of(run[0], *held_out)

    keys = jax.random.split(order, (steps // 10, 10))
    return jax.lax.scan(ten_steps, (params, tx.init(params)), keys)[1]


def losses(make, steps=500):
    """Held-out losses: (rates, seeds, steps / 10)."""
    training, held_out = digits()

    def one(rate, seed):
        return train(make, rate, seed, training, held_out, steps)

    by_seed = jax.vmap(one, (None, 0))
    every = jax.jit(jax.vmap(by_seed, (0, None)))
    return np.asarray(every(jnp.array(RATES), jnp.arange(SEEDS)))


def main():
    plt.style.use(Path(__file__).with_name("site.mplstyle"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2))
    looks = ("C0", "o-"), ("C4", "^--"), ("C1", "s-."), ("C2", "D:")
    for (name, make), (color, line) in zip(OPTIMIZERS.items(), looks, strict=True):
        curves = losses(make)
        mean, std = curves[..., -1].mean(1), curves[..., -1].std(1)
        best = int(np.nanargmin(mean))
        print(f"{name}: {mean[best]:.3f} ± {std[best]:.3f} at {RATES[best]:g}")
        left.plot(RATES, mean, line, ms=4, color=color)
        least, most = curves[..., -1].min(1), curves[..., -1].max(1)
        left.fill_between(RATES, least, most, color=color, alpha=0.2, lw=0)
        good = [f"{r:g}" for r, x in zip(RATES, mean, strict=True) if x < 0.15]
        print(f"  below 0.15 at {', '.join(good)}")
        steps = 10 * (1 + np.arange(curves.shape[-1]))
        label = f"{name}, learning rate {RATES[best]:g}"
        right.plot(steps, curves[best].mean(0), color + line[1:], label=label)
    left.set(
        title="After 500 steps",
        xlabel="learning rate",
        ylabel="held-out loss",
        xscale="log",
        yscale="log",
        ylim=(0.06, 3),
    )
    right.set(
        title="At the best learning rate", xlabel="step", yscale="log", ylim=(0.06, 3)
    )
    for axes in (left, right):
        axes.set_yticks((0.1, 0.2, 0.5, 1, 2), ("0.1", "0.2", "0.5", "1", "2"))
        axes.minorticks_off()
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower center", ncols=2
    )
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
