"""What the benchmarks share that compile for a device which this machine lacks."""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop import rmsprop
from step import environment

SHAPE = (8192, 8192)
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


def rows_of_one_array(devices, peers):
    """Device, options, peer and transformation; optax has no weight decay."""
    for device, kind, peer in itertools.product(devices, OPTIONS, peers):
        if peer != "optax" or "weight_decay" not in OPTIONS[kind]:
            yield device, kind, peer, peers[peer](**OPTIONS[kind])


def run(doc, record, table_head, rows, table_line, over_limits):
    """The command of a benchmark: print each row, write all, and check them.

    `rows` has names and figures.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    check = "exit 1 if a figure is over its limit"
    parser.add_argument("--check", action="store_true", help=check)
    default = pathlib.Path(__file__).parent / "results" / record
    parser.add_argument("--output", type=pathlib.Path, default=default)
    args = parser.parse_args()
    report = {**environment(), "rows": {}}
    print(table_head)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name, row in rows:
        report["rows"][name] = row
        print(table_line(name, row), flush=True)
        # After every row, so that a run cut short leaves its rows.
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    failures = list(over_limits(report["rows"])) if args.check else []
    print(f"All figures are in {args.output}", *failures, sep="\n")
    return bool(failures)


@contextlib.contextmanager
def on(platform, options=None):
    """The process looks as on a machine with this platform, and these options set."""
    arguments = " ".join(f"--{name}={value}" for name, value in (options or {}).items())
    with (
        mock.patch.object(jax, "default_backend", return_value=platform),
        mock.patch.dict(os.environ, LIBTPU_INIT_ARGS=arguments),
    ):
        yield


def compile_step(device, tx, shape=SHAPE, dtype=jnp.float32, options=None):
    """The step of one array, or of a tree of them, given by their shapes.

    `options` are those of the compiler.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x, dtype),
        shape,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, jax.eval_shape(tx.init, params), params),
    )
    with on(device.platform, options):
        return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile(options)


ITEM_BYTES = {
    **{"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "s16": 2, "u16": 2},
    **{"s8": 1, "u8": 1, "pred": 1, "token": 0},
}
NO_TRAFFIC = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
INSTRUCTION = re.compile(
    r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, (.*))?$"
)


def instructions(computation):
    """Name, shape, operation, operands and attributes of each instruction."""
    for line in re.sub(r"/\*.*?\*/", "", computation).splitlines()[1:]:
        if found := INSTRUCTION.match(line):
            yield found.groups()


def names(operands):
    return [operand.strip().lstrip("%") for operand in operands.split(",")]


def sliced(computation):
    """The bytes that a computation reads of the parameters of which it takes slices."""
    body = list(instructions(computation))
    found = {}
    for name, _, operation, number, _ in body:
        if operation == "parameter":
            users = [x for x in body if name in names(x[3]) and x[2] != "parameter"]
            if users and all(x[2] == "slice" for x in users):
                found[int(number)] = sum(shape_bytes(x[1]) for x in users)
    return found


def traffic(program):
    """The operation and the bytes that it reads and writes, of each instruction.

    XLA's own "bytes accessed" counts a TPU's copies in VMEM too, where the compiler
    keeps an array of this size between two loops; their layouts have a memory space,
    S(1).
    """
    before, entry = program.split("ENTRY", 1)
    computations = {
        text.split(" ", 1)[0].lstrip("%"): text
        for text in re.split(r"\n(?=%\S+ \()", before)
    }
    shapes = {}
    for name, shape, operation, operands, attributes in instructions(entry):
        shapes[name] = shape
        if operation in NO_TRAFFIC or operation.endswith("-done"):
            continue
        if operation == "copy-start":  # its shape names the source again
            shape = re.findall(r"\w+\[[\d,]*\]\{[^}]*\}", shape)[0]
        called = re.search(r"calls=%([\w.-]+)", attributes or "")
        parts = sliced(computations[called[1]]) if called else {}
        read = [shape_bytes(shapes.get(x, "")) for x in names(operands)]
        read = [parts.get(i, whole) for i, whole in enumerate(read)]
        yield operation, shape_bytes(shape) + sum(read)


def moved_bytes(program):
    return sum(moved for _, moved in traffic(program))


def shape_bytes(shape):
    total = 0
    for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape):
        if "S(" not in layout:
            total += ITEM_BYTES[dtype] * int(
                np.prod([int(n or 1) for n in sizes.split(",")])
            )
    return total


def large(program, operations, least=2**20):
    """How many instructions of these kinds move so many bytes, or more."""
    return sum(
        operation in operations and moved >= least
        for operation, moved in traffic(program)
    )
