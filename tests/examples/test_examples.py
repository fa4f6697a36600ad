"""The examples' command lines, and, marked slow, each in the run of the gallery."""

import ast
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NEED_TORCH = {"port_from_torch", "resume_from_torch"}

# The least and the greatest value of each number in the last line of a whole run.
WHOLE = {
    "first_steps": [(100, 100), (0, 0.02)],
    "digits": [(98, 100), (441, 450), (450, 450)],
    "port_from_torch": [(97, 100), (97, 100), (0, 2e-5)],  # observed: 1e-6
    "resume_from_torch": [(0, 1e-4), (0, 1e-4)],  # observed: 1e-6
    "a2c_cartpole": [(500, 500), *[(400, 500), (0, 500), (0, 500)] * 2],
    "char_model": [(1.5, 2.3), (1.5, 2)],
    "efficientnet_schedule": [(90, 100), (96, 100), (96, 100)],
    "groups": [(90, 100), (0, 0), (5, 50), (100, 500)],
    # Bytes and losses: of float32, then in percent of each way of storing.
    "low_precision": [
        *[(450, 450), (0, 0.02), (100, 100), (100, 100)],
        *[(50, 52), (70, 130)] * 2,
        *[(50, 52), (130, 300)],  # rounded to nearest
    ],
    "sweep": [
        *[(1e-3, 1e-2), (0.9, 1), (0, 0.9), (0, 1e-2)],  # the setting
        *[(0, 0.1), (0, 0.02), (96, 100), (0, 2), (5, 5)],
    ],
}


def gallery_options(name):
    page = (ROOT / "docs" / "gallery.md").read_text()
    (arguments,) = re.findall(rf"\npython examples/{name}\.py(.*)\n", page)
    return re.sub(r" --output \S+", "", arguments).split()


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_run_ends_where_the_gallery_does(name, tmp_path):
    if name in NEED_TORCH:
        pytest.importorskip("torch")
    figure = tmp_path / "figure.png"
    script = [str(EXAMPLES / f"{name}.py"), *gallery_options(name)]
    command = [sys.executable, *script, f"--output={figure}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(b"\x89PNG")
    last = done.stdout.splitlines()[-1]
    numbers = [float(x) for x in re.findall(r"(?<!\w)\d[\d.]*(?:e-\d+)?", last)]
    assert len(numbers) == len(WHOLE[name]), last
    for number, (least, greatest) in zip(numbers, WHOLE[name], strict=True):
        assert least <= number <= greatest, last


COMMANDS = [
    path
    for folder in ("examples", "benchmarks", "docs")
    for path in sorted((ROOT / folder).glob("*.py"))
    if re.search(r"ArgumentParser\(|parse_options\(\s*__doc__", path.read_text())
    and path.name != "_common.py"
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_help_needs_no_docstrings(path, monkeypatch, capsys):
    """As under `python -OO`, which drops them."""
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # that of pytest stays
    code = compile(path.read_text(), path, "exec", optimize=2)
    namespace = {"__name__": "__main__", "__file__": str(path), "__doc__": None}
    try:
        with pytest.raises(SystemExit, match="0"):
            exec(code, namespace)
    except ModuleNotFoundError as error:
        pytest.skip(f"could not import {error.name!r}")
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {path.name} [-h]")
    assert re.search(r"^  (--)?\w+.*\n? +\w+", text, re.M)  # an option, explained


def test_nothing_relies_on_assert():
    """`python -O` drops it."""
    folders = [EXAMPLES, ROOT / "benchmarks", ROOT / "optax_rmsprop"]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(paths) > 40
    for path in paths:
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not any(isinstance(node, ast.Assert) for node in nodes), path


BAD_OPTIONS = {
    "--steps=0": "--steps: must be at least 1, got 0",
    "--steps=many": "--steps: invalid positive_integer value: 'many'",
    "--stepz=1": "unrecognized arguments: --stepz=1",
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_options_are_refused(option, import_example, capsys):
    with pytest.raises(SystemExit, match="2"):
        import_example("groups").main([option])
    assert BAD_OPTIONS[option] in capsys.readouterr().err
