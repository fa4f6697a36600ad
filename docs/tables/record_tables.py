"""The tables of benchmarks.md and low_precision.md, from recorded measurements."""

import json
from pathlib import Path

import carry
import gpu
import many_leaves
import offload
import small_state
import small_state_cost
import step
import tpu
from generated import rows_of, table

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "uint8": "uint8",
    "flashoptim": "flashoptim",
    "bitsandbytes": "bitsandbytes",
    "bfloat16": "bfloat16",
}
SIZES = {
    (0.0, "every parameter"): "alike",
    (1.0, "every parameter"): "one octave, by parameter",
    (2.0, "every parameter"): "two octaves, by parameter",
    (2.0, "every row"): "two octaves, by row",
}


def register(name, head, line, *, record=None, part="rows"):
    """A table whose head and lines the benchmark itself also prints."""

    @table(name)
    def recorded(language):
        path = ROOT / "benchmarks" / "results" / f"{record or name}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))[part]
        return "\n".join([head, *(line(*row) for row in rows.items())])


register("step-cpu", step.TABLE_HEAD, step.table_line)
register("step-single_pass", step.TABLE_HEAD, step.table_line)
register("step-gpu", step.TABLE_HEAD, step.table_line)
register("step-gpu-compiled", gpu.TABLE_HEAD, gpu.table_line)
register("step-tpu", tpu.TABLE_HEAD, tpu.table_line)
register("offload-tpu", offload.TABLE_HEAD, offload.table_line)
register("carry", carry.TABLE_HEAD, carry.table_line)
register(
    "carry_small",
    carry.SMALL_TABLE_HEAD,
    carry.small_table_line,
    record="carry",
    part="small",
)
register("many_leaves", many_leaves.TABLE_HEAD, many_leaves.table_line)
register("small_state", small_state.TABLE_HEAD, small_state.table_line)
cost = small_state_cost
register("small_state_cost-cpu", cost.TABLE_HEAD, cost.table_line)
register("small_state_cost-tpu", cost.TPU_TABLE_HEAD, cost.tpu_table_line)


@table("offload-peaks")
def offload_peaks(language):
    path = ROOT / "benchmarks" / "results" / "offload-tpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found = [x for x in rows.items() if "peak_bytes" in x[1]]
    lines = (offload.peaks_line(*row) for row in found)
    return "\n".join([offload.PEAKS_TABLE_HEAD, *lines])


@table("state_error")
def state_error(language):
    """Errors of √nu by how the sizes of gradients differ."""
    path = ROOT / "docs" / "figures" / "state_error.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for (sizes, order), name_of_sizes in SIZES.items():
        for method, name in METHODS.items():
            key = sizes, order, method
            cells = [
                error_cell(row)
                for row in found
                if (row["octaves"], row["sizes of"], row["method"]) == key
            ]
            rows.append([name_of_sizes, name, *cells])
    head = ["sizes of gradients", "error of √nu, root mean square (mean)"]
    return rows_of([*head, "decay 0.9", "0.99", "0.999"], rows)


def error_cell(row):
    mean = round(row["mean error, %"], 1) or 0.0
    return f"{row['rms error, %']:.2f} % ({mean:+.1f})".replace("+0.0", "0.0")
