"""Draw levels.png: how far apart 8-bit levels are, and what that does to an average.

python docs/figures/levels.py

Prints the errors that docs/low_precision.md quotes. The quantization map of
bitsandbytes is made here from its paper (Dettmers et al., arXiv:2110.02861).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from optax_rmsprop import compress_state, decompress_state, scale_by_rms
from optax_rmsprop._codes import NON_NEGATIVE, SIGNED, Scale, decode

SIZE, STEPS, OCTAVES = 8192, 2000, 2.0
DECAYS = (0.9, 0.99, 0.999)
COLORS = {
    "uint8, non-negative": "tab:blue",
    "uint8, signed": "tab:cyan",
    "bfloat16": "tab:green",
    "bitsandbytes": "tab:red",
    "float8 e5m2": "tab:gray",
    "float8 e4m3": "tab:orange",
}


def our_levels(kind):
    """The levels at and below the largest number of an array, which is 1."""
    exponent = 5 - {NON_NEGATIVE: 40, SIGNED: 32}[kind]
    scale = Scale(*(jnp.full(1, x) for x in (kind, exponent)), jnp.zeros(1))
    codes = np.arange(1, 254) if kind == NON_NEGATIVE else np.arange(2, 252, 2)
    levels = np.asarray(decode(jnp.asarray(codes, jnp.uint8), scale))
    return levels[levels <= 1]


def float_levels(dtype):
    """Of a float8, scaled so that its largest number is 1."""
    codes = jnp.arange(1, 128, dtype=jnp.uint8)
    levels = jax.lax.bitcast_convert_type(codes, dtype).astype(jnp.float32)
    levels = np.asarray(levels[jnp.isfinite(levels)])
    return levels / levels.max()


def dynamic_map():
    """bitsandbytes' map, signed: seven decades, each finer than the one below it."""
    positive = []
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        positive.append(10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = np.concatenate([*positive, [1]])
    return np.sort(np.concatenate([-positive[:-1], [0], positive]))


def distance(levels):
    """Where two levels are in octaves below 1, and their distance in percent."""
    levels = np.sort(levels[levels > 0])
    return np.log2(levels[1:]), 100 * np.diff(levels) / levels[1:]


def by_bitsandbytes(nu, blocks=256):
    """Nearest levels, relative to the largest number of each block."""
    levels = dynamic_map()
    middles = (levels[1:] + levels[:-1]) / 2
    parts = nu.reshape(-1, blocks)
    largest = np.abs(parts).max(axis=1, keepdims=True)
    largest[largest == 0] = 1
    return (levels[np.searchsorted(middles, parts / largest)] * largest).reshape(-1)


def gradients():
    rng = np.random.default_rng(0)
    sizes = np.exp2(OCTAVES * rng.standard_normal(SIZE))
    for _ in range(STEPS):
        yield (sizes * rng.standard_normal(SIZE)).astype(np.float32)


def errors(decay):
    """Of √nu in the last half of the steps, in percent: root mean square, and mean."""
    txs = {
        "uint8, non-negative": compress_state(scale_by_rms(decay), jnp.uint8),
        "bfloat16": compress_state(scale_by_rms(decay), jnp.bfloat16),
    }
    states = {name: tx.init(jnp.zeros(SIZE)) for name, tx in txs.items()}
    updates = {name: jax.jit(tx.update) for name, tx in txs.items()}
    exact, theirs, nearest = (np.zeros(SIZE, np.float32) for _ in range(3))
    found = {}
    for step, g in enumerate(gradients()):
        exact, theirs, nearest = (
            np.float32(decay) * nu + np.float32(1 - decay) * g * g
            for nu in (exact, theirs, nearest)
        )
        theirs = by_bitsandbytes(theirs).astype(np.float32)
        nearest = np.asarray(jnp.asarray(nearest, jnp.bfloat16), np.float32)
        for name in txs:
            states[name] = updates[name](g, states[name])[1]
        if step >= STEPS // 2 and step % 50 == 0:
            nus = {n: np.asarray(decompress_state(s).nu) for n, s in states.items()}
            nus |= {"bitsandbytes": theirs, "bfloat16, nearest": nearest}
            for name, nu in nus.items():
                error = 100 * (np.sqrt(nu / exact) - 1)
                found.setdefault(name, []).append(error)
    return {
        name: (float(np.sqrt(np.mean(np.square(e)))), float(np.mean(e)))
        for name, e in found.items()
    }


def draw_levels(axes):
    sets = {
        "uint8, non-negative": distance(our_levels(NON_NEGATIVE)),
        "uint8, signed": distance(our_levels(SIGNED)),
        "bitsandbytes": distance(dynamic_map()),
        "float8 e4m3": distance(float_levels(jnp.float8_e4m3fn)),
        "float8 e5m2": distance(float_levels(jnp.float8_e5m2)),
    }
    for name, (octave, percent) in sets.items():
        thin = {"linewidth": 1, "zorder": 1} if name.startswith("float8") else {}
        axes.plot(octave, percent, color=COLORS[name], label=name, **thin)
    least = 100 / 2**8  # of bfloat16, whose distances double within each octave
    band = {"color": COLORS["bfloat16"], "linewidth": 0, "alpha": 0.6}
    axes.fill_between([-40, 0], least, 2 * least, label="bfloat16", **band)
    axes.set(
        yscale="log",
        xlim=(-40, 0),
        ylim=(0.3, 120),
        title="How far apart levels are",
        xlabel="octaves below the largest number",
        ylabel="distance, % of the number",
    )
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.16))


def draw_errors(axes, table):
    for name in ("uint8, non-negative", "bitsandbytes", "bfloat16"):
        values = [table[decay][name][0] for decay in DECAYS]
        label = name.removesuffix(", non-negative")
        axes.plot(range(3), values, "o-", color=COLORS[name], label=label)
    values = [table[decay]["bfloat16, nearest"][0] for decay in DECAYS]
    style = {"color": COLORS["bfloat16"], "linestyle": "--", "marker": "o"}
    axes.plot(range(3), values, label="bfloat16, nearest", **style)
    axes.set(
        yscale="log",
        title="Error of the step's denominator √nu",
        xlabel="decay",
        ylabel="root mean square, %",
    )
    axes.set_xticks(range(3), DECAYS)
    axes.legend(frameon=False, fontsize=8)


def main():
    table = {decay: errors(decay) for decay in DECAYS}
    print("decay | of | root mean square error of √nu, % | mean error, %")
    for decay, row in table.items():
        for name, (rms, mean) in row.items():
            print(f"{decay} | {name} | {rms:.2f} | {mean:+.2f}")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    draw_levels(left)
    draw_errors(right, table)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
