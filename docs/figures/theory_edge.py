"""Draw theory_edge.png: trained on all data at once, RMSprop stays at its limit.

python docs/figures/theory_edge.py

The sharpness is that of Cohen et al. (arXiv:2207.14484 and arXiv:2410.24206), the
largest eigenvalue of diag(step_size) H, as `diagnose` computes it.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from choosing import digits, first_params

from optax_rmsprop import diagnose, rmsprop

M = 0.9
PLAIN = {
    "learning rate 0.001, decay 0.99": {"learning_rate": 1e-3, "decay": 0.99},
    "learning rate 0.001, decay 0.999": {"learning_rate": 1e-3, "decay": 0.999},
    "learning rate 0.0003, decay 0.99": {"learning_rate": 3e-4, "decay": 0.99},
}
MOMENTUM = {
    "momentum 0.9": {"learning_rate": 1e-4, "momentum": M},
    "momentum 0.9, nesterov": {"learning_rate": 1e-4, "momentum": M, "nesterov": True},
}
LIMITS = {
    **dict.fromkeys(PLAIN, 2.0),
    "momentum 0.9": 2 * (1 + M),
    "momentum 0.9, nesterov": (2 + 2 * M) / (1 + 2 * M),
}
IMAGES, EVERY = 300, 10


def loss_of(params, images, targets):
    """Half the squared distance to the label's unit vector."""
    hidden = jnp.tanh(images @ params["in"] + params["in_bias"][None])
    outputs = hidden @ params["out"] + params["out_bias"][None]
    return jnp.mean(jnp.sum((outputs - targets) ** 2, 1)) / 2


def train(settings, steps=1600):
    """Loss and sharpness at each tenth step of a run on the first images."""
    (images, labels), _ = digits()
    data = images[:IMAGES], jax.nn.one_hot(labels[:IMAGES], 10)
    grad_of = jax.grad(lambda params: loss_of(params, *data))
    tx = rmsprop(**settings)

    def step(run):
        params, state = run
        updates, state = tx.update(grad_of(params), state, params)
        return optax.apply_updates(params, updates), state

    def ten_steps(run, _):
        run = jax.lax.fori_loop(0, EVERY - 1, lambda _, run: step(run), run)
        params = run[0]  # from which the tenth step starts
        run = step(run)
        found = diagnose(
            run[1],
            settings["learning_rate"],
            hessian_vector_product=lambda v: jax.jvp(grad_of, (params,), (v,))[1],
        )
        return run, (loss_of(params, *data), found.sharpness)

    @jax.jit
    def whole():
        params = first_params(jax.random.key(0))
        run = params, tx.init(params)
        return jax.lax.scan(ten_steps, run, length=steps // EVERY)[1]

    return map(np.asarray, whole())


def main():
    plt.style.use(Path(__file__).with_name("site.mplstyle"))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8))
    looks = [("C0", "-"), ("C2", "--"), ("C1", ":")]
    for axes, runs in zip(panels, (PLAIN, MOMENTUM), strict=True):
        for (name, settings), (color, style) in zip(runs.items(), looks, strict=False):
            losses, sharpness = train(settings)
            at = EVERY * (1 + np.arange(len(sharpness)))
            axes.plot(at, sharpness, color=color, linestyle=style, label=name)
            axes.axhline(LIMITS[name], color="C5", linewidth=1, zorder=1)
            late = sharpness[len(sharpness) // 2 :]
            low, middle, high = np.quantile(late, (0.1, 0.5, 0.9))
            print(
                f"{name}: loss {losses[0]:.3f} to {losses[-1]:.4f}; sharpness in the "
                f"second half {middle:.2f}, 10 to 90 %: {low:.2f} to {high:.2f}; "
                f"limit {LIMITS[name]:.2f}"
            )
        axes.set(xlabel="step", ylim=(0, None))
    panels[0].set(title="Plain: the limit is 2", ylabel="sharpness")
    panels[1].set(title="Momentum: the limits are 3.8 and 1.36")
    panels[0].legend(loc="lower right")
    panels[1].legend(loc="center right")
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
