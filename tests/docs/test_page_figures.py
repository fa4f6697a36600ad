"""The scripts in docs/figures draw what docs/parameters.md shows."""

import importlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parents[2] / "docs" / "figures"
SCRIPTS = ("parameters", "parameters_average", "parameters_momentum")
# Numbers small enough to run in a second or two.
SMALL = {
    "valley": {"updates": 5},
    "learning_rate": {"updates": 8, "window": 4},
    "eps": {"updates": 3, "sizes": 4},
    "decay": {"updates": 30, "numbers": 4},
    "eps_in_sqrt": {"sizes": 4},
    "initial_scale": {"updates": 5},
    "bias_correction": {"updates": 5},
    "centered": {"updates": 6, "ratios": 3, "numbers": 2},
    "accumulator_dtype": {"updates": 6, "numbers": 4096},
    "momentum": {"updates": 5, "trained": 3},
    "lr_in_momentum": {"updates": 30},
    "nesterov": {"updates": 5},
    "weight_decay": {"updates": 5, "rest": 5, "numbers": 3},
}


@pytest.fixture(scope="module")
def figures():
    """The functions that draw, by name; their style ends with this module."""
    pytest.importorskip("sklearn")
    with pytest.MonkeyPatch.context() as patch, plt.rc_context():
        patch.syspath_prepend(FOLDER)
        modules = map(importlib.import_module, SCRIPTS)
        yield {name: draw for m in modules for name, draw in m.FIGURES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_figures_can_be_drawn(figures, name):
    figure = figures[name](**SMALL[name])
    lines = [line for axes in figure.axes for line in axes.lines]
    plt.close(figure)
    drawn = [np.asarray(line.get_ydata(), float) for line in lines]
    assert drawn
    assert all(np.isfinite(y).all() for y in drawn)


def test_every_figure_is_tried(figures):
    assert SMALL.keys() == figures.keys()
