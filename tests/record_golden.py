"""Record golden/torch.json: what torch's RMSprop does, for where it is not installed.

    python tests/record_golden.py

The numbers are exact: Python prints a float64 so that it reads back to the last bit.
"""

import itertools
import json
from pathlib import Path

import jax
import numpy as np

from helpers import problem, run_torch

FILE = Path(__file__).parent / "golden" / "torch.json"
STEPS = 60
KEPT = [0, 1, 20, 59]  # the first two, the step of zeros, the last
SHAPES = {"matrix": (2, 2), "scalar": (), "empty": (0, 2)}
CASES = [
    {
        "momentum": m,
        "centered": c,
        "weight_decay": w,
        "maximize": x,
        "eps": e,
        "decay": d,
    }
    for (m, c, w), (x, e, d) in itertools.product(
        itertools.product((0.0, 0.1, 0.9), (False, True), (0.0, 0.9)),
        ((False, 1e-8, 0.99), (True, 1e-2, 0.9)),
    )
]


def encode(leaf):
    return np.ravel(leaf).view(np.float64).tolist()


def kept(entries):
    """The steps on record, flat; a complex number counts as two."""
    return jax.tree.map(lambda leaf: encode(leaf[KEPT]), entries)


def record(dtype):
    run = problem(STEPS, dtype, SHAPES)
    return {
        "run": jax.tree.map(encode, run),
        "results": [kept(run_torch(*run, dtype, **case)) for case in CASES],
    }


def recorded_run(golden, dtype):
    """The parameters, gradients and learning rates on record."""

    def decode(tree, *lead):
        return {
            name: np.array(tree[name]).view(dtype).reshape((*lead, *shape))
            for name, shape in SHAPES.items()
        }

    params, gradients, learning_rates = golden[dtype]["run"]
    return decode(params), decode(gradients, STEPS), np.array(learning_rates)


def main():
    import torch

    golden = {
        "torch": torch.__version__,
        "steps": STEPS,
        "kept": KEPT,
        "cases": CASES,
        "float64": record("float64"),
        "complex128": record("complex128"),
    }
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(golden) + "\n")
    print(f"{FILE.name}: {len(CASES)} cases from torch {torch.__version__}")


if __name__ == "__main__":
    main()
