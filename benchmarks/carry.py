"""Time carrying a run of 100 million parameters from torch to JAX and back.

Each row is a process of its own, so that its peak of memory is its own. The model is a
stack of linear layers with momentum, or without; every kernel is transposed on the way.
Memory is the most that the process had at once (the run in torch, the run in JAX, and
what carrying needs), beyond what it had before the model was made, as a multiple of the
run's own size: its parameters and slots.

Then a run of 950 small parameters, no two of the same shape, in one group and in a
group each. Tracing is that of the update.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import sys
import time

OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered+momentum": {"momentum": 0.9, "centered": True},
}
WIDTH = 1000
SMALL_LAYERS = 475
LIMITS = {"there_s": 10.0, "back_s": 10.0, "memory": 4.0}
LIMIT_OF_GROUPS = 1.5  # times the seconds of one group
TABLE_HEAD = """\
options | parameters | there, s | back, s | memory / own size
---|---|---|---|---"""
SMALL_TABLE_HEAD = """groups | there, s | trace, s | back, s
---|---|---|---"""


def peak():
    """The most memory that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(options, layers):
    """Carry there and back once, in this process."""
    import jax
    import torch

    from optax_rmsprop import from_torch, to_torch, torch_layers

    def port(weights):
        return {str(i): torch_layers.linear(weights, str(i)) for i in range(layers)}

    def run(layers):
        model = torch.nn.Sequential(
            *(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        )
        optimizer = torch.optim.RMSprop(model.parameters(), foreach=False, **options)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        return model, optimizer

    jax.block_until_ready(jax.numpy.zeros(1))  # starts the backend
    before = peak()
    model, optimizer = run(layers)
    start = time.perf_counter()
    params, _, state = from_torch(model, optimizer, port)
    jax.block_until_ready((params, state))
    middle = time.perf_counter()
    to_torch(params, state, model, optimizer, port)
    end = time.perf_counter()
    parameters = sum(p.numel() for p in model.parameters())
    slots = 1 + bool(options.get("momentum")) + options.get("centered", False)
    return {
        "parameters": parameters,
        "there_s": middle - start,
        "back_s": end - middle,
        "memory": (peak() - before) / (4 * parameters * (1 + slots)),
        "versions": {m.__name__: str(m.__version__) for m in (jax, torch)},
    }


def measure_small(group_each, rounds=3):
    """Carry many small parameters there and back.

    There: the seconds of the first time, when nothing is compiled. Trace and back: the
    least of some rounds.
    """
    import jax
    import torch

    from optax_rmsprop import from_torch, to_torch

    model = torch.nn.Sequential(
        *(torch.nn.Linear(8, 8 + i) for i in range(SMALL_LAYERS))
    )
    parameters = list(model.parameters())
    groups = [{"params": [p]} for p in parameters] if group_each else parameters
    optimizer = torch.optim.RMSprop(groups, momentum=0.9, foreach=False)
    for p in parameters:
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    jax.clear_caches()
    start = time.perf_counter()
    params, tx, state = from_torch(model, optimizer, dict)
    jax.block_until_ready((params, state))
    there = time.perf_counter() - start
    trace, back = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.jit(lambda *tree: tx.update(*tree)).trace(params, state, params)
        middle = time.perf_counter()
        to_torch(params, state, model, optimizer, dict)
        trace.append(middle - start)
        back.append(time.perf_counter() - middle)
    return {"there_s": there, "trace_s": min(trace), "back_s": min(back)}


def table_line(name, row):
    return (
        f"{name} | {row['parameters'] / 1e6:.0f} million | {row['there_s']:.1f} | "
        f"{row['back_s']:.1f} | {row['memory']:.2f}"
    )


def small_table_line(name, row):
    return " | ".join([name, *(f"{seconds:.2f}" for seconds in row.values())])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=100, help="of a million parameters each (100)")
    path = pathlib.Path(__file__).parent / "results" / "carry.json"
    help_ = "JSON file (results/carry.json beside this script)"
    add("--output", type=pathlib.Path, default=path, help=help_)
    add("--check", action="store_true", help=f"exit 1 if one is over {LIMITS}")
    args = parser.parse_args()
    report = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average_at_start": os.getloadavg()[0],
        "rows": {},
    }
    print(TABLE_HEAD)
    for name, options in OPTIONS.items():
        with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn")
        ) as pool:
            row = pool.submit(measure, options, args.layers).result()
        report["rows"][name] = row
        print(table_line(name, row), flush=True)
    report["small"] = small = {
        "1": measure_small(group_each=False),
        str(2 * SMALL_LAYERS): measure_small(group_each=True),
    }
    print("", SMALL_TABLE_HEAD, sep="\n")
    for name, row in small.items():
        print(small_table_line(name, row))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    over = [
        f"{name}: {what} is {row[what]:.2f}, over {limit}"
        for name, row in report["rows"].items()
        for what, limit in LIMITS.items()
        if not row[what] <= limit
    ]
    one, each = small.values()
    over += [
        f"{what} of a group each is {each[what] / one[what]:.2f} of one group's"
        for what in one
        if not each[what] <= LIMIT_OF_GROUPS * one[what]
    ]
    print(f"All figures are in {args.output}", *(over if args.check else []), sep="\n")
    return bool(args.check and over)


if __name__ == "__main__":
    sys.exit(main())
