"""diagnose: the numbers that updates are made of, read off any state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

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
    step_size, saturation, sharpness = diagnose(state, 0.1, **options)
    assert sharpness is None
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
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(30):
        _, state = update(params, state)
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


@jax.jit
def diagnosed(state, matrix):
    """With the matrix as the Hessian."""

    def product(v):
        flat, unravel = ravel_pytree(v)
        return unravel(matrix @ flat)

    return diagnose(state, 0.1, 1e-3, hessian_vector_product=product)


def spread(size):
    """A symmetric matrix whose eigenvalues are both negative and positive."""
    square = np.random.default_rng(size).normal(size=(size, size))
    return square + square.T


MATRICES = {
    "indefinite": spread(7),
    # The eigenvalue of largest magnitude is negative.
    "mostly negative": spread(7) - 100 * np.ones((7, 7)),
    "negative definite": -spread(7) @ spread(7) - np.eye(7),
    "of rank one": np.outer(np.arange(7.0), np.arange(7.0)),
    "zero": np.zeros((7, 7)),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_sharpness_is_the_largest_eigenvalue(matrix, x64):
    grads = jax.tree.map(lambda g: g.astype(jnp.float64), GRADS)
    grads["kernel"] = grads["kernel"].at[2].set([1.0, 0.3])
    tx = rmsprop(0.1, 0.9, 1e-3)
    _, state = tx.update(grads, tx.init(grads))
    found = diagnosed(state, jnp.asarray(matrix))
    roots = np.sqrt(ravel_pytree(found.step_size)[0])
    expected = np.linalg.eigvalsh(roots[:, None] * matrix * roots)[-1]
    np.testing.assert_allclose(found.sharpness, expected, 1e-9, atol=1e-9)


def test_one_parameter_may_have_negative_sharpness():
    # The method ends after one step, and what follows must not count as 0.
    state = rmsprop().init(jnp.ones(1))
    found = diagnose(state, 0.1, 1.0, hessian_vector_product=lambda v: -3.0 * v)
    np.testing.assert_allclose(found.sharpness, -0.3, ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("momentum", "limit"),
    [
        ({}, 2.0),
        ({"momentum": 0.5}, 2 * (1 + 0.5)),
        ({"momentum": 0.5, "nesterov": True}, (2 + 2 * 0.5) / (1 + 2 * 0.5)),
    ],
    ids=["plain", "momentum", "nesterov"],
)
def test_steps_grow_where_sharpness_is_above_the_limit(momentum, limit):
    # Under a huge eps, RMSprop is gradient descent with rate lr / eps = 0.1.
    eps = 1e8
    tx = rmsprop(1e7, eps=eps, **momentum)

    def last(scale):
        curvature = scale * limit * jnp.array([10.0, 4.0])

        def step(carry, _):
            p, state = carry
            updates, state = tx.update(curvature * p, state, p)
            return (p + updates, state), None

        start = jnp.ones(2)
        run = start, tx.init(start)
        product = lambda v: curvature * v  # noqa: E731
        found = diagnose(run[1], 1e7, eps, hessian_vector_product=product)
        (p, _), _ = jax.lax.scan(step, run, length=400)
        return jnp.abs(p[0]), found.sharpness

    sizes, sharpness = jax.vmap(last)(jnp.array([0.98, 1.02]))
    # Rounding of 32 steps; seen: 3.2e-5.
    np.testing.assert_allclose(sharpness, [0.98 * limit, 1.02 * limit], 1e-4)
    assert sizes[0] < 0.05
    assert sizes[1] > 20


def test_sharpness_of_masked_parameters_in_half_precision():
    params = {"w": jnp.ones(3, jnp.bfloat16), "fixed": jnp.ones(2), "absent": None}
    mask = {"w": True, "fixed": False, "absent": None}
    tx = optax.masked(rmsprop(0.1, 0.0, 0.0), mask)
    state = tx.init(params)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    seen = []

    def product(v):
        seen.append(v)
        return jax.tree.map(lambda x: (3 * x).astype(jnp.bfloat16), v)

    found = diagnose(state, 0.1, 0.0, hessian_vector_product=product)
    np.testing.assert_allclose(found.sharpness, 0.3, 0.02)  # seen: 0.012
    assert found.sharpness.dtype == seen[0]["w"].dtype == jnp.float32
    assert seen[0]["absent"] is None


BAD_PRODUCTS = [
    (3.0, TypeError, "must be None or a function from v to H v, got 3.0"),
    (float, TypeError, "must be None or a function"),
    (lambda v: v["kernel"], ValueError, "must have the structure and shapes"),
    (lambda v: {**v, "scale": None}, ValueError, "structure of its argument: got"),
    (lambda v: {**v, "scale": v["none"]}, ValueError, r"'scale'\] has shape \(0,\)"),
    (
        lambda v: {**v, "scale": v["scale"].astype(jnp.complex64)},
        TypeError,
        "must be floating point",
    ),
]


@pytest.mark.parametrize(("product", "error", "text"), BAD_PRODUCTS)
def test_bad_products_are_refused(product, error, text):
    with pytest.raises(error, match="`hessian_vector_product` .*" + text):
        diagnose(rmsprop().init(PARAMS), hessian_vector_product=product)


def test_the_sharpness_of_complex_parameters_is_refused():
    state = rmsprop().init({"w": jnp.ones(2, jnp.complex64)})
    with pytest.raises(TypeError, match=r"`opt_state` .* complex64 at \['w'\]; "):
        diagnose(state, hessian_vector_product=lambda v: v)


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
