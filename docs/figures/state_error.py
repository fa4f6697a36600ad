"""Draw state_error.png: what 8 and 16 bits do to an average, by how sizes differ.

python docs/figures/state_error.py

Gradients have sizes that differ between parameters by so many octaves (one standard
deviation), in one of two ways: from one parameter to the next, or from one block of 256
to the next and not within. Averages of their squares are kept by each method for 2000
steps, in a loop of its own, and compared with float32's in all steps of the last half.

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

BLOCK, BLOCKS, STEPS = 256, 32, 2000
DECAYS = (0.9, 0.99, 0.999)
SPREADS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
ORDERS = ("every parameter", "every block")
OURS = {"uint8": jnp.uint8, "bfloat16": jnp.bfloat16}
STYLES = {
    ("uint8", "every parameter"): ("C0", "-", "uint8"),
    ("uint8", "every block"): ("C0", ":", "uint8, blocks of one size"),
    ("bitsandbytes", "every parameter"): ("C3", "-", "bitsandbytes"),
    ("bitsandbytes", "every block"): ("C3", ":", "bitsandbytes, the same"),
    ("bfloat16", "every parameter"): ("C2", "-", "bfloat16"),
    ("bfloat16, nearest", "every parameter"): ("C2", "--", "bfloat16, nearest"),
}


def by_bitsandbytes(nu):
    """Nearest levels, relative to the largest number of each block."""
    levels = jnp.asarray(dynamic_map(), jnp.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    parts = nu.reshape(BLOCKS, BLOCK)
    largest = jnp.max(parts, axis=1, keepdims=True)
    return (levels[jnp.searchsorted(middles, parts / largest)] * largest).reshape(-1)


def statistics(ratio):
    """The columns of the table, from the ratios of the kept √nu to the exact one."""
    error = ratio - 1
    parts = error**2, error, ratio < 0.5, ratio > 2
    return [jnp.mean(part) for part in parts]


def to_nearest(nu):
    return nu.astype(jnp.bfloat16).astype(jnp.float32)


@jax.jit
def errors(decay, sizes, key):
    """The statistics of √nu with every method, averaged over the last half of steps."""
    txs = {name: compress_state(scale_by_rms(decay), d) for name, d in OURS.items()}
    theirs = {"bitsandbytes": by_bitsandbytes, "bfloat16, nearest": to_nearest}

    def average(nu, g):
        return decay * nu + (1 - decay) * g * g

    def step(carry, i):
        exact, states, nus, sums = carry
        g = sizes * jax.random.normal(jax.random.fold_in(key, i), sizes.shape)
        exact = average(exact, g)
        states = {name: tx.update(g, states[name])[1] for name, tx in txs.items()}
        nus = {name: f(average(nus[name], g)) for name, f in theirs.items()}
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
    """The sizes of gradients; those of blocks are evenly spaced quantiles."""
    if order == "every parameter":
        octaves = jax.random.normal(jax.random.key(1), (BLOCKS * BLOCK,))
    else:
        quantiles = (jnp.arange(BLOCKS) + 0.5) / BLOCKS
        octaves = jnp.repeat(jax.scipy.stats.norm.ppf(quantiles), BLOCK)
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


def draw(axes, rows, decay):
    for (method, order), (color, dashes, label) in STYLES.items():
        values = [
            row["rms error, %"]
            for row in rows
            if (row["method"], row["sizes of"], row["decay"]) == (method, order, decay)
        ]
        axes.plot(SPREADS, values, color=color, linestyle=dashes, label=label)
    axes.set(yscale="log", ylim=(0.15, 5000), title=f"decay {decay}")
    axes.set_yticks([1, 10, 100, 1000], ["1 %", "10 %", "100 %", "1000 %"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--redraw", action="store_true", help="what the JSON has")
    record = Path(__file__).with_suffix(".json")
    rows = json.loads(record.read_text()) if parser.parse_args().redraw else measure()
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    record.write_text(f"[\n{lines}\n]\n")
    plt.style.use(Path(__file__).with_name("site.mplstyle"))
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.8), sharey=True)
    for axes, decay in zip(panels, DECAYS, strict=True):
        draw(axes, rows, decay)
    panels[0].set_ylabel("error of √nu, root mean square")
    panels[1].set_xlabel("how much sizes of gradients differ, octaves")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
