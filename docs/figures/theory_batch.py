"""Draw theory_batch.png: batches of 1, 4 and 16, with and without the square root rule.

python docs/figures/theory_batch.py

All runs start from the same weights and see the same number of images, drawn at random.
The rule is that of Malladi et al. (arXiv:2205.10287).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from choosing import digits, first_params, loss_of

from optax_rmsprop import rmsprop, scaled_to_batch

FACTORS, SEEDS = (1, 4, 16), 4
BASE = {"learning_rate": 1e-4, "decay": 0.999, "eps": 1e-8}
RULES = {
    "The square root rule": lambda factor: scaled_to_batch(factor, **BASE),
    "Learning rate × factor": lambda factor: {**BASE, "learning_rate": 1e-4 * factor},
    "The same settings": lambda factor: BASE,
}


def curve(settings, batch, images=48_000, points=24):
    """The mean training loss over seeds, at equally many images for each batch size."""
    tx = rmsprop(**settings)
    (pixels, labels), _ = digits()
    start = first_params(jax.random.key(0))

    def step(run, key):
        params, state = run
        some = jax.random.randint(key, (batch,), 0, len(labels))
        grads = jax.grad(loss_of)(params, pixels[some], labels[some])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def until_next_point(run, keys):
        run, _ = jax.lax.scan(step, run, keys)
        return run, loss_of(run[0], pixels, labels)

    def one(seed):
        keys = jax.random.split(
            jax.random.key(seed), (points, images // batch // points)
        )
        return jax.lax.scan(until_next_point, (start, tx.init(start)), keys)[1]

    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(SEEDS))).mean(0)


def main():
    plt.style.use(Path(__file__).with_name("site.mplstyle"))
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.4), sharey=True)
    looks = {1: ("C5", "-", 2.5), 4: ("C1", "--", 1.6), 16: ("C0", ":", 2)}
    first = curve(BASE, 1)
    seen = np.linspace(0, 48, len(first) + 1)[1:]
    for axes, (title, rule) in zip(panels, RULES.items(), strict=True):
        for factor, (color, style, width) in looks.items():
            losses = first if factor == 1 else curve(rule(factor), factor)
            line = {"color": color, "linestyle": style, "linewidth": width}
            axes.semilogy(seen, losses, label=f"batches of {factor}", **line)
            ratio = losses / first
            print(
                f"{title}, batches of {factor}: last loss {losses[-1]:.4f}, "
                f"{ratio.min():.2f} to {ratio.max():.2f} times that with batches of 1"
            )
        axes.set(title=title, xlabel="thousand images seen")
    panels[0].set_ylabel("training loss")
    panels[0].set_yticks((0.01, 0.1, 1), ("0.01", "0.1", "1"))
    panels[0].legend(loc="lower left")
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
