"""The cost of an optimizer state in host memory, as compiled for TPUs without a TPU.

A step trains 8 layers of 2048 x 2048 on a batch of 4096 rows, with parameters and state
donated. The state lies in host memory (`pinned_host`) and is moved to the device and
back in every step, as docs/scale.md shows. The bytes are those that the compiled update
moves over the link between host and chip. Over the speed of the link they are the time
that they take, and the tokens are those of a batch whose gradients take as long, with
6 operations per parameter and token at the chip's peak. Times are computed, not
measured.

Peaks, for v5e and float32, are the device memory of the compiled step: with the state
on the device; with it in host memory; that of the larger program where gradients and
update are two; and the same with one layer updated after another.

    pip install -e ".[tpu]"
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/offload.py
"""

import itertools
import re
import sys

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import compiled
import tpu
from optax_rmsprop import compress_state, rmsprop, state_shardings

LAYERS = [f"layer {i}" for i in range(8)]
WIDTH, BATCH = 2048, 4096
OPTIONS = {name: compiled.OPTIONS[name] for name in ("plain", "momentum")}
STATES = {
    "float32": lambda tx: tx,
    "bfloat16": lambda tx: compress_state(tx, "bfloat16"),
    "uint8": lambda tx: compress_state(tx, "uint8"),
}
# Bytes a second of a chip's link to its host, each way, by the table of
# https://jax-ml.github.io/scaling-book/tpus, and operations a second in bfloat16, by
# https://cloud.google.com/tpu/docs/v5e and /v6e.
LINKS = {"v5e:2x2": 1.6e10, "v6e:2x2": 3.2e10}
SPEEDS = {"v5e:2x2": 197e12, "v6e:2x2": 918e12}
LIMITS = {"float32": 8, "bfloat16": 4, "uint8": 2}  # bytes per parameter and slot
TABLE_HEAD = """\
compiled for | options | state | bytes per parameter | s per 10⁹ parameters | \
tokens whose gradients take as long | scratch on the device / state
---|---|---|---|---|---|---"""
PEAKS_TABLE_HEAD = """\
options | state on the device | in host memory | and in two programs | \
and a layer at a time
---|---|---|---|---"""


def loss(params, x):
    for kernel in params.values():
        x = jnp.tanh(x @ kernel)
    return (x**2).mean()


def in_host(shardings):
    return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), shardings)


def peak_bytes(program):
    memory = program.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes


def link_bytes(program):
    """The bytes of all copies to or from S(5), the memory of the host."""
    total = 0
    entry = program.as_text().split("ENTRY", 1)[1]
    for _, shape, operation, *_ in compiled.instructions(entry):
        if operation == "copy-start" and "S(5)" in shape:
            arrays = re.findall(r"\w+\[[\d,]*\]\{[^}]*\}", shape)
            total += max(map(compiled.shape_bytes, arrays))
    return total


def model(topology):
    """The parameters, and the inputs of the first layer."""
    mesh = Mesh(tpu.devices(topology)[:1], "data")
    whole = NamedSharding(mesh, PartitionSpec())
    kernel = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=whole)
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32, sharding=whole)
    return dict.fromkeys(LAYERS, kernel), x


def compile_step(tx, params, x=None, offload=in_host):
    """Compile a training step or, without inputs, an update with given gradients."""
    on_device = state_shardings(tx, params)
    stored = offload(on_device)

    def step(params, state, data):
        grads = data if x is None else jax.grad(loss)(params, data)
        state = jax.device_put(state, on_device)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        stored,
    )
    out = jax.tree.map(lambda p: p.sharding, params), stored
    step = jax.jit(step, out_shardings=out, donate_argnums=(0, 1))
    with compiled.on("tpu"):
        return step.lower(params, state, params if x is None else x).compile()


def peaks(topology, tx):
    """The device memory of a training step, in each of four ways."""
    params, x = model(topology)
    gradients = jax.jit(jax.grad(loss)).lower(params, x).compile()
    updates = compile_step(tx, params), compile_step(tx, params[LAYERS[0]])
    gradients, update, layer = map(peak_bytes, (gradients, *updates))
    # Other layers and their gradients stay on the device while one is updated.
    layer += 2 * 4 * WIDTH**2 * (len(LAYERS) - 1)
    return {
        "on the device": peak_bytes(compile_step(tx, params, x, lambda s: s)),
        "in host memory": peak_bytes(compile_step(tx, params, x)),
        "and in two programs": max(gradients, update),
        "and a layer at a time": max(gradients, layer),
    }


def measure(topology, tx):
    params, _ = model(topology)
    update = compile_step(tx, params)
    moved = link_bytes(update) / (len(LAYERS) * WIDTH**2)
    memory = update.memory_analysis()
    seconds = moved / LINKS[topology]
    return {
        "link_bytes_a_parameter": moved,
        "s_a_parameter": seconds,
        "tokens": seconds * SPEEDS[topology] / 6,
        "scratch_of_state": memory.temp_size_in_bytes
        / memory.host_argument_size_in_bytes,
    }


def table_line(name, row):
    return (
        f"{' | '.join(name.split())} | {row['link_bytes_a_parameter']:.1f} | "
        f"{1e9 * row['s_a_parameter']:.3f} | {row['tokens']:.0f} | "
        f"{row['scratch_of_state']:.2f}"
    )


def peaks_line(name, row):
    sizes = [f"{size / 2**20:.0f}" for size in row["peak_bytes"].values()]
    return " | ".join([name.split()[1], *sizes])


def over_limits(rows):
    for name, row in rows.items():
        _, options, state = name.split()
        limit = LIMITS[state] * (1 + len(OPTIONS[options]))
        if round(row["link_bytes_a_parameter"], 1) > limit:
            yield f"{name}: over {limit} bytes per parameter: {row}"


def rows():
    cases = itertools.product(LINKS, OPTIONS.items(), STATES.items())
    for topology, (kind, options), (state, stored) in cases:
        tx = stored(rmsprop(0.01, **options))
        row = measure(topology, tx)
        if (topology, state) == ("v5e:2x2", "float32"):
            row["peak_bytes"] = peaks(topology, tx)
        yield f"{topology} {kind} {state}", row


if __name__ == "__main__":
    record = "offload-tpu.json"
    sys.exit(compiled.run(__doc__, record, TABLE_HEAD, rows(), table_line, over_limits))
