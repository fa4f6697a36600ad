"""The examples of recipes, in short runs, and the figures of older examples."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")

from optax_rmsprop import dialects

EXAMPLES = Path(__file__).parent.parent / "examples"
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def as_for_a_user():
    # Some of optax's schedules divide counts by numbers that are not whole.
    with jax.numpy_dtype_promotion("standard"):
        yield


def last_line(example, capsys, *arguments):
    example.main(list(arguments))
    return capsys.readouterr().out.splitlines()[-1]


# The schedule of EfficientNet.


@pytest.fixture(scope="module")
def efficientnet(import_example):
    return import_example("efficientnet_schedule")


def test_efficientnet_draws_and_tells_accuracies(efficientnet, tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    line = last_line(efficientnet, capsys, "--epochs=2", f"--output={figure}")
    accuracies = re.findall(r"(raw|averaged|outside) ([\d.]+)%", line)
    assert [name for name, _ in accuracies] == ["raw", "averaged", "outside"]
    assert all(0 < float(accuracy) <= 100 for _, accuracy in accuracies)
    assert figure.read_bytes().startswith(PNG)


def test_efficientnets_schedule_is_in_proportion(efficientnet):
    schedule, epoch = efficientnet.SCHEDULE, efficientnet.EPOCH
    peak = 0.256 * 32 / 4096
    in_epochs = {0: 0, 2.5: peak / 2, 5: 0.97**2 * peak, 24.1: 0.97**10 * peak}
    for epochs, rate in in_epochs.items():
        found = schedule(jnp.asarray(epochs * epoch))
        assert found == pytest.approx(rate, rel=1e-5), epochs


def test_the_rate_may_stand_outside_only_while_it_is_constant(efficientnet):
    def losses(rate):
        inside = dialects.tensorflow(rate, momentum=0.9, epsilon=1e-3)
        outside = dialects.stable_baselines3(rate, alpha=0.9, momentum=0.9, eps=1e-3)
        return [efficientnet.train(tx, 1)[0] for tx in (inside, outside)]

    np.testing.assert_allclose(*losses(5e-3), rtol=1e-5)  # observed: 1.8e-7
    changing = losses(optax.piecewise_constant_schedule(5e-3, {20: 0.1}))
    apart = np.abs(np.divide(*changing) - 1).max()
    assert apart > 5e-3  # observed: 2.1e-2


def test_efficientnet_promises_an_accuracy(efficientnet, tmp_path, monkeypatch):
    def bad(rmsprop, epochs):
        losses, ones = np.ones(epochs * efficientnet.EPOCH), np.ones((epochs, 2))
        return losses, np.ones((len(losses), 3)), 0.9 * ones

    monkeypatch.setattr(efficientnet, "train", bad)
    with pytest.raises(SystemExit, match="expected at least 96%"):
        efficientnet.main([f"--output={tmp_path / 'figure.png'}"])


# Parameter groups.


@pytest.fixture(scope="module")
def groups(import_example):
    return import_example("groups")


@pytest.fixture
def run_groups(groups, tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "STEPS", 20)
    return lambda: groups.main([f"--output={tmp_path / 'figure.png'}"])


def test_groups_move_as_their_rates_say(run_groups, tmp_path, capsys):
    run_groups()
    moved = r"held-out accuracy [\d.]+%; moved: stem 0.0%, backbone (\S+)%, head (\S+)%"
    backbone, head = re.fullmatch(moved, capsys.readouterr().out.strip()).groups()
    assert 0 < 5 * float(backbone) < float(head)
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_the_rates_of_groups_fall_half_way(groups, run_groups, monkeypatch):
    train, rates = groups.train, []

    def watched(*arguments):
        for params, state in train(*arguments):
            if hasattr(state, "inner_states"):
                of_group = [
                    state.inner_states[g].inner_state for g in groups.GROUPS[1:]
                ]
                rates.append([float(s.hyperparams["learning_rate"]) for s in of_group])
            yield params, state

    monkeypatch.setattr(groups, "train", watched)
    run_groups()
    np.testing.assert_allclose(rates[:10], [[1e-4, 1e-3]] * 10, rtol=1e-6)
    np.testing.assert_allclose(rates[10:], [[1e-5, 1e-4]] * 10, rtol=1e-6)


def test_groups_whose_biases_decay_are_an_error(groups, run_groups, monkeypatch):
    monkeypatch.setitem(groups.RECIPE, "weight_decay_mask", None)
    with pytest.raises(SystemExit, match="expected decay of the kernels"):
        run_groups()


def test_a_stem_that_moves_is_an_error(run_groups, monkeypatch):
    monkeypatch.setattr(optax, "set_to_zero", lambda: optax.sgd(1e-4))
    with pytest.raises(SystemExit, match="expected the frozen stem to keep every bit"):
        run_groups()


# Low precision.


@pytest.fixture(scope="module")
def low_precision(import_example):
    return import_example("low_precision")


def test_low_precision_tells_bytes_and_losses(low_precision, tmp_path, capsys):
    figure = tmp_path / "figure.png"
    line = last_line(low_precision, capsys, "--steps=40", f"--output={figure}")
    found = re.findall(
        r"(float32|uint8 state|bfloat16|to nearest) (\d+)%, (\d+)%", line
    )
    numbers = {name: (int(size), int(loss)) for name, size, loss in found}
    assert numbers["float32"] == (100, 100)
    # 4 + 1 + 1 bytes of 12, and 2 + 2 + 2 of 12; biases and formats are the rest
    assert 50 <= numbers["bfloat16"][0] <= numbers["uint8 state"][0] <= 52
    assert all(80 < loss < 125 for _, loss in numbers.values())
    assert len(numbers) == 4
    assert figure.read_bytes().startswith(PNG)


def test_low_precision_promises_losses(low_precision, tmp_path, monkeypatch):
    monkeypatch.setattr(low_precision, "STEPS", 20)
    monkeypatch.setattr(low_precision, "PROMISED_RATIO", 0.5)
    with pytest.raises(SystemExit, match="expected at most 50%"):
        low_precision.main([f"--output={tmp_path / 'figure.png'}"])


# What small examples have in common.

BAD_OPTIONS = {
    "--steps=0": r"--steps: must be in \[1, 100000\], got 0",
    "--output=groups.pdf": r"--output: must end in \.png, got groups\.pdf",
    f"--output={__file__}/groups.png": "--output: must be in a folder that can be made",
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_options_are_refused(groups, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        groups.main([option])
    assert re.search(BAD_OPTIONS[option], capsys.readouterr().err)


OPTIONS = {
    "a2c_cartpole": ["windows", "seeds"],
    "char_model": ["steps"],
    "efficientnet_schedule": ["epochs"],
    "groups": ["steps"],
    "low_precision": ["steps"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_checked_and_explained(import_example, name, capsys):
    example = import_example(name)
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    printed = capsys.readouterr().out
    for option in (*OPTIONS[name], "output"):
        assert re.search(rf"--{option} [A-Z]+ +\w", printed)
        with pytest.raises(SystemExit, match="2"):
            example.main([f"--{option}=0"])
        assert f"--{option}: must " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["efficientnet_schedule", "groups", "low_precision"])
def test_recipes_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 120


# Figures of older examples.

OLDER = {
    "first_steps": [],
    "multi_host": ["--steps=3"],
}


@pytest.mark.parametrize("name", OLDER)
def test_older_examples_draw(name, tmp_path):
    figure = tmp_path / "figure.png"
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *OLDER[name]]
    done = subprocess.run(
        [*command, f"--output={figure}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(PNG)


def test_the_port_draws_part_two_alone(import_example, tmp_path):
    example = import_example("port_from_torch")
    example.draw([], [[0.5, 0.25], [0.75, 0.5]], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
