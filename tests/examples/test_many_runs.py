"""The example that tries a grid of settings at once: each run is a run by itself."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_rmsprop import rmsprop

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS = 30
TOLERANCE = 1e-5  # of parameters near 1 after 30 float32 steps; observed: 1.0e-6
# Relative, of a loss after 30 float64 steps; observed: 4.1e-8 in the wildest run. After
# 300 they are 0.4 apart: each step of these runs amplifies rounding errors.
TOLERANCE_64 = 4e-7


@pytest.fixture(scope="module")
def sweep(import_example):
    return import_example("sweep")


def train(sweep, settings, seeds, digits, dtype=jnp.float32):
    images, _, labels, _ = map(jnp.asarray, digits)
    stacked = {n: jnp.array([s[n] for s in settings], dtype) for n in settings[0]}
    first = [sweep.first_params(seed) for seed in range(seeds)]
    first = jax.tree.map(lambda *p: jnp.stack(p).astype(dtype), *first)
    batches = np.stack([sweep.batches_of(seed, STEPS) for seed in range(seeds)])
    return sweep.train_all(stacked, first, batches, images, labels)


def single_run(sweep, setting, seed, digits):
    """One run by itself, with Python numbers."""
    images, _, labels, _ = map(jnp.asarray, digits)
    tx, params = rmsprop(**setting), jax.tree.map(jnp.asarray, sweep.first_params(seed))

    @jax.jit
    def step(run, batch):
        params, state = run
        gradient = jax.grad(sweep.measure, has_aux=True)
        grads, _ = gradient(params, images[batch], labels[batch])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = params, tx.init(params)
    for batch in sweep.batches_of(seed, STEPS):
        run = step(run, batch)
    return run[0]


@pytest.mark.slow
def test_a_run_among_many_is_a_run_by_itself(sweep):
    digits = sweep._common.split_digits()
    settings = [sweep.SETTINGS[number] for number in (27, 80, 85)]
    assert {s["momentum"] for s in settings} == {0.0, 0.5, 0.9}
    settings.append({**settings[2], "eps": settings[2]["eps"] + 1e-3})  # the control
    together = train(sweep, settings, 2, digits)
    alone = single_run(sweep, settings[2], 1, digits)
    for name, p in alone.items():
        *_, found, control = together[name][1]
        np.testing.assert_allclose(found, p, rtol=0, atol=TOLERANCE)
        assert np.abs(control - p).max() > 10 * TOLERANCE  # observed: 3e-4


def test_a_setting_with_a_run_that_is_nan_loses(sweep):
    losses = np.linspace(1, 2, 2 * 162).reshape(2, 162)
    losses[1, 0] = np.nan
    rows = sweep.table(losses, np.ones_like(losses))
    assert np.nanargmin([row["loss"] for row in rows]) == 1
    assert rows[2]["loss"] == pytest.approx(losses[:, 2].mean())
    assert rows[2]["loss_std"] == pytest.approx(losses[:, 2].std())


@pytest.mark.slow
def test_unstable_runs_are_torchs_in_float64(sweep, monkeypatch, x64):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARKS)
    sys.modules.pop("many_runs", None)
    import many_runs

    digits = sweep._common.split_digits()
    digits[:2] = (images.astype(np.float64) for images in digits[:2])
    settings = [sweep.SETTINGS[number] for number in (133, 158, 161)]
    assert min(map(many_runs.longest_step, settings)) > many_runs.LONG_STEP
    params = train(sweep, settings, 1, digits, jnp.float64)
    for number, setting in enumerate(settings):
        last = jax.tree.map(lambda p: p[0, number], params)  # noqa: B023
        loss, _ = sweep.measure(last, *map(jnp.asarray, digits[1::2]))
        run = sweep.first_params(0), sweep.batches_of(0, STEPS), digits
        _, torchs = many_runs.run_in_torch(setting, *run)
        assert float(loss) == pytest.approx(torchs, rel=TOLERANCE_64)
