"""The kernels that the GPU compiler makes of a step, on a machine without a GPU.

A step is one update and apply of one 8192 x 8192 array, of 40 arrays of 150 thousand
numbers, or of 1000 arrays of 1000, with parameters and state donated. The bytes are
those of the kernels' operands and results; over the bandwidth of the GPU's memory they
are the least time that the step can take. The times are computed, not measured.

    pip install -e ".[gpu]"
    JAX_PLATFORMS=cpu python benchmarks/gpu.py
"""

import itertools
import sys
from typing import NamedTuple

import numpy as np
import optax
from jax.experimental import topologies

import compiled
from compiled import OPTIONS, PEERS, SHAPE
from optax_rmsprop import compress_state, rmsprop


class Gpu(NamedTuple):
    """What the compiler has to know: NVIDIA's data sheets, and CUDA's deviceQuery."""

    capability: int
    cores: int
    fpus_per_core: int
    shared_memory_per_core: int
    l2_cache: int
    clock_ghz: float
    memory: int
    bandwidth: float  # bytes a second


GPUS = {
    "A100": Gpu(8, 108, 64, 164 * 2**10, 40 * 2**20, 1.41, 80 * 10**9, 2.039e12),
    "H100": Gpu(9, 132, 128, 228 * 2**10, 50 * 2**20, 1.98, 80 * 10**9, 3.352e12),
    "B200": Gpu(10, 148, 128, 228 * 2**10, 126 * 2**20, 1.965, 180 * 10**9, 7.672e12),
}
# A GpuTargetConfigProto, https://github.com/openxla/xla. A block may use the shared
# memory of its core, less 1 KiB.
DESCRIPTION = """\
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {gpu.capability} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  shared_memory_per_core: {gpu.shared_memory_per_core}
  shared_memory_per_block_optin: {shared_memory_per_block}
  shared_memory_per_block: 49152
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {gpu.bandwidth:.0f}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  driver_version: "13.0.0"
}}
"""
COMPETITORS = PEERS | {
    f"ours-{dtype}": lambda dtype=dtype, **options: compress_state(
        rmsprop(0.01, **options), dtype
    )
    for dtype in ("bfloat16", "uint8")
}
# Bytes per parameter of one array.
LIMITS = {
    "ours": compiled.LIMITS,
    "ours-bfloat16": dict(zip(OPTIONS, (16, 20, 24), strict=True)),
    "ours-uint8": dict(zip(OPTIONS, (15, 18, 21.1), strict=True)),
}
LEAVES = {
    "1x67M": [SHAPE],
    "40x150k": [(300, 500)] * 40,
    "1000x1000": [(1000,)] * 1000,
}
TABLE_HEAD = """\
compiled for | leaves | options | by | kernels | of them 1 MiB or more | copies | \
bytes per parameter | scratch, KiB | least time, ms
---|---|---|---|---|---|---|---|---|---"""


def device(name):
    """A GPU that need not be there."""
    gpu = GPUS[name]
    text = DESCRIPTION.format(
        name=name, gpu=gpu, shared_memory_per_block=gpu.shared_memory_per_core - 2**10
    )
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=name, target_config=text, topology="1x1x1"
    )
    return topology.devices[0]


def measure(name, tx, shapes):
    program = compiled.compile_step(device(name), tx, shapes)
    kernels = list(compiled.traffic(program.as_text()))
    moved = sum(bytes_ for _, bytes_ in kernels)
    return {
        "kernels": len(kernels),
        "large_kernels": sum(bytes_ >= 2**20 for _, bytes_ in kernels),
        "copies": sum(operation == "copy" for operation, _ in kernels),
        "bytes_a_parameter": moved / sum(int(np.prod(x)) for x in shapes),
        "scratch_bytes": program.memory_analysis().temp_size_in_bytes,
        "least_s": moved / GPUS[name].bandwidth,
    }


def rows():
    for gpu, kind, peer, tx in compiled.rows_of_one_array(GPUS, COMPETITORS):
        yield f"{gpu} 1x67M {kind} {peer}", measure(gpu, tx, LEAVES["1x67M"])
    some = LEAVES["40x150k"]
    for kind, peer in itertools.product(["plain", "momentum"], COMPETITORS):
        tx = COMPETITORS[peer](**OPTIONS[kind])
        yield f"H100 40x150k {kind} {peer}", measure("H100", tx, some)
    many = {name: make() for name, make in PEERS.items()}
    many["ours-in-one-vector"] = optax.flatten(many["ours"])
    for peer, tx in many.items():
        row = measure("H100", tx, LEAVES["1000x1000"])
        yield f"H100 1000x1000 plain {peer}", row


def table_line(name, row):
    return (
        f"{' | '.join(name.split())} | {row['kernels']} | {row['large_kernels']} | "
        f"{row['copies']} | {row['bytes_a_parameter']:.1f} | "
        f"{row['scratch_bytes'] / 2**10:.0f} | {1e3 * row['least_s']:.3f}"
    )


def over_limits(rows):
    """Ours: a kernel for each array and one for the count, no copy.

    With one array the least bytes, with a small state too.
    """
    for name, row in rows.items():
        _, leaves, options, peer = name.split()
        limit = LIMITS.get(peer, {}).get(options)
        if leaves == "1x67M" and limit and round(row["bytes_a_parameter"], 1) > limit:
            yield f"{name}: over {limit} bytes: {row}"
        kernels = len(LEAVES[leaves]) + 1
        if peer == "ours" and (row["kernels"] > kernels or row["copies"]):
            yield f"{name}: over {kernels} kernels, or copies: {row}"


if __name__ == "__main__":
    arguments = "step-gpu-compiled.json", TABLE_HEAD, rows(), table_line, over_limits
    sys.exit(compiled.run(__doc__, *arguments))
