"""Draw theory_decay.png: where RMSprop ends on a problem made against short memories.

python docs/figures/theory_decay.py

The problem is the first experiment of Reddi, Kale and Kumar (arXiv:1904.09237): the
gradient of x is 1010 in one of 101 steps and -10 in the others. Their sum is 10, so -1
is the best point in [-1, 1], and 1 the worst.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import brentq

from optax_rmsprop import rmsprop

CYCLE, LARGE, SMALL = 101, 1010.0, -10.0
# 1 - decay, from 0.1 to 1e-5, closer together where the end changes.
FORGOTTEN = np.sort([*np.geomspace(1e-5, 0.1, 17), *np.geomspace(2.5e-4, 6.3e-4, 8)])


def end(decay, cycles):
    """The last x, from 0, with learning rates of 2/√t."""
    tx = rmsprop(
        lambda count: 2 * jax.lax.rsqrt(1.0 + count.astype(jnp.float32)),
        decay,
        bias_correction=True,
    )

    def step(run, t):
        x, state = run
        g = jnp.where(t % CYCLE == 0, LARGE, SMALL)
        update, state = tx.update(g, state, x)
        return (jnp.clip(x + update, -1, 1), state), None

    x = jnp.zeros(())
    (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), jnp.arange(CYCLE * cycles))
    return x


def ends(decays, cycles):
    """The last x for each decay."""
    every = jax.jit(jax.vmap(end, (0, None)), static_argnums=1)
    return np.asarray(every(jnp.asarray(decays), cycles))


def drift(decay):
    """The sum of g / √nu over a cycle that repeats itself. x moves the other way.

    After the large gradient the average is `first`, and then approaches SMALL²:
    SMALL² + decay**t (first - SMALL²) after t small ones. One cycle later it must be
    `first` again.
    """
    excess = (1 - decay) * (LARGE**2 - SMALL**2) / (1 - decay**CYCLE)
    averages = SMALL**2 + decay ** np.arange(CYCLE) * excess
    return LARGE / np.sqrt(averages[0]) + np.sum(SMALL / np.sqrt(averages[1:]))


def threshold():
    """The decay at which x goes nowhere."""
    return brentq(drift, 0.99, 0.99999)


def main():
    plt.style.use(Path(__file__).with_name("site.mplstyle"))
    figure, axes = plt.subplots(figsize=(7, 3.2))
    decays = 1 - FORGOTTEN
    looks = {100: ("C2", ":", "^"), 1000: ("C1", "--", "s"), 10_000: ("C0", "-", "o")}
    for cycles, (color, style, marker) in looks.items():
        x = ends(decays, cycles)
        line = {"linestyle": style, "marker": marker, "markersize": 4}
        label = f"after {CYCLE * cycles:,} steps".replace(",", " ")
        axes.semilogx(FORGOTTEN, x, color=color, label=label, **line)
        shown = (f"{d:.6g}: {at:.3f}" for d, at in zip(decays, x, strict=True))
        print(f"{label}, by decay:", ", ".join(shown))
    print(f"no drift at decay {threshold():.6f}")
    axes.axvline(1 - threshold(), color="C5", linewidth=1, linestyle="-.")
    axes.text(1 - threshold(), -0.9, f"no drift: {threshold():.4f} ", ha="right")
    at = (0.1, 0.01, 1e-3, 1e-4, 1e-5)
    axes.set_xticks(at, ("0.9", "0.99", "0.999", "0.9999", "0.99999"))
    axes.set(xlabel="decay", ylabel="last x", title="Where x ends: the best is -1")
    axes.invert_xaxis()
    axes.legend(loc="center left")
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
