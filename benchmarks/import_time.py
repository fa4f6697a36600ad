"""Time what `import optax_rmsprop` adds to `import optax`.

Half of the processes import optax, the other half optax and then optax_rmsprop, in
turns; a first process of each fills the caches and is not counted. The time is that of
the second import in its process, its median over processes. The difference of whole
processes, from start to exit, confirms it with more noise.

Modules that optax_rmsprop brings and optax does not are listed, and torch, flax and
chex may not be among them.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata

LIMIT_MS = 50
UNWANTED = {"torch", "flax", "chex"}
OPTAX = """
import gc, json, sys, time
import optax
gc.collect()
"""
# Without the collection, one of 60 ms, of what optax left, may fall due in our time.
BOTH = """
before = set(sys.modules)
start = time.perf_counter()
import optax_rmsprop
seconds = time.perf_counter() - start
brought = {name.partition(".")[0] for name in set(sys.modules) - before}
version = optax_rmsprop.__version__
print(json.dumps({"seconds": seconds, "modules": sorted(brought), "version": version}))
"""


def run(code):
    """Output of a fresh process, and the seconds from its start to its exit."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout, time.perf_counter() - start


def measure(pairs):
    import_s, process_s = [], {"optax": [], "both": []}
    for pair in range(-1, pairs):
        _, optax_s = run(OPTAX)
        output, both_s = run(OPTAX + BOTH)
        second = json.loads(output)
        if pair >= 0:
            import_s.append(second["seconds"])
            process_s["optax"].append(optax_s)
            process_s["both"].append(both_s)
    return second["version"], {
        "modules": second["modules"],
        "import_s": import_s,
        "process_s": process_s,
    }


def spread_ms(seconds):
    values = statistics.median(seconds), min(seconds), max(seconds)
    return "{:.1f} ms [{:.1f}, {:.1f}]".format(*(1e3 * s for s in values))


def parse_arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--pairs", type=int, default=11, help="processes of either kind (11)")
    path = pathlib.Path(__file__).parent / "results" / "import_time.json"
    help_ = "JSON file for every time (results/import_time.json beside this script)"
    add("--output", type=pathlib.Path, default=path, help=help_)
    help_ = f"exit 1 over {LIMIT_MS} ms, or if torch, flax or chex is imported"
    add("--check", action="store_true", help=help_)
    return parser.parse_args()


def main():
    args = parse_arguments()
    load_average = os.getloadavg()[0]
    version, measured = measure(args.pairs)
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {**versions, "optax_rmsprop": version},
        "cores": os.cpu_count(),
        "load_average_at_start": load_average,
        # Where it is not, each import compiles the package: a few milliseconds more.
        "bytecode_cached": not sys.dont_write_bytecode,
        **measured,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    import_s, process_s = report["import_s"], report["process_s"]
    pairs = zip(process_s["both"], process_s["optax"], strict=True)
    print(f"import optax_rmsprop after optax: {spread_ms(import_s)}")
    print(f"difference of whole processes:    {spread_ms([b - o for b, o in pairs])}")
    print(f"whole process of import optax:    {spread_ms(process_s['optax'])}")
    print(f"modules brought: {', '.join(report['modules'])}")
    print(f"All times are in {args.output}")
    unwanted = UNWANTED.intersection(report["modules"])
    over = 1e3 * statistics.median(import_s) > LIMIT_MS
    return bool(args.check and (over or unwanted))


if __name__ == "__main__":
    sys.exit(main())
