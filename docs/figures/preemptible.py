"""Draw preemptible.png: the losses of a run killed twice and of one never killed.

    python docs/figures/preemptible.py

Starts examples/preemptible.py once, and three times on another folder of checkpoints.
There the first two processes are killed, by SIGKILL, once they have come far enough.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__)
PROCESSES = {  # how far each comes, and its look
    "first process, killed": (120, {"linewidth": 5}),
    "second, killed": (220, {"linewidth": 3}),
    "third, to the end": (None, {"linewidth": 1}),
}


def losses_of(folder, last):
    """The losses by step that one process prints, until `last` is reached."""
    script = HERE.parents[2] / "examples" / "preemptible.py"
    command = [sys.executable, script, "--checkpoints", folder, "--save-every", "10"]
    losses = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if found := re.match(r"step (\d+): loss (\S+)", line):
                losses[int(found[1])] = float(found[2])
                if last and int(found[1]) >= last:
                    process.kill()
    return losses


def main():
    plt.style.use(HERE.with_name("site.mplstyle"))
    figure, axes = plt.subplots(figsize=(9, 3.4))
    with tempfile.TemporaryDirectory() as folder:
        known = losses_of(folder, None)
    whole = {"color": "C5", "linewidth": 11, "alpha": 0.4, "label": "never killed"}
    axes.semilogy(known.keys(), known.values(), **whole)
    with tempfile.TemporaryDirectory() as folder:
        for name, (last, look) in PROCESSES.items():
            losses = losses_of(folder, last)
            assert losses.items() <= known.items()
            axes.semilogy(losses.keys(), losses.values(), ".-", label=name, **look)
            print(f"{name}: steps {min(losses)} to {max(losses)}")
    axes.set(xlabel="step", ylabel="cross-entropy", title="Loss of one run")
    axes.legend()
    figure.savefig(HERE.with_suffix(".png"))


if __name__ == "__main__":
    main()
