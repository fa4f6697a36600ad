"""The programs that the TPU compiler makes of a step, on a machine without a TPU.

A step is one update and apply of one 8192 x 8192 array, with parameters and state
donated. The bytes are those that the compiled program moves to and from HBM; over the
chip's HBM bandwidth they are the least time that the step can take (its roofline, since
an optimizer's arithmetic is little). The times are computed, not measured.

    pip install -e ".[tpu]"
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/tpu.py
"""

import argparse
import itertools
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies

from optax_rmsprop import rmsprop
from step import environment

SHAPE = (8192, 8192)
# Bytes a second of one chip's HBM, https://cloud.google.com/tpu/docs/v5e and /v6e.
BANDWIDTHS = {"v5e:2x2": 819e9, "v6e:2x2": 1640e9}
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered+momentum+decay": {
        "centered": True,
        "momentum": 0.9,
        "weight_decay": 1e-4,
    },
}
LIMITS = {"plain": 20, "momentum": 28, "centered+momentum+decay": 36}
PEERS = {
    "optax": lambda **options: optax.rmsprop(0.01, **options),
    "ours": lambda **options: rmsprop(0.01, **options),
}
TABLE_HEAD = """\
compiled for | options | by | loops | bytes per parameter | scratch, KiB | \
least time, ms
---|---|---|---|---|---|---"""


def devices(topology):
    """The devices of a slice that need not be there."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compile_step(topology, tx, shape=SHAPE):
    """The step of one array, or of a tree of them, given by their shapes."""
    sharding = jax.sharding.SingleDeviceSharding(devices(topology)[0])

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x, jnp.float32),
        shape,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, jax.eval_shape(tx.init, params), params),
    )
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


ITEM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u16": 2, "u8": 1, "pred": 1}
NO_TRAFFIC = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}


def instructions(program):
    """Name, shape, operation and operands of each instruction of the entry."""
    entry = re.sub(r"/\*.*?\*/", "", program[program.index("ENTRY") :])
    pattern = r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, |$)"
    for line in entry.splitlines()[1:]:
        if found := re.match(pattern, line):
            yield found.groups()


def hbm_bytes(program):
    """The bytes that the instructions of a TPU program read from and write to HBM.

    XLA's own "bytes accessed" counts the copies in VMEM too, where the compiler keeps
    an array of this size between two loops; their layouts have a memory space, S(1).
    """
    shapes, total = {}, 0
    for name, shape, operation, operands in instructions(program):
        shapes[name] = shape
        if operation in NO_TRAFFIC or operation.endswith("-done"):
            continue
        if operation == "copy-start":  # its shape names the source again
            shape = re.findall(r"\w+\[[\d,]*\]\{[^}]*\}", shape)[0]
        read = [shapes.get(x.strip().lstrip("%"), "") for x in operands.split(",")]
        total += sum(map(shape_bytes, [shape, *read]))
    return total


def shape_bytes(shape):
    total = 0
    for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape):
        if dtype in ITEM_BYTES and "S(" not in layout:
            total += ITEM_BYTES[dtype] * int(
                np.prod([int(n or 1) for n in sizes.split(",")])
            )
    return total


def large(program, operations, least=2**20):
    """How many instructions of these kinds make arrays of so many bytes, or more."""
    return sum(
        operation in operations and shape_bytes(shape) >= least
        for _, shape, operation, _ in instructions(program)
    )


def measure(topology, tx):
    compiled = compile_step(topology, tx)
    program = compiled.as_text()
    moved = hbm_bytes(program)
    return {
        "loops": large(program, {"fusion"}),
        "hbm_bytes_a_parameter": moved / np.prod(SHAPE),
        "scratch_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "least_s": moved / BANDWIDTHS[topology],
    }


def table_line(name, row):
    return (
        f"{' | '.join(name.split())} | {row['loops']} | "
        f"{row['hbm_bytes_a_parameter']:.1f} | {row['scratch_bytes'] / 2**10:.0f} | "
        f"{1e3 * row['least_s']:.2f}"
    )


def over_limits(rows):
    for name, row in rows.items():
        _, options, peer = name.split()
        over = round(row["hbm_bytes_a_parameter"], 2) > LIMITS[options]
        if peer == "ours" and (over or row["scratch_bytes"] > 2**20):
            yield f"{name}: over {LIMITS[options]} bytes or 1 MiB of scratch: {row}"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    check = "exit 1 if a figure is over its limit"
    parser.add_argument("--check", action="store_true", help=check)
    default = pathlib.Path(__file__).parent / "results" / "step-tpu.json"
    parser.add_argument("--output", type=pathlib.Path, default=default)
    args = parser.parse_args()
    report = {**environment(), "shape": SHAPE, "rows": {}}
    print(TABLE_HEAD)
    for topology, kind, peer in itertools.product(BANDWIDTHS, OPTIONS, PEERS):
        options = dict(OPTIONS[kind])
        if peer == "optax" and options.pop("weight_decay", 0):
            continue  # it has none
        row = measure(topology, PEERS[peer](**options))
        name = f"{topology} {kind} {peer}"
        report["rows"][name] = row
        print(table_line(name, row), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    failures = list(over_limits(report["rows"])) if args.check else []
    print(f"All figures are in {args.output}", *failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
