"""scaled_to_batch: runs whose gradients are noise do not depend on the batch size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_rmsprop import rmsprop, scaled_to_batch

BASE = {"learning_rate": 1e-3, "decay": 0.999, "eps": 0.05}


@pytest.mark.parametrize("eps_in_sqrt", [False, True])
def test_the_rule(eps_in_sqrt):
    # arXiv:2205.10287: the rate √κ times, 1 - decay κ times, eps 1/√κ times.
    found = scaled_to_batch(16, **BASE, eps_in_sqrt=eps_in_sqrt)
    expected = {
        "learning_rate": 4e-3,
        "decay": 0.984,
        "eps": 0.05 / (16 if eps_in_sqrt else 4),
        "eps_in_sqrt": eps_in_sqrt,
    }
    assert found == pytest.approx(expected, rel=1e-14)


def test_there_and_back():
    there = scaled_to_batch(4, **BASE, eps_in_sqrt=True)
    assert scaled_to_batch(0.25, **there) == pytest.approx(
        {**BASE, "eps_in_sqrt": True}, rel=1e-12
    )


def test_a_schedule_keeps_its_place_in_the_data():
    table = jnp.arange(100.0)  # a schedule may index an array
    faster = scaled_to_batch(4, learning_rate=lambda count: table[count])
    slower = scaled_to_batch(0.25, learning_rate=lambda count: table[count])
    assert [float(faster["learning_rate"](i)) for i in (0, 1, 24)] == [0, 8, 192]
    rates = jax.vmap(slower["learning_rate"])(jnp.arange(9))
    np.testing.assert_array_equal(rates, np.arange(9) // 4 / 2)
    by_optax = scaled_to_batch(4, learning_rate=optax.linear_schedule(1.0, 0.0, 40))
    np.testing.assert_allclose(by_optax["learning_rate"](5), 2 * 0.5, 1e-6)


@functools.partial(jax.jit, static_argnums=0)
def spread(factor, learning_rate, decay, eps):
    """The spread of parameters with curvature and much noise, on the way.

    With noise of size 1 for each example, a batch has noise of size 1/√factor.
    """
    tx = rmsprop(learning_rate, decay, eps)
    steps, points, start = 16_384 // factor, 8, jnp.full(512, 0.5)

    def step(run, key):
        p, state = run
        noise = jax.random.normal(key, p.shape) / factor**0.5
        updates, state = tx.update(0.2 * p + noise, state, p)
        return (p + updates, state), None

    def until_next_point(run, keys):
        run, _ = jax.lax.scan(step, run, keys)
        return run, jnp.sqrt(jnp.mean(run[0] ** 2))

    keys = jax.random.split(jax.random.key(factor), (points, steps // points))
    return jax.lax.scan(until_next_point, (start, tx.init(start)), keys)[1]


@pytest.mark.slow
def test_noisy_runs_agree_at_the_same_number_of_examples():
    first = spread(1, **BASE)
    scaled = scaled_to_batch(16, **BASE)
    del scaled["eps_in_sqrt"]
    np.testing.assert_allclose(spread(16, **scaled), first, 0.12)  # seen: 0.07
    linear = {**BASE, "learning_rate": 16 * BASE["learning_rate"]}
    for other in (BASE, linear, {**scaled, "eps": 0.5}):
        assert np.abs(spread(16, **other) / first - 1).max() > 0.5


def test_it_is_traced():
    def rate_and_decay(factor, decay):
        found = scaled_to_batch(factor, learning_rate=1e-3, decay=decay)
        return found["learning_rate"], found["decay"]

    found = jax.jit(rate_and_decay)(jnp.float32(4), jnp.float32(0.99))
    np.testing.assert_allclose(found, (2e-3, 0.96), 1e-6)


ERRORS = [
    ({"factor": 100}, ValueError, r"below 1 / \(1 - decay\) = 100, got 100, with"),
    ({"factor": jnp.float32(1000)}, ValueError, r"below 1 / .* = 100, got 1000, with"),
    ({"factor": 0}, ValueError, r"`factor` must be a number in \(0, inf\), got 0"),
    ({"factor": "4"}, TypeError, "`factor` must be a number"),
    ({"factor": 4, "decay": 1.0}, ValueError, "`decay` must be a number"),
    ({"factor": 4, "eps": -1.0}, ValueError, "`eps` must be a number"),
    ({"factor": 4, "learning_rate": -1.0}, ValueError, "`learning_rate` must be"),
    ({"factor": 4, "eps_in_sqrt": 1}, TypeError, "`eps_in_sqrt` must be True or"),
    ({"factor": 4, "alpha": 0.9}, TypeError, "here it is `decay`"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ERRORS)
def test_bad_arguments_are_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        scaled_to_batch(**arguments)
