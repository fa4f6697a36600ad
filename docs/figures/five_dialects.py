"""Draw five_dialects.png: one network under five RMSprops with the same arguments.

python docs/figures/five_dialects.py

All runs share the digits, first weights, batches, learning rates, decay, epsilon,
momentum and weight decay; from each line to the next, the named switches change. The
loss is that of all digits, without the weight decay.
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

from optax_rmsprop import dialects

STEPS, BATCH, WARM, DROP = 400, 128, 100, 250
PEAK = 3e-3
LEARNING_RATE = optax.join_schedules(
    [
        optax.linear_schedule(0, PEAK, WARM),
        optax.constant_schedule(PEAK),
        optax.constant_schedule(PEAK / 10),
    ],
    [WARM, DROP],
)
COMMON = {"momentum": 0.9, "weight_decay": 1e-3}
DIALECTS = {
    "torch": dialects.torch(LEARNING_RATE, alpha=0.9, eps=1e-3, **COMMON),
    "stable_baselines3": dialects.stable_baselines3(
        LEARNING_RATE, alpha=0.9, eps=1e-3, **COMMON
    ),
    "timm": dialects.timm(LEARNING_RATE, alpha=0.9, eps=1e-3, **COMMON),
    "paddle": dialects.paddle(LEARNING_RATE, rho=0.9, epsilon=1e-3, **COMMON),
    "keras": dialects.keras(LEARNING_RATE, rho=0.9, epsilon=1e-3, **COMMON),
}
LABELS = {
    "torch": "torch",
    "stable_baselines3": "stable_baselines3: epsilon under the root, start at 1",
    "timm": "timm: and learning rate inside momentum",
    "paddle": "paddle: and start at 0",
    "keras": "keras: and weight decay decoupled",
}
SHOWN = (20, 50, WARM, DROP, DROP + 12, STEPS)


def network(params, images):
    return jnp.tanh(images @ params["in"]) @ params["out"]


def loss_of(params, images, labels):
    logits = network(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def problem():
    digits = load_digits()
    images = jnp.asarray(digits.data / 16, jnp.float32)
    labels = jnp.asarray(digits.target, jnp.int32)
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=(64, 64)) / 8, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(64, 10)) / 8, jnp.float32),
    }
    batches = rng.integers(len(images), size=(STEPS, BATCH))
    return params, images, labels, jnp.asarray(batches, jnp.int32)


def training(tx, measure, updates=STEPS):
    """The values of `measure` for parameters, steps and state in each update."""
    params, images, labels, batches = problem()

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(loss_of)(params, images[batch], labels[batch])
        changes, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, changes)
        return (params, state), measure(params, changes, state)

    return jax.lax.scan(step, (params, tx.init(params)), batches[:updates])[1]


def losses(tx):
    """The loss of all digits, before the first update and after each."""
    params, images, labels, _ = problem()
    rest = training(tx, lambda params, *_: loss_of(params, images, labels))
    return np.append(loss_of(params, images, labels), rest)


def main():
    plt.style.use(Path(__file__).with_name("site.mplstyle"))
    figure, axes = plt.subplots(figsize=(7, 3.8))
    axes.axvline(DROP, ymax=0.6, color="C5", linewidth=0.8, linestyle=":")
    for name, tx in DIALECTS.items():
        axes.semilogy(losses(tx), label=LABELS[name], linewidth=1.4)
    axes.annotate(
        "learning rate / 10", (DROP, 0.25), (4, 0), textcoords="offset points", size=8
    )
    axes.set(xlabel="updates", ylabel="training loss")
    axes.legend(fontsize=8, loc="upper right")
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
