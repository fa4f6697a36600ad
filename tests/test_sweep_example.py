"""The example that tries a grid of settings at once: each run is a run by itself."""

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

import optax

from optax_rmsprop import rmsprop

EXAMPLES = Path(__file__).parent.parent / "examples"
TOLERANCE = 1e-5  # of parameters near 1 after 30 float32 steps; observed: 1.0e-6
# Relative, of a loss after 30 float64 steps; observed: 4.1e-8 in the wildest run. After
# 300 they are 0.4 apart: each step of these runs enlarges what rounding does.
TOLERANCE_64 = 4e-7


@pytest.fixture(scope="module")
def example(import_example):
    return import_example("sweep")


def arrays(settings, dtype=jnp.float32):
    return {n: jnp.array([s[n] for s in settings], dtype) for n in settings[0]}


@pytest.fixture(scope="module")
def digits(example):
    images, held_out, *labels = example.split_digits()
    return [images.reshape(-1, 64), held_out.reshape(-1, 64), *labels]


def batches_of(example, *options):
    return example.batches_of(example.command_line().parse_args(options))


def test_it_writes_a_table_and_names_its_best(tmp_path):
    figure = tmp_path / "new folder" / "sweep.png"
    short = ["--rounds=1", "--seeds=2", "--repeats=1", "--torch-runs=0"]
    command = [sys.executable, str(EXAMPLES / "sweep.py"), *short, "--output", figure]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    progress, last = done.stdout.splitlines()
    assert progress.startswith("round  1 of 1, ")
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert last.endswith(f"over 2 seeds; figure in {figure}")

    record = json.loads(figure.with_suffix(".json").read_text())
    rows = record["settings"]
    best = min(rows, key=lambda row: row["loss"])
    names = ("learning_rate", "decay", "momentum", "eps")
    assert len(rows) == 162
    assert len({tuple(row[name] for name in names) for row in rows}) == 162
    assert record["runs"] == 324
    found = re.match(
        r"best: learning_rate (\S+), decay (\S+), momentum (\S+), eps (\S+); held-out "
        r"loss (\S+) ± (\S+), accuracy (\S+)% ± (\S+)% ",
        last,
    )
    *named, loss, _, accuracy, _ = map(float, found.groups())
    assert named == [best[name] for name in names]
    assert loss == pytest.approx(best["loss"], abs=6e-5)
    assert accuracy == pytest.approx(100 * best["accuracy"], abs=0.06)


def test_a_run_that_is_not_finite_loses(example):
    losses = np.linspace(1, 2, 2 * 162).reshape(2, 162)
    losses[1, 0], losses[0, 1] = np.nan, np.inf
    rows = example.table(losses, np.ones_like(losses))
    json.dumps(rows, allow_nan=False)
    assert rows[0]["loss"] is rows[1]["loss"] is None
    assert example.best_of(rows) is rows[2]
    assert rows[2]["loss"] == pytest.approx(losses[:, 2].mean())
    assert rows[2]["loss_std"] == pytest.approx(losses[:, 2].std())


def single_run(example, setting, seed, digits, batches):
    """One run by itself, with Python numbers."""
    tx = rmsprop(**setting)
    params = jax.tree.map(jnp.asarray, example.first_params(seed))
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        def loss_of(params):
            images, _, labels, _ = map(jnp.asarray, digits)
            return example.loss_and_accuracy(params, images[batch], labels[batch])[0]

        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = step(params, state, batch)
    return params


def test_a_run_among_many_is_a_run_by_itself(example, digits):
    settings = [example.SETTINGS[number] for number in (27, 80, 85)]
    assert {s["momentum"] for s in settings} == {0.0, 0.5, 0.9}
    batches = batches_of(example, "--rounds=1", "--seeds=2")
    stacked, (images, _, labels, _) = arrays(settings), map(jnp.asarray, digits)
    runs = example.start(stacked, 2)
    (params, _), losses = example.one_round(stacked, runs, images, labels, batches[0])
    assert losses.shape == (2, 3)
    for seed, number in ((0, 0), (1, 1), (1, 2)):
        setting = settings[number]
        alone = single_run(example, setting, seed, digits, batches[0, seed])
        other = {**setting, "eps": setting["eps"] + 1e-3}  # observed: 3e-4
        control = single_run(example, other, seed, digits, batches[0, seed])
        for name, p in alone.items():
            together = params[name][seed, number]
            np.testing.assert_allclose(together, p, rtol=0, atol=TOLERANCE)
            assert np.abs(together - control[name]).max() > 10 * TOLERANCE


