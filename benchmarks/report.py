"""Redraw the tables and figures of the benchmarks from their records.

    python benchmarks/report.py

Every table of benchmarks/README.md and docs/scale.md that has a record in
benchmarks/results is made anew, and results/step-BACKEND.png from step-BACKEND.json.
"""

import json
import re
from pathlib import Path

import carry
import many_leaves
import matplotlib
import small_state
import small_state_cost
import step
import tpu

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
PAGES = FOLDER / "README.md", FOLDER.parent / "docs" / "scale.md"
# The record, the first lines of its table, and what makes the others.
TABLES = {
    "step-cpu": (step.TABLE_HEAD, step.table_line),
    "step-gpu": (step.TABLE_HEAD, step.table_line),
    "step-tpu": (tpu.TABLE_HEAD, tpu.table_line),
    "carry": (carry.TABLE_HEAD, carry.table_line),
    "many_leaves": (many_leaves.TABLE_HEAD, many_leaves.table_line),
    "small_state": (small_state.TABLE_HEAD, small_state.table_line),
    "small_state_cost-cpu": (
        small_state_cost.TABLE_HEAD,
        small_state_cost.table_line,
    ),
    "small_state_cost-tpu": (
        small_state_cost.TPU_TABLE_HEAD,
        small_state_cost.tpu_table_line,
    ),
}


def record(name):
    path = FOLDER / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(name):
    head, line = TABLES[name]
    return "\n".join([head, *(line(*row) for row in record(name)["rows"].items())])


def in_page(text):
    """The page, with every first table after a link to a record made anew."""
    blocks, name = text.rstrip("\n").split("\n\n"), None
    for i, block in enumerate(blocks):
        if name and re.match(r".+\n-+\|", block):
            blocks[i], name = table(name), None
        elif links := re.findall(r"results/([\w-]+)\.json\)", block):
            name = next((n for n in links if n in TABLES), name)
    return "\n\n".join(blocks) + "\n"


def draw(name):
    """The time of every competitor, as a multiple of ours."""
    rows = record(name)["rows"]
    figure, panels = plt.subplots(
        1, len(rows), figsize=(2.2 * len(rows), 3.2), layout="constrained", sharey=True
    )
    for axes, (row, found) in zip(panels, rows.items(), strict=True):
        ratios = found["summary"]["ratio_to"]
        times = {p: 1 / ratios[p]["mean"] for p in step.PEERS if p in ratios}
        names = ["ours", *times]
        colors = ["tab:blue", *["tab:gray"] * len(times)]
        axes.barh(names, [1, *times.values()], color=colors)
        axes.axvline(1, color="tab:blue", linewidth=1)
        axes.set(title=row.replace(" ", "\n"), xlabel="time / ours")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(FOLDER / "results" / f"{name}.png", dpi=150)
    plt.close(figure)


def main():
    for page in PAGES:
        page.write_text(in_page(page.read_text()))
    for name in ("step-cpu", "step-gpu"):
        if record(name):
            draw(name)


if __name__ == "__main__":
    main()
