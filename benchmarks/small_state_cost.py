"""The cost of a step with its state in bfloat16 or uint8, against float32.

On the device of JAX: the time of a jitted update and apply with donated buffers, in
turns with float32's, and the bytes of the state's arrays. A program makes one step, or
ten as in `lax.scan`: with a small state it has temporary arrays, and on a CPU most of
its time may be the system's, which clears them for every call.

With --tpu instead what the TPU compiler makes of a step of one 8192 x 8192 array, on a
machine without a TPU: the bytes that it moves to and from HBM, and its scratch memory.
"joined" is compiled with the option that lets XLA join the loops. In the last columns
parameters and gradients are in bfloat16, with the corrections of `master_weights` in
int8 or int16 and the state in float32.

    python benchmarks/small_state_cost.py
    pip install -e ".[tpu]"
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/small_state_cost.py --tpu
"""

import argparse
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import compiled
import tpu
from optax_rmsprop import compress_state, rmsprop
from optax_rmsprop.wrappers import master_weights
from step import (
    HYPERPARAMETERS,
    JaxSteps,
    environment,
    random_numbers,
    spread,
    take_turns,
)

LEAVES = {"1x32M": (1, (4000, 8000)), "160x150k": (160, (300, 500))}
QUICK_LEAVES = {"2x4k": (2, (64, 64))}
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered+momentum": {"centered": True, "momentum": 0.9},
}
WITH_DECAY = {"momentum+decay": {"momentum": 0.9, "weight_decay": 1e-4}}
ON_TPU = OPTIONS | WITH_DECAY | compiled.OPTIONS
STATES = ("bfloat16", "uint8")
CORRECTIONS = ("int8", "int16")
# --check accepts 1 MiB of scratch, and these bytes per parameter to and from HBM: each
# array once.
LIMITS = {
    "bfloat16": dict(zip(ON_TPU, (16, 20, 24, 20, 24), strict=True)),
    "uint8": {"plain": 14},
    "uint8 joined": dict(zip(ON_TPU, (14, 16, 18, 16, 18), strict=True)),
}
TIME_LIMIT = 1.5  # of a step in float32
STEPS_A_CALL = (1, 10)
TABLE_HEAD = """\
leaves | options | steps per call | float32, ms per step | bfloat16 / float32 | \
uint8 / float32 | state, bytes per parameter
---|---|---|---|---|---|---"""
TPU_TABLE_HEAD = """\
compiled for | options | float32 | bfloat16 | uint8 | uint8 joined | \
bfloat16 parameters, int8 | bfloat16 parameters, int16
---|---|---|---|---|---|---|---"""


def transforms(options):
    exact = rmsprop(*HYPERPARAMETERS, **options)
    small = {dtype: compress_state(exact, dtype) for dtype in STATES}
    return {"float32": exact, **small}


def state_bytes(tx, params):
    state = jax.eval_shape(tx.init, params)
    return sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(state))


def measure(count, shape, options, loop, rounds, reps):
    """Ratios of the time of a step to float32's, and the size of the state."""
    params, gradient_sets = jax.tree.map(jnp.array, random_numbers(count, shape))
    txs = transforms(options)
    medians = {name: [] for name in txs}
    ratios = {name: [] for name in STATES}
    for r in range(rounds):
        for dtype in STATES:
            order = ["float32", dtype][:: -1 if r % 2 else 1]
            steps = {n: JaxSteps(txs[n], params, gradient_sets, loop) for n in order}
            seconds = take_turns(steps, reps, steps=1)
            ratios[dtype].append(
                float(np.median(np.divide(seconds[dtype], seconds["float32"])))
            )
            for name, times in seconds.items():
                medians[name].append(float(np.median(times)) / loop)
            del steps
    size = count * int(np.prod(shape))
    return {
        "step_s": {name: spread(times) for name, times in medians.items()},
        "ratio_to_float32": {name: spread(values) for name, values in ratios.items()},
        "state_bytes_a_parameter": {
            name: state_bytes(tx, params) / size for name, tx in txs.items()
        },
    }