def test_unstable_runs_are_torchs_in_float64(example, digits, x64):
    pytest.importorskip("torch")
    sweep_torch = importlib.import_module("sweep_torch")
    settings = [example.SETTINGS[number] for number in (133, 158, 161)]
    assert min(map(sweep_torch.longest_step, settings)) > sweep_torch.LONG_STEP
    stacked = arrays(settings, jnp.float64)
    digits = [d.astype(np.float64) for d in digits[:2]] + digits[2:]
    images, held_out_images, labels, held_out_labels = map(jnp.asarray, digits)
    batches = batches_of(example, "--rounds=1", "--seeds=1")
    first = {n: p.astype(np.float64) for n, p in example.first_params(0).items()}
    params = {n: jnp.stack([jnp.asarray(p)] * 3)[None] for n, p in first.items()}
    init = jax.vmap(lambda setting, p: rmsprop(**setting).init(p))
    runs = params, jax.vmap(init, (None, 0))(stacked, params)
    with jax.numpy_dtype_promotion("standard"):  # labels are int32
        runs, _ = example.one_round(stacked, runs, images, labels, batches[0])
    for number, setting in enumerate(settings):
        last = jax.tree.map(lambda p: p[0, number], runs[0])  # noqa: B023
        with jax.numpy_dtype_promotion("standard"):
            loss, _ = example.loss_and_accuracy(last, held_out_images, held_out_labels)
        _, torchs = sweep_torch.run(setting, first, digits, batches[:, 0])
        assert float(loss) == pytest.approx(torchs, rel=TOLERANCE_64)


def test_it_reports_the_ratio_and_checks_the_losses(example, capsys):
    pytest.importorskip("torch")
    sweep_torch = importlib.import_module("sweep_torch")
    seconds = {"compilation": 2.0, "jax": [2.0, 3.0, 2.0], "torch": [1.0, 1.0, 2.0]}
    settings = example.SETTINGS
    losses = np.ones((5, 162))
    sweep_torch.report(seconds, losses, {(0, 0): 1.0, (161, 4): 2.0}, settings)
    printed = capsys.readouterr().out
    assert "torch: 2 of these runs" in printed
    assert "scaled to 810 runs: 405.00 (405.00 to 810.00) s" in printed
    assert "over JAX's: 202.50 (135.00 to 405.00); with compilation 101.25" in printed
    assert "1 runs: within 0e+00 of torch's" in printed
    assert "1 with long steps, which rounding parts: within 5e-01" in printed
    for loss in (1.01, math.nan):
        with pytest.raises(SystemExit, match="expected 1e-03"):
            sweep_torch.report(seconds, losses, {(0, 0): loss}, settings)


def test_it_says_when_torch_is_missing(example, monkeypatch, capsys):
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    assert example.command_line().parse_args([]).torch_runs == 0
    with pytest.raises(SystemExit, match="2"):
        example.main(["--torch-runs=2"])
    assert "needs torch: pip install torch" in capsys.readouterr().err


BAD_OUTPUTS = {
    "sweep.pdf": r"--output: must end in \.png, got sweep\.pdf",
    f"{__file__}/sweep.png": "--output: must be in a folder that can be made: ",
}


@pytest.mark.parametrize(("output", "says"), BAD_OUTPUTS.items())
def test_a_bad_output(example, output, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main(["--output", output])
    assert re.search(says, capsys.readouterr().err)


def test_it_explains_every_option(example):
    explained = {a.dest: a.help for a in example.command_line()._actions}
    names = {"rounds", "seeds", "batch_size", "torch_runs", "repeats", "output"}
    assert explained.keys() == names | {"help"}
    assert all(explained.values())
