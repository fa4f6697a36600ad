"""The examples, run as a user would run them, only shorter."""

import ast
import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *options):
    """The lines that an example prints."""
    command = [sys.executable, str(EXAMPLES / script), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROOT = EXAMPLES.parent
COMMANDS = [
    path
    for folder in ("examples", "benchmarks", "docs")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "ArgumentParser(" in path.read_text() or "parse(__doc__" in path.read_text()
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


def test_first_steps_ends_as_it_says():
    lines = run("first_steps.py")
    promised = re.search(r"^    (epoch 100: .*)$", load("first_steps").__doc__, re.M)
    assert len(lines) == 10
    assert lines[-1] == promised[1]


def test_first_steps_equals_the_torch_lines_in_its_comments():
    torch = pytest.importorskip("torch")
    example = load("first_steps")
    keys = example.jax.random.split(example.jax.random.key(0))
    features = np.array(example.jax.random.normal(keys[0], (100, 10)))
    noise = np.array(example.jax.random.normal(keys[1], (100,)))
    targets = features @ np.arange(-5.0, 5.0, dtype=np.float32) / 5 + 0.1 * noise
    features, targets = torch.tensor(features), torch.tensor(targets)
    model = torch.nn.Linear(10, 1)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, alpha=0.99, eps=1e-8)
    for _ in range(100):
        loss = torch.nn.functional.mse_loss(model(features).squeeze(1), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # observed: 3e-7; a loss near 0.01 after 100 float32 steps
    assert abs(example.main(epochs=100) - loss.item()) < 3e-6


def test_digits_learns_and_draws(tmp_path):
    figure = tmp_path / "new folder" / "digits.png"
    last = run("digits.py", "--epochs", "2", "--output", str(figure))[-1]
    right, of = map(int, re.search(r"\((\d+) of (\d+) digits\)", last).groups())
    assert str(figure) in last
    assert of == 450
    assert right > 0.85 * of  # chance is 0.1; observed: 0.916
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_digits_compares_with_torch(tmp_path):
    pytest.importorskip("torch")
    figure = str(tmp_path / "digits.png")
    lines = run("digits.py", "--epochs=1", "--compare-torch", "--output", figure)
    line = next(line for line in lines if line.startswith("epoch"))
    numbers = r"loss ([\d.]+) in JAX, ([\d.]+) in torch; .* parameter ([\de.-]+)"
    ours, torchs, difference = map(float, re.search(numbers, line).groups())
    assert ours == pytest.approx(torchs, rel=1e-4)  # observed: all 6 decimals
    assert 0 < difference < 1e-5  # observed: 8e-8; 7e-2 with eps under the root


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_digits_says_when_torch_is_missing(digits, monkeypatch, capsys):
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        digits.main(["--compare-torch"])
    assert "needs torch: pip install torch" in capsys.readouterr().err


BAD_OPTIONS = {
    "--decay=1.5": r"`decay` must be a number in \[0, 1\), got 1\.5",
    "--epochs=0": r"--epochs: must be in \[1, 1000\], got 0",
    "--batch-size=many": r"--batch-size: invalid int value: 'many'",
    "--output=figure": r"--output must end in one of .*png",
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_digits_refuses_bad_options(digits, option, capsys):
    with pytest.raises(SystemExit):
        digits.main([option])
    assert re.search(BAD_OPTIONS[option], capsys.readouterr().err)


def test_digits_explains_every_option(digits):
    explained = {action.dest: action.help for action in digits.command_line()._actions}
    assert explained.keys() >= {"epochs", "batch_size", "learning_rate", "decay", "eps"}
    assert all(explained.values())
