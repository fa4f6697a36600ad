"""Draw state_error.png: what 8 and 16 bits do to an average, by how sizes differ.

python docs/figures/state_error.py

Gradients of a 32 x 256 matrix have sizes that differ by so many octaves (one standard
deviation), in one of two ways: from one parameter to the next, or from one row to the
next and not within. Averages of their squares are kept by each method for 2000 steps,
in a loop of its own, and compared with float32's in all steps of the last half.

The codes of bitsandbytes and flashoptim are made here from their papers (Dettmers et
al., arXiv:2110.02861; Gonzalez Ortiz et al., arXiv:2602.23349).

Writes all errors to state_error.json, from which `python docs/tables` makes the table
of docs/low_precision.md.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from levels import dynamic_map

from optax_rmsprop import scale_by_rms
from optax_rmsprop.wrappers import compress_state, decompress_state
from optax_rmsprop.wrappers._rounding import random_axis_bits, stochastic_round

SHAPE, STEPS = (32, 256), 2000
DECAYS = (0.9, 0.99, 0.999)
SPREADS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
ORDERS = ("every parameter", "every row")
OURS = {"uint8": jnp.uint8, "bfloat16": jnp.bfloat16}
METHODS = {  # color and marker
    "uint8": ("C0", "o"),
    "flashoptim": ("C1", "s"),
    "bitsandbytes": ("C3", "^"),
    "bfloat16": ("C2", "v"),
    "bfloat16, nearest": ("C4", "x"),
}


def by_bitsandbytes(nu, _):
    """Nearest levels, relative to the largest number of each block of 256."""
    levels = jnp.asarray(dynamic_map(), jnp.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    parts = nu.reshape(-1, 256)
    largest = jnp.max(parts, axis=1, keepdims=True)
    nearest = levels[jnp.searchsorted(middles, parts / largest)]
    return (nearest * largest).reshape(nu.shape)


def by_flashoptim(nu, _):
    """The nearest of 256 even levels of √nu, up to the largest of each group of 32."""
    roots = jnp.sqrt(nu).reshape(-1, 32)
    largest = jnp.max(roots, axis=1, keepdims=True)
    codes = jnp.round(255 * roots / largest)
    scales = largest.astype(jnp.float16).astype(jnp.float32)
    return jnp.square(codes / 255 * scales).reshape(nu.shape)


def statistics(ratio):
    """The columns of the table, from the ratios of the kept √nu to the exact one."""
    error = ratio - 1
    parts = error**2, error, ratio < 0.5, ratio > 2
    return [jnp.mean(part) for part in parts]


def to_nearest(nu, _):
    return nu.astype(jnp.bfloat16).astype(jnp.float32)


def by_new_numbers(nu, key):
    """bfloat16, rounded at random independently of the steps before."""
    (axis_bits,) = random_axis_bits(key, (nu.shape,))
    return stochastic_round(nu, jnp.bfloat16, axis_bits).astype(jnp.float32)


@jax.jit
def errors(decay, sizes, key):
    """The statistics of √nu with every method, averaged over the last half of steps."""
    txs = {name: compress_state(scale_by_rms(decay), d) for name, d in OURS.items()}
    theirs = {
        "flashoptim": by_flashoptim,
        "bitsandbytes": by_bitsandbytes,
        "bfloat16, nearest": to_nearest,
        "bfloat16, independent": by_new_numbers,
    }

    def average(nu, g):
        return decay * nu + (1 - decay) * g * g

    def step(carry, i):
        exact, states, nus, sums = carry
        for_gradient, for_rounding = jax.random.split(jax.random.fold_in(key, i))
        g = sizes * jax.random.normal(for_gradient, sizes.shape)
        exact = average(exact, g)
        states = {name: tx.update(g, states[name])[1] for name, tx in txs.items()}
        nus = {
            name: f(average(nus[name], g), for_rounding) for name, f in theirs.items()
        }
        kept = {name: decompress_state(s).nu for name, s in states.items()} | nus
        ratios = {name: jnp.sqrt(nu / exact) for name, nu in kept.items()}
        found = {name: jnp.stack(statistics(r)) for name, r in ratios.items()}
        late = jnp.where(i >= STEPS // 2, 1.0, 0.0) / (STEPS - STEPS // 2)
        sums = jax.tree.map(lambda total, new: total + late * new, sums, found)
        return (exact, states, nus, sums), None

    zeros = jnp.zeros_like(sizes)
    states = {name: tx.init(zeros) for name, tx in txs.items()}
    sums = {name: jnp.zeros(4) for name in [*txs, *theirs]}
    first = zeros, states, {name: zeros for name in theirs}, sums
    (*_, sums), _ = jax.lax.scan(step, first, jnp.arange(STEPS))
    return sums


def sizes_of(order, spread):
    """The sizes of gradients; those of rows are evenly spaced quantiles."""
    if order == "every parameter":
        octaves = jax.random.normal(jax.random.key(1), SHAPE)
    else:
        rows = SHAPE[0]
        quantiles = jax.scipy.stats.norm.ppf((jnp.arange(rows) + 0.5) / rows)
        octaves = jnp.broadcast_to(quantiles[:, None], SHAPE)
    return jnp.exp2(spread * octaves)


def measure():
    rows = []
    for order in ORDERS:
        for decay in DECAYS:
            for spread in SPREADS:
                found = errors(decay, sizes_of(order, spread), jax.random.key(0))
                for method, (square, mean, longer, shorter) in found.items():
                    row = {
                        "sizes of": order,
                        "octaves": spread,
                        "decay": decay,
                        "method": method,
                        "rms error, %": round(100 * float(np.sqrt(square)), 2),
                        "mean error, %": round(100 * float(mean), 2),
                        "steps more than doubled, %": round(100 * float(longer), 2),
                        "steps less than half, %": round(100 * float(shorter), 2),
                    }
                    rows.append(row)
    return rows


def draw(axes, rows, decay, order):
    for method, (color, marker) in METHODS.items():
        values = [
            row["rms error, %"]
            for row in rows
            if (row["method"], row["sizes of"], row["decay"]) == (method, order, decay)
        ]
        axes.plot(SPREADS, values, color=color, marker=marker, label=method)
    axes.set(yscale="log", ylim=(0.15, 200), title=f"decay {decay}, {order}")
    axes.set_yticks([1, 10, 100], ["1 %", "10 %", "100 %"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--redraw", action="store_true", help="what the JSON has")
    record = Path(__file__).with_suffix(".json")
    rows = json.loads(record.read_text()) if parser.parse_args().redraw else measure()
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    record.write_text(f"[\n{lines}\n]\n")
    plt.style.use(Path(__file__).with_name("site.mplstyle"))
    shared = {"sharex": True, "sharey": True}
    figure, panels = plt.subplots(2, 3, figsize=(9, 6.2), **shared)
    for line, order in zip(panels, ORDERS, strict=True):
        for axes, decay in zip(line, DECAYS, strict=True):
            draw(axes, rows, decay, order)
        line[0].set_ylabel("error of √nu, root mean square")
    panels[1][1].set_xlabel("how much sizes of gradients differ, octaves")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
