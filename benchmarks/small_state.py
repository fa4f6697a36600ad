"""Train with small optimizer states and with float32 ones, and compare the losses.

Three tasks, two optimizers, and seven ways to store the run: all in float32; the state
in bfloat16 or in uint8, by `compress_state`; parameters and state in bfloat16, where
`stochastic_apply_updates` rounds the parameters at random, or `optax.apply_updates` to
the nearest; and parameters in bfloat16 with a correction in int8 or int16, by
`master_weights`, and the state in float32. Losses and gradients are computed in float32
of the parameters as they are stored, without corrections.

A seed sets the first parameters, the batches and the rounding, the first two alike for
all ways. Losses are of whole sets (of the text: 8192 characters of either part).
Learning rates were chosen for float32, of three each, by the held-out loss. In the
table, losses are means and standard deviations over the seeds, and the distance is that
of the two means from those of float32, in standard deviations of float32.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from optax_rmsprop import rmsprop
from optax_rmsprop.wrappers import (
    compress_state,
    master_weights,
    stochastic_apply_updates,
)

SEEDS = 5
POINTS = 15  # of a curve
MIN_SIZE = 4096
OPTIONS = {
    "plain": {},
    "centered+momentum": {"centered": True, "momentum": 0.9, "eps": 1e-3},
}


class Way(NamedTuple):
    """How a run is stored."""

    parameters: Any = jnp.float32
    state: Any = None
    at_random: bool = False
    correction: Any = None


WAYS = {
    "float32": Way(),
    "bfloat16 state": Way(state=jnp.bfloat16),
    "uint8 state": Way(state=jnp.uint8),
    "all bfloat16, rounded at random": Way(jnp.bfloat16, jnp.bfloat16, at_random=True),
    "all bfloat16, rounded to nearest": Way(jnp.bfloat16, jnp.bfloat16),
    "bfloat16 parameters and int8": Way(jnp.bfloat16, correction=jnp.int8),
    "bfloat16 parameters and int16": Way(jnp.bfloat16, correction=jnp.int16),
}
CHECKED = "bfloat16 state", "uint8 state", "and int8", "and int16"
TABLE_HEAD = """\
task | optimizer | stored in | training loss | held-out loss | distance
---|---|---|---|---|---"""


class Task(NamedTuple):
    """A loss to make small, and the data."""

    init: Callable[[jax.Array], Any]
    loss: Callable[..., jax.Array]  # of parameters, inputs and targets
    batch: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    steps: int
    rates: dict[str, float]  # the highest learning rate of every optimizer


def matrix(key, *shape):
    """Random weights that keep the size of what passes through them."""
    fan_in = np.prod(shape[:-1])
    return jax.random.normal(key, shape) / np.sqrt(fan_in)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def split_digits(classes):
    """Images and labels to train on, then the held-out ones."""
    scans = load_digits(n_class=classes)
    images = (scans.images / 16).astype(np.float32)
    parts = train_test_split(
        images, scans.target, test_size=0.25, stratify=scans.target, random_state=0
    )
    x, x_test, y, y_test = map(jnp.asarray, parts)
    return (x, y), (x_test, y_test)


def draw_from(data, size):
    def batch(key):
        x, y = data
        index = jax.random.randint(key, (size,), 0, len(x))
        return x[index], y[index]

    return batch


def digits():
    """A convolutional network reads scikit-learn's handwritten digits."""
    train, test = split_digits(classes=10)

    def convolve(x, kernel):
        # As a product of matrices: several times as fast in a loop on a CPU.
        side = x.shape[1] - 2
        shifted = [x[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifted, -1) @ kernel

    def init(key):
        a, b, c, d = jax.random.split(key, 4)
        kernels = matrix(a, 9, 16), matrix(b, 9 * 16, 32), matrix(c, 9 * 32, 64)
        return {"kernels": kernels, "out": matrix(d, 4 * 64, 10), "bias": jnp.zeros(10)}

    def loss(params, x, y):
        x = x[..., None]
        for kernel in params["kernels"]:
            x = jax.nn.silu(convolve(x, kernel))
        return cross_entropy(x.reshape(len(x), -1) @ params["out"] + params["bias"], y)

    rates = {"plain": 3e-3, "centered+momentum": 3e-4}
    return Task(init, loss, draw_from(train, 32), train, test, 600, rates)


def probe():
    """A linear classifier of the digits 0 to 7, on random Fourier features."""
    features = 1024
    rng = np.random.default_rng(0)
    frequencies = jnp.asarray(rng.normal(0, 0.5, (64, features)), jnp.float32)
    phases = jnp.asarray(rng.uniform(0, 2 * np.pi, features), jnp.float32)

    def waves(x, y):
        return jnp.cos(x.reshape(len(x), -1) @ frequencies + phases), y

    train, test = (waves(*part) for part in split_digits(classes=8))

    def init(key):
        return {"w": 0.01 * jax.random.normal(key, (features, 8)), "b": jnp.zeros(8)}

    def loss(params, x, y):
        return cross_entropy(x @ params["w"] + params["b"], y)

    rates = {"plain": 3e-3, "centered+momentum": 3e-4}
    return Task(init, loss, draw_from(train, 32), train, test, 600, rates)


def text():
    """A transformer foretells the next character of Python's help texts."""
    length, width, heads, layers = 32, 64, 4, 2
    characters = "\n".join(topics.values())
    alphabet, codes = np.unique(list(characters), return_inverse=True)
    codes, size = jnp.asarray(codes, jnp.int32), len(alphabet)
    end = int(0.9 * len(codes))

    def windows(starts):
        taken = codes[starts[:, None] + jnp.arange(length + 1)]
        return taken[:, :-1], taken[:, 1:]

    def spread(start, stop, number=256):
        return windows(jnp.linspace(start, stop - length - 1, number).astype(jnp.int32))

    def batch(key):
        return windows(jax.random.randint(key, (16,), 0, end - length))

    def block(key):
        a, b, c, d = jax.random.split(key, 4)
        return {
            "qkv": matrix(a, width, 3 * width),
            "mix": matrix(b, width, width),
            "up": matrix(c, width, 4 * width),
            "down": matrix(d, 4 * width, width),
            "gains": jnp.ones((2, width)),
        }

    def init(key):
        a, b, c, *keys = jax.random.split(key, 3 + layers)
        return {
            "characters": matrix(a, size, width),
            "places": matrix(b, length, width),
            "blocks": [block(key) for key in keys],
            "out": matrix(c, width, size),
        }

    def normalized(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def attention(x):
        q, k, v = jnp.split(x.reshape(*x.shape[:-1], heads, -1), 3, -1)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return mixed.reshape(*x.shape[:-1], -1)

    def loss(params, x, y):
        x = params["characters"][x] + params["places"]
        for w in params["blocks"]:
            x += attention(normalized(x) * w["gains"][0] @ w["qkv"]) @ w["mix"]
            x += jax.nn.gelu(normalized(x) * w["gains"][1] @ w["up"]) @ w["down"]
        return cross_entropy(normalized(x) @ params["out"], y)

    rates = {"plain": 3e-3, "centered+momentum": 1e-3}
    train, test = spread(0, end), spread(end, len(codes))
    return Task(init, loss, batch, train, test, 750, rates)


TASKS = {"digits": digits, "probe": probe, "text": text}


def runner(task, optimizer, way, steps, points):
    """A function from the seed to the curves of both losses, compiled once."""
    rate = task.rates[optimizer]
    # An average that starts at zero makes the first steps the longest: warm up.
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    tx = rmsprop(schedule, **OPTIONS[optimizer])
    if way.state:
        tx = compress_state(tx, way.state, min_size=MIN_SIZE)
    if way.correction:
        tx = master_weights(tx, way.correction)

    def loss(params, x, y):
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return task.loss(wide, x, y)

    def step(carry, key):
        params, state = carry
        for_batch, for_rounding = jax.random.split(key)
        grads = jax.grad(loss)(params, *task.batch(for_batch))
        updates, state = tx.update(grads, state, params)
        if way.at_random:
            params = stochastic_apply_updates(params, updates, for_rounding)
        else:
            params = optax.apply_updates(params, updates)
        return (params, state), None

    def stretch(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        params, _ = carry
        return carry, (loss(params, *task.train), loss(params, *task.test))

    @jax.jit
    def run(seed):
        first, later = jax.random.split(jax.random.key(seed))
        params = jax.tree.map(lambda p: p.astype(way.parameters), task.init(first))
        state = tx.init(params)
        if way.state or way.correction:
            # Its own rounding for every seed, in one program: another count of updates
            # is another salt, where the seed of the wrapper would be a constant.
            state = state._replace(count=seed * steps)
        keys = jax.random.split(later, (points, steps // points))
        return jax.lax.scan(stretch, (params, state), keys)[1]

    return run


def measure(task, optimizer, way, steps, points, seeds):
    run = runner(task, optimizer, way, steps, points)
    start = time.perf_counter()
    train, test = zip(*(run(jnp.int32(seed)) for seed in range(seeds)), strict=True)
    curves = {"train": rounded(train), "test": rounded(test)}
    return {"s": round(time.perf_counter() - start, 1), "curves": curves}


def rounded(curves):
    return [[float(f"{x:.5g}") for x in np.asarray(curve)] for curve in curves]


def mean_and_deviation(row, part):
    """Statistics of the final losses of the seeds."""
    last = np.array(row["curves"][part])[:, -1]
    return last.mean(), last.std(ddof=1)


def compare(row, reference):
    """How far means are from those of float32, in its standard deviations."""
    distances = {}
    for part in ("train", "test"):
        mean, deviation = mean_and_deviation(reference, part)
        distance = (mean_and_deviation(row, part)[0] - mean) / deviation
        distances[part] = round(float(distance), 2)
    return distances


def with_spread(mean, deviation):
    """Both to two digits of the deviation."""
    places = 1 - int(np.floor(np.log10(deviation))) if deviation > 0 else 4
    return f"{mean:.{places}f} ± {deviation:.{places}f}"


def table_line(name, row):
    cells = [with_spread(*mean_and_deviation(row, part)) for part in ("train", "test")]
    distances = ", ".join(f"{x:+z.1f}" for x in row["distance"].values())
    return " | ".join([name, *cells, distances])


def compressed_share(task):
    params = jax.eval_shape(task.init, jax.random.key(0))
    sizes = [p.size for p in jax.tree.leaves(params)]
    return sum(size for size in sizes if size >= MIN_SIZE) / sum(sizes)


def draw(report, path):
    """A row of panels for every task: two optimizers, two losses."""
    looks = {  # ever thinner, since most lie on one another
        "float32": {"color": "C5", "linestyle": "-", "linewidth": 8, "alpha": 0.4},
        "bfloat16 state": {"color": "C0", "linestyle": "-", "linewidth": 4.5},
        "all bfloat16, rounded at random": {
            "color": "C1",
            "linestyle": "-",
            "linewidth": 2,
        },
        "uint8 state": {"color": "C2", "linestyle": ":", "linewidth": 1.5},
        "all bfloat16, rounded to nearest": {"color": "C3", "linestyle": "--"},
    }
    tasks, parts = report["tasks"], {"train": "training", "test": "held-out"}
    style.use(pathlib.Path(__file__).parents[1] / "docs/figures/site.mplstyle")
    width = len(parts) * len(report["options"])
    figure = Figure(figsize=(3 * width, 2.7 * len(tasks) + 0.8))
    grid = figure.subplots(len(tasks), width, squeeze=False, sharex="row", sharey="row")
    for panels, (task, about) in zip(grid, tasks.items(), strict=True):
        columns = [(name, part) for name in report["options"] for part in parts]
        for axes, (optimizer, part) in zip(panels, columns, strict=True):
            for way, look in looks.items():
                row = report["rows"].get(f"{task} | {optimizer} | {way}")
                if row is None:  # left out of a quick run
                    continue
                curves = np.array(row["curves"][part])
                steps = np.arange(1, curves.shape[1] + 1) * about["steps"]
                steps = steps / curves.shape[1]
                mean, deviation = curves.mean(0), curves.std(0, ddof=1)
                low = np.maximum(mean - deviation, curves.min(0))
                band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
                axes.fill_between(steps, low, mean + deviation, **band)
                axes.plot(steps, mean, label=way, **look)
            if axes in grid[0]:
                axes.set_title(f"{optimizer.replace('+', ', ')}\n{parts[part]} loss")
            if axes in grid[-1]:
                axes.set_xlabel("step")
        panels[0].set_ylabel(f"{task}: cross-entropy")
        panels[0].set_xlim(left=0)
        if about["log"]:
            panels[0].set(yscale="log")
            panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panels[0].yaxis.set_major_formatter("{x:g}")
            panels[0].yaxis.set_minor_locator(NullLocator())
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="4 steps of 2 seeds; losses mean nothing")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="only these")
    help_ = "train only these; the rows of the others are those in --output"
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help=help_)
    options = {"nargs": "+", "choices": OPTIONS, "default": list(OPTIONS)}
    add("--options", **options, help="the optimizer with only these")
    results = pathlib.Path(__file__).parent / "results" / "small_state.json"
    help_ = "JSON file (results/small_state.json beside this script)"
    add("--output", type=pathlib.Path, default=results, help=help_)
    figure = pathlib.Path(__file__).parents[1] / "docs" / "figures" / "small_state.png"
    help_ = "PNG file (docs/figures/small_state.png)"
    add("--figure", type=pathlib.Path, default=figure, help=help_)
    help_ = (
        "exit 1 if a final loss with a bfloat16 or uint8 state, or with corrected "
        "parameters, is, in the mean, more than two standard deviations of float32's "
        "seeds from float32's mean"
    )
    add("--check", action="store_true", help=help_)
    args = parser.parse_args()
    if args.quick and (args.output == results or args.figure == figure):
        parser.error("--quick needs --output and --figure: it is no record")
    reads_none = args.quick or set(args.ways) == set(WAYS)
    kept = {} if reads_none else json.loads(args.output.read_text())["rows"]
    points, seeds = (2, 2) if args.quick else (POINTS, SEEDS)
    report = {
        "python": platform.python_version(),
        "versions": {m.__name__: m.__version__ for m in (jax, optax, np, sklearn)},
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "load_average_at_start": os.getloadavg()[0],
        "seeds": seeds,
        "options": {name: OPTIONS[name] for name in args.options},
        "tasks": {},
        "rows": {},
    }
    for name in args.tasks:
        task = TASKS[name]()
        steps = 4 if args.quick else task.steps
        share = compressed_share(task)
        print(f"{name}: {share:.1%} of the parameters have a compressed state")
        about = {"steps": steps, "rates": task.rates, "compressed": round(share, 4)}
        report["tasks"][name] = about | {"log": name != "text"}
        for optimizer in args.options:
            reference = None
            for way, stored in WAYS.items():
                title = f"{name} | {optimizer} | {way}"
                if way in args.ways:
                    row = measure(task, optimizer, stored, steps, points, seeds)
                elif args.quick:
                    continue
                else:
                    row = kept[title]
                reference = reference or row
                row["distance"] = compare(row, reference)
                report["rows"][title] = row
                print(table_line(title, row), f"({row['s']} s)", flush=True)
    for path in (args.output, args.figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report) + "\n")
    draw(report, args.figure)
    print(
        "", TABLE_HEAD, *(table_line(*row) for row in report["rows"].items()), sep="\n"
    )
    far = [
        f"{title}: {part} loss is {distance:+.1f} standard deviations from float32's"
        for title, row in report["rows"].items()
        for part, distance in row["distance"].items()
        if title.endswith(CHECKED) and not abs(distance) <= 2
    ]
    print(
        "", f"All losses are in {args.output}", *(far if args.check else []), sep="\n"
    )
    return bool(args.check and far)


if __name__ == "__main__":
    sys.exit(main())
