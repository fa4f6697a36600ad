"""The examples' command lines, and, marked slow, a run of each."""

import ast
import operator
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PROGRAM = "first_steps"
NEED_TORCH = {"port_from_torch", "resume_from_torch", "which_rmsprop"}

# Whole runs of these take half a minute to a minute. `python docs/gallery.py` makes
# them, and puts their last lines on its page.
SHORTER = {
    "digits": ["--epochs=5"],
    "port_from_torch": ["--epochs=1"],
    "resume_from_torch": ["--epochs=1"],
    "a2c_cartpole": ["--windows=30"],
    "char_model": ["--steps=100"],
    "efficientnet_schedule": ["--epochs=8"],
}
# The least and the greatest value of each number in the last line of a run.
LAST_LINES = {
    "first_steps": [(100, 100), (0, 0.02)],
    "digits": [(95, 100), (430, 450), (450, 450)],
    "port_from_torch": [(50, 100), (50, 100), (1e-8, 1e-6)],  # observed: 3e-7
    "resume_from_torch": [(1e-8, 1e-5), (0, 1e-6)],  # observed: 8e-7 and 5e-7
    "a2c_cartpole": [(120, 120), *[(100, 500)] * 2],
    "char_model": [(2.5, 3.2), (1.5, 2)],
    "efficientnet_schedule": [(70, 100), (80, 100), (80, 100)],
    "groups": [(90, 100), (0, 0), (5, 50), (100, 500)],
    # Bytes and losses: of float32, then in percent of each way of storing.
    "low_precision": [
        *[(450, 450), (0, 0.02), (100, 100), (100, 100)],
        *[(50, 52), (70, 130)] * 2,
        *[(50, 52), (130, 300)],  # rounded to nearest
    ],
    "which_rmsprop": [(1e-7, 1e-4), (0.008, 0.008), (0.56, 0.56)],
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
@pytest.mark.parametrize("name", [name for name in LAST_LINES if name != PROGRAM])
def test_a_run_ends_with_these_numbers(
    name, import_example, tmp_path, capsys, monkeypatch
):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    if name in NEED_TORCH:
        pytest.importorskip("torch")
    figure, printed = tmp_path / "figure.png", []
    savefig = Figure.savefig

    def save(self, *args, **kwargs):
        printed.append(capsys.readouterr().out)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    options = [*gallery_options(name), *SHORTER.get(name, []), f"--output={figure}"]
    import_example(name).main(options)
    assert figure.read_bytes().startswith(b"\x89PNG")
    check_last_line(name, printed[0])  # a figure that fails loses no number
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_an_example_is_a_program(tmp_path):
    """The others are called here, which saves the time of their imports."""
    figure = tmp_path / "figure.png"
    command = [sys.executable, f"{EXAMPLES / PROGRAM}.py", f"--output={figure}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(b"\x89PNG")
    check_last_line(PROGRAM, done.stdout)


def check_last_line(name, printed):
    last = printed.splitlines()[-1]
    numbers = [float(x) for x in re.findall(r"(?<!\w)\d[\d.]*(?:e-\d+)?", last)]
    assert len(numbers) == len(LAST_LINES[name]), last
    for number, (least, greatest) in zip(numbers, LAST_LINES[name], strict=True):
        assert least <= number <= greatest, last


COMMANDS = [
    path
    for folder in ("examples", "benchmarks", "docs")
    for path in sorted((ROOT / folder).glob("*.py"))
    if re.search(r"ArgumentParser\(|(parse_options|run)\(\s*__doc__", path.read_text())
    and path.name not in ("_common.py", "compiled.py")
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
    "--output=figure": "--output: must end in .png, .pdf, .svg: figure",
    "--output=folder.png": "--output: is a folder: folder.png",
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_options_are_refused(option, import_example, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        import_example("groups").main([option])
    assert BAD_OPTIONS[option] in capsys.readouterr().err


@pytest.mark.parametrize("name", [*LAST_LINES, "multi_host", "preemptible"])
def test_a_bad_path_is_refused_before_the_training(
    name, import_example, tmp_path, capsys
):
    if name in NEED_TORCH:
        pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    if name == "preemptible":
        pytest.importorskip("orbax.checkpoint")
        option = f"--checkpoints={tmp_path / 'file'}"
    else:
        option = f"--output={tmp_path / 'file' / 'figure.png'}"
    with pytest.raises(SystemExit, match="2"):
        import_example(name).main([option])
    assert "cannot write there" in capsys.readouterr().err.splitlines()[-1]


# Errors in one line.

MISSING = {  # the module, the example that misses it, what brings it
    "flax": ("groups", "flax"),
    "matplotlib.figure": ("first_steps --output=figure.png", "matplotlib"),
    "orbax.checkpoint": ("preemptible", "orbax-checkpoint"),
    "sklearn.datasets": ("sweep", "scikit-learn"),
    "torch": ("which_rmsprop", "torch"),
}


@pytest.mark.parametrize("module", MISSING)
def test_a_missing_package_is_one_line(module, import_example, monkeypatch, capsys):
    command, package = MISSING[module]
    name, *options = command.split()
    path, show = str(EXAMPLES / f"{name}.py"), import_example("_errors").show
    monkeypatch.setattr(sys, "argv", [path, *options])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError) as found:
        runpy.run_path(path, run_name="__main__")
    show(found.type, found.value, found.tb)
    top = module.partition(".")[0]
    line = f"{name}.py: {top} is missing: pip install {package}\n"
    assert capsys.readouterr().err == line


def test_after_ctrl_c_there_is_one_line(import_example, monkeypatch, capsys):
    """`test_scale.py` sees how a program ends."""
    errors, groups = import_example("_errors"), import_example("groups")

    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(groups._common, "split_digits", stopped)
    monkeypatch.setattr(sys, "argv", ["groups.py"])
    with pytest.raises(KeyboardInterrupt) as found:
        groups.main([])
    sent = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # that of pytest stays
    monkeypatch.setattr(os, "kill", lambda *signal: sent.append(signal))
    errors.show(found.type, found.value, found.tb)
    assert capsys.readouterr().err == "groups.py: stopped\n"
    assert sent == [(os.getpid(), signal.SIGINT)]
    assert errors.line_of(ValueError()) == ""  # others keep their tracebacks


def test_an_error_of_processes_is_shown_once(import_example):
    with pytest.raises(SystemExit) as found:
        import_example("_common").run_processes(operator.truediv, 2, 0)
    assert str(found.value).count("ZeroDivisionError") == 1
    assert found.value.__suppress_context__
