"""The tables in the pages are those that docs/tables computes."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "tables"


@pytest.mark.slow
def test_the_pages_have_the_computed_tables():
    pytest.importorskip("sklearn")
    command = [sys.executable, str(FOLDER), "--all", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def generated(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import generated

    monkeypatch.setattr(generated, "TABLES", {})
    return generated


PAGE = "Prose. <!-- begin rates -->{}<!-- end rates --> More prose."


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| a | 1.02 |", None),  # within the tolerance
        ("| a | 1.2 |", "| a | 1.0 |"),
        ("| b | 1.0 |", "| a | 1.0 |"),
        ("| a | 1.0 | 2 |", "| a | 1.0 |"),
    ],
)
def test_what_differs_is_replaced(generated, old, new):
    generated.table("rates", tolerance=0.05)(lambda language: "| a | 1.0 |")
    page = generated.filled(PAGE.format(old), "en", ["rates"])
    assert page == PAGE.format(new or old)
    assert generated.filled(PAGE.format(old), "en", []) == PAGE.format(old)


@pytest.mark.parametrize(
    ("x", "text"), [(0, "0"), (0.9, "0.9"), (1e-8, "1e-8"), (2.5e-4, "2.5e-4")]
)
def test_numbers_are_written_as_people_do(generated, x, text):
    assert generated.number(x) == text


@pytest.mark.parametrize(
    ("x", "text"),
    [(0, "0"), (31.62, "32"), (1.0, "1"), (0.0319, "0.032"), (998, "1000")],
)
def test_computed_numbers_are_rounded(generated, x, text):
    assert generated.digits(x) == text
