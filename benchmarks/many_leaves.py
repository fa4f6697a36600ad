"""Build and run a step of many small arrays: ours, optax's, and ours in one vector.

A step of thousands of arrays costs by the array, not by the number of parameters.
`optax.flatten` around `rmsprop` keeps the state in one vector: the update is one loop,
but gradients are joined before it and updates cut apart behind it. Gradient descent
beside them, without any state, is what the parameters alone cost.

    python benchmarks/many_leaves.py
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop import rmsprop
from step import (
    HYPERPARAMETERS,
    OPTIONS,
    JaxSteps,
    environment,
    in_optax,
    random_numbers,
    spread,
    take_turns,
)

SIZE = 1000
TABLE_HEAD = """\
arrays | options | optax: build, s | step, ms | ours / optax: build | step | \
in one vector / optax: build | step | gradient descent / optax: build | step
---|---|---|---|---|---|---|---|---|---"""


def transforms(options):
    ours = rmsprop(*HYPERPARAMETERS, **options)
    theirs = in_optax(options)
    return {
        "optax": theirs,
        "ours": ours,
        "in one vector": optax.flatten(ours),
        "gradient descent": optax.sgd(HYPERPARAMETERS[0]),
    }


def measure(count, options, rounds, reps):
    params, gradient_sets = jax.tree.map(jnp.array, random_numbers(count, SIZE))
    txs = transforms(options)
    build, step = {name: [] for name in txs}, {name: [] for name in txs}
    for r in range(rounds):
        jax.clear_caches()  # so that tracing starts from nothing
        order = list(txs)[:: -1 if r % 2 else 1]
        steps = {name: JaxSteps(txs[name], params, gradient_sets) for name in order}
        for name, times in take_turns(steps, reps, steps=1).items():
            build[name].append(sum(steps[name].build_s.values()))
            step[name].append(float(np.median(times)))
        del steps
    return {
        name: {"build_s": spread(build[name]), "step_s": spread(step[name])}
        for name in txs
    }


def table_line(name, row):
    base = row["optax"]
    cells = [f"{base['build_s']['mean']:.1f}", f"{1e3 * base['step_s']['mean']:.1f}"]
    for peer in list(row)[1:]:
        for what in ("build_s", "step_s"):
            cells.append(f"{row[peer][what]['mean'] / base[what]['mean']:.2f}")
    return " | ".join([*name.split(), *cells])


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--counts", type=int, nargs="+", default=[1000, 5000], help="of arrays")
    add("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    add("--rounds", type=int, default=2, help="even, to favour no order (2)")
    add("--reps", type=int, default=15, help="turns a round (15)")
    default = pathlib.Path(__file__).parent / "results" / "many_leaves.json"
    add("--output", type=pathlib.Path, default=default)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    report = {**environment(), "rounds": args.rounds, "reps": args.reps, "rows": {}}
    print(TABLE_HEAD)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for count in args.counts:
        for kind in args.options:
            name = f"{count} {kind}"
            row = measure(count, OPTIONS[kind], args.rounds, args.reps)
            report["rows"][name] = row
            print(table_line(name, row), flush=True)
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"All figures are in {args.output}")


if __name__ == "__main__":
    main()