def table_line(name, row):
    form = "{mean:.2f} [{min:.2f}, {max:.2f}]"
    ratios = [form.format(**row["ratio_to_float32"][dtype]) for dtype in STATES]
    sizes = " / ".join(f"{x:.2f}" for x in row["state_bytes_a_parameter"].values())
    milliseconds = f"{1e3 * row['step_s']['float32']['mean']:.1f}"
    return " | ".join([*name.split(), milliseconds, *ratios, sizes])


def tpu_table_line(name, row):
    cells = [
        f"{x['hbm_bytes_a_parameter']:.1f}"
        + (
            f", scratch {x['scratch_bytes'] / 2**20:.0f} MiB"
            * (x["scratch_bytes"] > 2**20)
        )
        for x in row.values()
    ]
    return " | ".join([*name.split(), *cells])


def over_limits(rows):
    for name, row in rows.items():
        if "uint8" in row:
            for state, limits in LIMITS.items():
                limit, cell = limits.get(name.split()[1]), row[state]
                bytes_, scratch = cell["hbm_bytes_a_parameter"], cell["scratch_bytes"]
                if limit and (round(bytes_, 1) > limit or scratch > 2**20):
                    yield (
                        f"{name} {state}: {bytes_:.2f} bytes, limit {limit}; "
                        f"scratch {scratch}"
                    )
        elif (ratio := row["ratio_to_float32"]["uint8"]["mean"]) > TIME_LIMIT:
            yield f"{name}: {ratio:.2f} of float32's time, over {TIME_LIMIT}"


def times(args):
    """Names and measurements of the rows on the device of JAX."""
    sizes = QUICK_LEAVES if args.quick else LEAVES
    kinds = ["momentum"] if args.quick else OPTIONS
    loops = STEPS_A_CALL[:1] if args.quick else STEPS_A_CALL
    for leaves, kind, loop in itertools.product(sizes, kinds, loops):
        options = OPTIONS[kind], loop, args.rounds, args.reps
        yield f"{leaves} {kind} {loop}", measure(*sizes[leaves], *options)


def compilations():
    """Names and measurements of the rows for TPUs."""
    for topology, (kind, options) in itertools.product(tpu.BANDWIDTHS, ON_TPU.items()):
        txs = transforms(options)
        row = {name: tpu.measure(topology, tx) for name, tx in txs.items()}
        row["uint8 joined"] = tpu.measure(topology, txs["uint8"], options=tpu.JOIN)
        for dtype in CORRECTIONS:
            tx = master_weights(rmsprop(*HYPERPARAMETERS, **options), dtype)
            row[dtype] = tpu.measure(topology, tx, jnp.bfloat16)
        yield f"{topology} {kind}", row


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="small arrays, momentum, one step a call: a trial run",
    )
    add("--tpu", action="store_true", help=f"compile for {', '.join(tpu.BANDWIDTHS)}")
    add("--rounds", type=int, default=2, help="rounds a row, even (2)")
    add("--reps", type=int, default=3, help="turns a round (3)")
    add("--check", action="store_true", help="exit 1 if a figure is over its limit")
    help_ = "JSON file (results/small_state_cost-BACKEND.json beside this script)"
    add("--output", type=pathlib.Path, help=help_)
    args = parser.parse_args()
    if args.quick and not args.output:
        parser.error("--quick needs --output: it is no record")
    backend = "tpu" if args.tpu else jax.default_backend()
    path = (
        pathlib.Path(__file__).parent / "results" / f"small_state_cost-{backend}.json"
    )
    output = args.output or path
    head, line, rows = TABLE_HEAD, table_line, times(args)
    if args.tpu:
        head, line, rows = TPU_TABLE_HEAD, tpu_table_line, compilations()
    report = {**environment(), "rounds": args.rounds, "reps": args.reps, "rows": {}}
    print(head)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, row in rows:
        report["rows"][name] = row
        print(line(name, row), flush=True)
        # After every row, so that a run cut short leaves its rows.
        output.write_text(json.dumps(report, indent=1) + "\n")
    failures = list(over_limits(report["rows"])) if args.check else []
    print(f"All figures are in {output}", *failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
