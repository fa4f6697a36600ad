"""Draw levels.png: how far apart 8-bit levels are, against how large the number is.

python docs/figures/levels.py

The quantization maps of bitsandbytes and flashoptim are made here from their papers
(Dettmers et al., arXiv:2110.02861; Gonzalez Ortiz et al., arXiv:2602.23349).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from optax_rmsprop.wrappers._codes import decode, first_format

LINES = {  # color, dashes and width
    "uint8, 2 octaves": ("C0", "-", 1.6),
    "uint8, 12 octaves": ("C0", "--", 1.6),
    "uint8, 40 octaves": ("C0", ":", 1.6),
    "uint8, signed": ("C4", "-", 1.6),
    "bitsandbytes": ("C3", "-", 1.6),
    "flashoptim": ("C1", "-", 1.6),
    "float8 e4m3": ("C5", "-", 1),
    "float8 e5m2": ("C5", ":", 1),
}


def our_levels(least):
    """The levels of a row whose largest number is 1, and whose other one is `least`."""
    format = first_format(jnp.array([least, 1.0]))
    codes = jnp.arange(1, 254).astype(jnp.uint8)
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


def square_map():
    """flashoptim's map of second moments: even levels of the root."""
    return (np.arange(256) / 255) ** 2


def distance(levels):
    """Where two levels are in octaves below 1, and their distance in percent."""
    levels = np.sort(levels[levels > 0])
    return np.log2(levels[1:]), 100 * np.diff(levels) / levels[1:]


def draw(figure, axes):
    sets = {
        "uint8, 2 octaves": our_levels(2.0**-2),
        "uint8, 12 octaves": our_levels(2.0**-12),
        "uint8, 40 octaves": our_levels(2.0**-40),
        "uint8, signed": our_levels(-1.0),
        "bitsandbytes": dynamic_map(),
        "flashoptim": square_map(),
        "float8 e4m3": float_levels(jnp.float8_e4m3fn),
        "float8 e5m2": float_levels(jnp.float8_e5m2),
    }
    for name, (color, dashes, width) in LINES.items():
        line = {"color": color, "linestyle": dashes, "linewidth": width}
        axes.plot(*distance(sets[name]), label=name, **line)
    least = 100 / 2**8  # of bfloat16, whose distances double within each octave
    band = {"color": "C2", "linewidth": 0, "alpha": 0.6}
    axes.fill_between([-40, 0], least, 2 * least, label="bfloat16", **band)
    axes.set(
        yscale="log",
        xlim=(-40, 0),
        ylim=(0.3, 120),
        title="How far apart levels are",
        xlabel="octaves below the largest number of a row, block or array",
        ylabel="distance, % of the number",
    )
    figure.legend(fontsize=8, loc="outside right center")


def main():
    plt.style.use(Path(__file__).with_name("site.mplstyle"))
    figure, axes = plt.subplots(figsize=(8, 3.6))
    draw(figure, axes)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
