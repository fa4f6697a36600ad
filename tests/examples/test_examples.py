"""Each example in a short run, and, marked slow, in the run of the gallery."""

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
slow = pytest.mark.slow

# Arguments of a short run, and the last line that it prints.
SHORT = {
    "first_steps": (["--epochs=10"], r"epoch  10: loss [\d.]+"),
    "groups": (
        ["--steps=4"],
        r"held-out accuracy \S+%; moved: stem 0.0%, .* head \S+%",
    ),
    "low_precision": (
        ["--steps=4"],
        r"bytes and loss, of 450 KiB and .*, to nearest .*",
    ),
    "sweep": (["--steps=2", "--seeds=1"], r"best: learning_rate .* over 1 seeds"),
    "a2c_cartpole": (
        ["--windows=1"],
        r"after 4k steps: torch \d+ .*, TensorFlow \d+ .*",
    ),
    "char_model": (
        ["--steps=2"],
        r"held-out loss \d\.\d\d bits a character \(xz, .*\)",
    ),
    "digits": (["--epochs=1"], r"held-out accuracy \S+% \(\d+ of 450 digits\)"),
    "efficientnet_schedule": (
        ["--epochs=1"],
        r"held-out accuracy: raw \S+%, averaged .*",
    ),
    "port_from_torch": (["--epochs=1"], r"held-out accuracy .* parameters within \S+"),
    "resume_from_torch": (["--epochs=1"], r"parameters within \S+, losses within \S+"),
}
# Those that compile for less than about five seconds are not marked slow.
QUICK = {"first_steps", "groups", "sweep"}


def named(names, marked=()):
    return [pytest.param(n, marks=slow) if n in marked else n for n in names]


@pytest.mark.parametrize("name", named(SHORT, SHORT.keys() - QUICK))
def test_a_short_run_draws_and_reports(name, import_example, tmp_path, capsys):
    if name in NEED_TORCH:
        pytest.importorskip("torch")
    arguments, expected = SHORT[name]
    figure = tmp_path / "new folder" / "figure.png"
    import_example(name).main([*arguments, f"--output={figure}"])
    assert re.fullmatch(expected, capsys.readouterr().out.splitlines()[-1])
    assert figure.read_bytes().startswith(b"\x89PNG")


# What a whole run must print, the least and greatest of each number in the last line.
WHOLE = {
    "first_steps": [(100, 100), (0, 0.02)],
    "digits": [(98, 100), (441, 450), (450, 450)],
    "port_from_torch": [(97, 100), (97, 100), (0, 2e-5)],  # observed: 1e-6
    "resume_from_torch": [(0, 1e-4), (0, 1e-4)],  # observed: 1e-6
    "a2c_cartpole": [(500, 500), *[(400, 500), (0, 500), (0, 500)] * 2],
    "char_model": [(1.5, 2.3), (1.5, 2)],
    "efficientnet_schedule": [(90, 100), (96, 100), (96, 100)],
    "groups": [(90, 100), (0, 0), (5, 50), (100, 500)],
}


def gallery_command(name):
    page = (ROOT / "docs" / "gallery.md").read_text()
    (arguments,) = re.findall(rf"\npython examples/{name}\.py(.*)\n", page)
    return re.sub(r" --output \S+", "", arguments).split()


@slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_run_ends_where_the_gallery_does(name):
    if name in NEED_TORCH:
        pytest.importorskip("torch")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *gallery_command(name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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
