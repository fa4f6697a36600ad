"""Redraw the tables and figures of the benchmarks from their records.

    python benchmarks/report.py

Every table of docs/benchmarks.md and docs/scale.md that has a record in
benchmarks/results is made anew, and results/step-BACKEND.png for CPU, GPU and TPU.
"""

import json
import re
from pathlib import Path

import many_leaves
import matplotlib
import small_state
import small_state_cost
import step
import tpu

import carry

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent / "docs"
PAGES = DOCS / "benchmarks.md", DOCS / "scale.md"
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


def draw_times(name):
    """The time of every competitor, as a multiple of ours."""
    rows = record(name)["rows"]
    size = {"figsize": (9, 3), "sharex": True, "sharey": True}
    figure, panels = plt.subplots(1, len(rows), **size)
    for axes, (row, found) in zip(panels, rows.items(), strict=True):
        ratios = found["summary"]["ratio_to"]
        # What was not measured has no bar.
        times = [1 / ratios[p]["mean"] if p in ratios else np.nan for p in step.PEERS]
        colors = ["C0", *["C5"] * len(times)]
        axes.barh(["ours", *step.PEERS], [1, *times], color=colors)
        axes.axvline(1, color="C0", linewidth=1)
        title = row.replace(" ", "\n").replace("+", "\n+ ")
        axes.set(title=title, xlabel="time / ours")
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    return figure


def draw_traffic(name):
    """The bytes that a compiled step moves, and the least time that they take."""
    rows = {tuple(row.split()): found for row, found in record(name)["rows"].items()}
    targets = list(dict.fromkeys(target for target, *_ in rows))
    figure, panels = plt.subplots(1, len(targets), figsize=(9, 2.8), sharey=True)
    for axes, target in zip(panels, targets, strict=True):
        found = {row[1:]: rows[row] for row in rows if row[0] == target}
        times = [1e3 * row["least_s"] for row in found.values()]
        colors = ["C0" if by == "ours" else "C5" for _, by in found]
        bars = axes.barh([", ".join(row) for row in found], times, color=colors)
        sizes = [f"{x['hbm_bytes_a_parameter']:.0f} bytes" for x in found.values()]
        axes.bar_label(bars, sizes, padding=3, color="C5")
        chip = target.partition(":")[0]
        axes.set(title=f"TPU {chip}", xlabel="least time of a step, ms")
        axes.margins(x=0.25)
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    return figure


FIGURES = {
    "step-cpu": draw_times,
    "step-gpu": draw_times,
    "step-tpu": draw_traffic,
}


def main():
    for page in PAGES:
        page.write_text(in_page(page.read_text()))
    plt.style.use(DOCS / "figures" / "site.mplstyle")
    for name, draw in FIGURES.items():
        if record(name):
            figure = draw(name)
            figure.savefig(FOLDER / "results" / f"{name}.png")
            plt.close(figure)
    small_state.draw(record("small_state"), DOCS / "figures" / "small_state.png")


if __name__ == "__main__":
    main()
