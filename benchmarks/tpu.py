"""The programs that the TPU compiler makes of a step, on a machine without a TPU.

A step is one update and apply of one 8192 x 8192 array, with parameters and state
donated. The bytes are those that the compiled program moves to and from HBM; over the
chip's HBM bandwidth they are the least time that the step can take (its roofline, since
an optimizer's arithmetic is little). The times are computed, not measured.

    pip install -e ".[tpu]"
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/tpu.py
"""

import sys

import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from compiled import (
    LIMITS,
    PEERS,
    SHAPE,
    compile_step,
    large,
    moved_bytes,
    rows_of_one_array,
    run,
)

# Bytes a second of one chip's HBM, https://cloud.google.com/tpu/docs/v5e and /v6e.
BANDWIDTHS = {"v5e:2x2": 819e9, "v6e:2x2": 1640e9}
# So that XLA may join the loops of small states, in one of up to 64 operands.
JOIN = {"xla_tpu_multioutput_fusion_max_operands": "64"}
TABLE_HEAD = """\
compiled for | options | by | loops | bytes per parameter | scratch, KiB | \
least time, ms
---|---|---|---|---|---|---"""


def devices(topology):
    """The devices of a slice that need not be there."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def measure(topology, tx, dtype=jnp.float32, options=None):
    compiled = compile_step(devices(topology)[0], tx, dtype=dtype, options=options)
    program = compiled.as_text()
    moved = moved_bytes(program)
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


def rows():
    for topology, kind, peer, tx in rows_of_one_array(BANDWIDTHS, PEERS):
        yield f"{topology} {kind} {peer}", measure(topology, tx)


if __name__ == "__main__":
    sys.exit(run(__doc__, "step-tpu.json", TABLE_HEAD, rows(), table_line, over_limits))
