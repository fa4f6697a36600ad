"""diagnose: the numbers that updates are made of, read off any state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_rmsprop import (
    compress_state,
    diagnose,
    dialects,
    rmsprop,
    scale_by_rms,
)

ROUNDING = 3e-7  # relative, float32; seen: 1.2e-7
PARAMS = {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(()), "none": jnp.zeros((0,))}
GRADS = {
    "kernel": jnp.array([[1e-3, -2.0], [0.0, 30.0], [-4e5, 1e-12]]),
    "scale": jnp.array(-0.5),
    "none": jnp.zeros((0,)),
}


def after(tx, grads=GRADS, steps=3):
    state = tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(grads, state, PARAMS)
    return updates, state


@pytest.mark.parametrize("eps_in_sqrt", [False, True])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_step_sizes_times_gradients_are_the_updates(eps, centered, eps_in_sqrt):
    options = {"eps": eps, "eps_in_sqrt": eps_in_sqrt}
    updates, state = after(rmsprop(0.1, 0.9, centered=centered, **options))
    step_size, saturation = diagnose(state, 0.1, **options)
    made = jax.tree.map(lambda s, g: -s * g, step_size, GRADS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, ROUNDING), made, updates)
    largest = 0.1 / (eps**0.5 if eps_in_sqrt else eps) if eps else np.inf
    for size, part in zip(*map(jax.tree.leaves, (step_size, saturation)), strict=True):
        np.testing.assert_allclose(part, size / largest, ROUNDING, atol=1e-38)
        assert np.all((part >= 0) & (part <= 1))
        assert np.all(np.isfinite(size))


def test_eps_decides_where_gradients_vanish():
    _, state = after(scale_by_rms(eps=1e-2))
    saturation = diagnose(state, eps=1e-2).saturation["kernel"]
    assert saturation[1, 0] == 1  # of gradient 0
    assert saturation[2, 0] < 1e-6  # of 4e5


def test_masked_parameters_have_no_step_size():
    mask = {"kernel": True, "scale": False, "none": False}
    state = optax.masked(rmsprop(), mask).init(PARAMS)
    assert len(jax.tree.leaves(diagnose(state).step_size)) == 1


def test_of_a_partition_each_group_is_read_by_itself():
    labels = {"kernel": "slow", "scale": "fast", "none": "fast"}
    groups = {"slow": rmsprop(1e-3), "fast": rmsprop(1e-1)}
    _, state = after(optax.partition(groups, labels))
    with pytest.raises(ValueError, match=r"got 2; pass .*inner_states\[label\]"):
        diagnose(state)
    fast = diagnose(state.inner_states["fast"], 1e-1).step_size
    expected = diagnose(after(rmsprop(1e-1))[1], 1e-1).step_size
    np.testing.assert_array_equal(fast["scale"], expected["scale"])


@pytest.mark.usefixtures("standard_promotion")
def test_hyperparameters_are_read_off_the_state():
    tx = optax.inject_hyperparams(rmsprop)(learning_rate=0.1, eps=0.5)
    _, state = after(tx)
    numbers = {name: state.hyperparams[name] for name in ("learning_rate", "eps")}
    expected = diagnose(after(rmsprop(0.1, eps=0.5))[1], 0.1, 0.5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-6),
        diagnose(state, **numbers),
        expected,
    )


@pytest.mark.usefixtures("standard_promotion")
def test_a_schedule_is_read_at_the_update_made_last():
    schedule = optax.piecewise_constant_schedule(1.0, {2: 0.1, 3: 0.1})
    updates, state = after(rmsprop(schedule), steps=3)
    step_size = diagnose(state, schedule).step_size["scale"]
    np.testing.assert_allclose(-step_size * GRADS["scale"], updates["scale"], ROUNDING)
    untouched = rmsprop(schedule).init(PARAMS)
    assert np.all(diagnose(untouched, schedule, 1.0).step_size["kernel"] == 1)


def test_a_dialect_is_read_with_its_own_numbers():
    updates, state = after(dialects.keras(0.1, rho=0.5, epsilon=1e-3))
    step_size = diagnose(state, 0.1, 1e-3, eps_in_sqrt=True).step_size
    jax.tree.map(
        lambda u, s, g: np.testing.assert_allclose(u, -s * g, ROUNDING),
        updates,
        step_size,
        GRADS,
    )


@pytest.mark.parametrize(
    "dtype", [pytest.param(jnp.uint8, marks=pytest.mark.slow), jnp.bfloat16]
)
def test_a_compressed_state_is_read_as_it_is_kept(dtype):
    params = jnp.ones((64, 64))
    tx = compress_state(rmsprop(eps=1e-3), dtype)
    state = tx.init(params)
    for _ in range(30):
        _, state = tx.update(params, state)
    step_size = diagnose(state, 1.0, 1e-3).step_size
    exact = 1 / (np.sqrt(1 - 0.99**30) + 1e-3)
    assert 0.001 < np.std(step_size) / exact < 0.1  # of levels
    np.testing.assert_allclose(np.mean(step_size), exact, rtol=0.02)


def test_parts_of_complex_numbers_have_step_sizes_of_their_own():
    g = jnp.array([3 - 4j])
    tx = scale_by_rms(0.75, 0.0)
    _, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(
        diagnose(state, 1.0, 0.0).step_size, [2 / 3 + 0.5j], 1e-6
    )


def test_it_is_traced_and_mapped():
    _, state = after(rmsprop(0.1, eps=1e-3))
    expected = diagnose(state, 0.1, 1e-3)
    compiled = jax.jit(diagnose)(state, 0.1, 1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-6), compiled, expected
    )
    many = jax.vmap(diagnose, (None, 0))(state, jnp.array([0.1, 0.2]))
    ratio = many.step_size["kernel"][1] / many.step_size["kernel"][0]
    np.testing.assert_allclose(ratio, np.full((3, 2), 2.0), 1e-6)


def test_many_runs_are_read_by_vmap():
    states = jax.vmap(rmsprop().init)(jnp.ones((3, 3)))
    with pytest.raises(ValueError, match=r"got shape \(3,\) at \.count; use jax\.vmap"):
        diagnose(states)
    assert jax.vmap(diagnose)(states).step_size.shape == (3, 3)


def test_the_state_is_left_as_it_is():
    _, state = after(rmsprop())
    before = jax.tree.map(np.array, state)
    diagnose(state)
    jax.tree.map(np.testing.assert_array_equal, before, state)


ERRORS = [
    ({"learning_rate": -1.0}, ValueError, r"`learning_rate` must be a number in \[0"),
    ({"learning_rate": "fast"}, TypeError, "`learning_rate` must be a number"),
    ({"eps": np.inf}, ValueError, "`eps` must be a number"),
    ({"eps_in_sqrt": 1}, TypeError, "`eps_in_sqrt` must be True or False"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ERRORS)
def test_bad_arguments_are_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        diagnose(rmsprop().init(PARAMS), **arguments)


@pytest.mark.parametrize("state", [None, (), optax.adam(1e-3).init(PARAMS)])
def test_other_states_are_refused(state):
    with pytest.raises(ValueError, match=r"`opt_state` must have one .* got 0; pass"):
        diagnose(state)
