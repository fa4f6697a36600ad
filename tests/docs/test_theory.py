"""The constructions of docs/theory.md, in a few steps."""

import importlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

FOLDER = Path(__file__).parents[2] / "docs" / "figures"


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def test_a_short_memory_ends_at_the_worst_point(script):
    theory = script("theory_decay")
    np.testing.assert_allclose(
        theory.ends([0.9, 0.99, 0.999, 0.9999], 10_000),
        [1, 1, 1, -1],
        atol=0.03,  # the last steps: 0.02 seen
    )
    assert 0.999 < theory.threshold() < 0.9999


def test_the_drift_is_that_of_a_long_run(script):
    theory = script("theory_decay")
    decay, average, total = 0.9995, 0.0, 0.0
    for t in range(400 * theory.CYCLE):
        g = theory.LARGE if t % theory.CYCLE == 0 else theory.SMALL
        average = decay * average + (1 - decay) * g**2
        total = g / average**0.5 if g > 0 else total + g / average**0.5
    assert theory.drift(decay) == pytest.approx(total, rel=1e-6)


def test_rmsprop_gives_signs_and_gradient_descent_the_minimum_norm(script):
    theory = script("theory_margin")
    y, new = theory.labels()
    features = theory.examples(y)
    np.testing.assert_array_equal(features @ np.sign(features.T @ y), 4 * y)
    of_minimum_norm = np.linalg.lstsq(features, y)[0]
    np.testing.assert_allclose(
        theory.kinds(of_minimum_norm, y), theory.minimum_norm(y), 1e-9
    )
    for name, exact, error in (
        ("RMSprop", theory.signs(), np.mean(new == -1)),
        ("gradient descent", theory.minimum_norm(y), 0),
    ):
        w, losses = theory.fit(theory.OPTIMIZERS[name], y)
        assert losses[-1] < 1e-12
        np.testing.assert_allclose(theory.kinds(w, y), exact, atol=1e-3)
        assert theory.wrong(w, new) == error


@pytest.mark.slow
def test_the_rule_keeps_the_curve_on_digits(script):
    theory = script("theory_batch")
    first = theory.curve(theory.BASE, 1, images=4_800, points=3)
    for (name, rule), least, most in zip(
        theory.RULES.items(), (0.9, 0.1, 1.2), (1.15, 0.6, 3), strict=True
    ):
        ratio = theory.curve(rule(4), 4, images=4_800, points=3) / first
        assert least < ratio[-1] < most, name


@pytest.mark.slow
def test_sharpness_rises_to_its_limit(script):
    theory = script("theory_edge")
    name = "momentum 0.9, nesterov"
    _, sharpness = theory.train(theory.MOMENTUM[name], steps=800)
    assert sharpness[0] < 0.2 * theory.LIMITS[name]
    assert np.median(sharpness[-30:]) == pytest.approx(theory.LIMITS[name], rel=0.1)
