"""Draw levels.png: how far apart 8-bit levels are, against how large the number is.

python docs/figures/levels.py

The quantization map of bitsandbytes is made here from its paper (Dettmers et al.,
arXiv:2110.02861).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from optax_rmsprop.wrappers._codes import NON_NEGATIVE, SIGNED, Format, decode

COLORS = {
    "uint8, non-negative": "C0",
    "uint8, signed": "C4",
    "bfloat16": "C2",
    "bitsandbytes": "C3",
    "float8 e5m2": "C5",
    "float8 e4m3": "C1",
}


def our_levels(kind):
    """The levels at and below the largest number of an array, which is 1."""
    exponent = 5 - {NON_NEGATIVE: 40, SIGNED: 32}[kind]
    format = Format(jnp.int32(kind), jnp.int32(exponent))
    codes = jnp.arange(1, 256).astype(jnp.uint8)
    levels = np.asarray(decode(codes, format, jnp.float32))
    return levels[levels <= 1]


def float_levels(dtype):
    """The numbers of a float8, scaled so that the largest is 1."""
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


def draw(axes):
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
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.16))


def main():
    plt.style.use(Path(__file__).with_name("site.mplstyle"))
    figure, axes = plt.subplots(figsize=(7, 3.6))
    draw(axes)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
