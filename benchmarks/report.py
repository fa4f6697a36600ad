"""Redraw the figures of the benchmarks from their records.

    python benchmarks/report.py

makes results/step-KIND.png for CPU, GPU, TPU and `single_pass`, and
docs/figures/small_state.png.
`python docs/tables` makes the tables.
"""

import itertools
import json
from pathlib import Path

import matplotlib

import small_state
import step

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

FOLDER = Path(__file__).parent
FIGURES = FOLDER.parent / "docs" / "figures"


def record(name):
    path = FOLDER / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def draw_times(name):
    """The time of every competitor, as a multiple of ours."""
    rows = {tuple(row.split()): found for row, found in record(name)["rows"].items()}
    leaves, options = (list(dict.fromkeys(parts)) for parts in zip(*rows, strict=True))
    size = {"figsize": (9, 2.6 * len(leaves)), "sharex": True, "sharey": True}
    shape = len(leaves), len(options)
    figure, panels = plt.subplots(*shape, squeeze=False, **size)
    cells = itertools.product(leaves, options)
    for (leaves_, kind), axes in zip(cells, panels.flat, strict=True):
        if (leaves_, kind) not in rows:
            axes.set_axis_off()
            continue
        ratios = rows[leaves_, kind]["summary"]["ratio_to"]
        # A row that was not measured has no bar.
        times = [1 / ratios[p]["mean"] if p in ratios else np.nan for p in step.PEERS]
        colors = ["C0", *["C5"] * len(times)]
        axes.barh(["ours", *step.PEERS], [1, *times], color=colors)
        axes.axvline(1, color="C0", linewidth=1)
        axes.set(title=f"{leaves_}\n{kind}", xlabel="time / ours")
        axes.grid(axis="y", visible=False)
    panels.flat[0].invert_yaxis()
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


DRAWN = {
    "step-cpu": draw_times,
    "step-single_pass": draw_times,
    "step-gpu": draw_times,
    "step-tpu": draw_traffic,
}


def main():
    plt.style.use(FIGURES / "site.mplstyle")
    for name, draw in DRAWN.items():
        if record(name):
            figure = draw(name)
            figure.savefig(FOLDER / "results" / f"{name}.png")
            plt.close(figure)
    small_state.draw(record("small_state"), FIGURES / "small_state.png")


if __name__ == "__main__":
    main()
