"""Ours against recorded runs of torch, so that parity is checked without torch too."""

import json

import numpy as np
import pytest

from helpers import covering, run_ours, slow_but
from record_golden import CASES, FILE, KEPT, STEPS, kept, record, recorded_run

pytestmark = pytest.mark.usefixtures("x64")

TOLERANCE = 1e-10  # observed: 4e-14
GOLDEN = json.loads(FILE.read_text())


def largest_difference(actual, expected):
    """The largest difference, relative to the number or to 1e-3 if that is larger."""
    assert actual.keys() == expected.keys()
    worst = 0.0
    for entry, leaves in expected.items():
        assert actual[entry].keys() == leaves.keys()
        for name, leaf in leaves.items():
            a, e = np.array(actual[entry][name]), np.array(leaf)
            error = np.abs(a - e) / np.maximum(np.abs(e), 1e-3)
            worst = max(worst, error.max(initial=0))
    return worst


def test_record_is_of_these_cases():
    described = {name: GOLDEN[name] for name in ("steps", "kept", "cases")}
    assert described == {"steps": STEPS, "kept": KEPT, "cases": CASES}


QUICK = [CASES.index(case) for case in covering(CASES)]


@pytest.mark.parametrize("case", slow_but(QUICK, range(len(CASES))))
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_equals_recorded_torch(dtype, case):
    ours = run_ours(*recorded_run(GOLDEN, dtype), dtype, **CASES[case])
    assert largest_difference(kept(ours), GOLDEN[dtype]["results"][case]) <= TOLERANCE


def test_another_dialect_does_not_equal_recorded_torch():
    case = next(case for case in CASES if case["eps"] == 1e-2)
    expected = GOLDEN["float64"]["results"][CASES.index(case)]
    run = recorded_run(GOLDEN, "float64")
    other = kept(run_ours(*run, "float64", **case, eps_in_sqrt=True))
    assert largest_difference(other, expected) > 1e6 * TOLERANCE


def test_torch_still_does_what_is_recorded():
    torch = pytest.importorskip("torch")
    if torch.__version__ != GOLDEN["torch"]:
        pytest.skip(f"recorded with torch {GOLDEN['torch']}, found {torch.__version__}")
    again = record("float64")["results"]
    for now, then in zip(again, GOLDEN["float64"]["results"], strict=True):
        assert largest_difference(now, then) <= TOLERANCE
