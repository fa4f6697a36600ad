"""Finite gradients give finite, and right, numbers: in every dtype, for ever.

Exact arithmetic is `reference.rmsprop` in float64, on the gradients as rounded.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from helpers import slow_but
from optax_rmsprop import rmsprop, scale_by_rms, scale_by_stddev

REAL = ["float16", "bfloat16", "float32", "float64"]
ALL = [*REAL, "complex64", "complex128"]

pytestmark = pytest.mark.usefixtures("x64")


def train(tx, gradients):
    """The updates after every gradient, and the last state.

    Gradients may be a tree: leaves do not touch one another, so that one program
    serves many dtypes and sizes.
    """

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), updates

    params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), gradients)
    carry = (params, tx.init(params))
    (_, state), updates = jax.jit(lambda c, g: jax.lax.scan(step, c, g))(
        carry, gradients
    )
    return updates, state


def exact_updates(gradients, **options):
    """Steps of the reference on the same gradients, which must not depend on params."""
    gradients = np.asarray(gradients.astype(jnp.float64))
    params = np.zeros_like(gradients[0])
    path = [p for p, _ in reference.rmsprop(params, gradients, **options)]
    return np.diff(path, axis=0, prepend=params[None])


def error(updates, exact):
    """The largest difference, relative to the exact value."""
    return np.max(np.abs(np.asarray(updates, np.float64) / exact - 1))


def is_finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def nearly_constant(noise, dtype):
    rng = np.random.default_rng(0)
    sizes = np.array([1.0, -0.3, 2.9])
    return jnp.asarray(sizes * (1 + noise * rng.normal(size=(4000, 3))), dtype)


# Relative noises for an eps that matters beside the deviation they make.
NOISES = {1e-2: (0.0, 1e-6, 1e-4), 1e-8: (0.03,)}


@pytest.mark.parametrize("eps", slow_but([1e-2], NOISES))
@pytest.mark.parametrize("decay", slow_but([0.99], [0.9, 0.99, 0.999]))
def test_centered_on_nearly_constant_gradients_is_exact(decay, eps):
    gradients = {
        (dtype, noise): nearly_constant(noise, dtype)
        for dtype in REAL
        for noise in NOISES[eps]
    }
    options = {"decay": decay, "eps": eps, "centered": True}
    updates, state = train(rmsprop(**options), gradients)
    assert is_finite(state)
    for case, leaf in gradients.items():
        assert error(updates[case], exact_updates(leaf, **options)) <= 0.01, case


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_a_subtracted_variance_is_negative_on_the_same_gradients(decay):
    d, a = np.float32(decay), np.float32(1 - decay)
    v = m = np.zeros(3, np.float32)
    least = np.inf
    for g in np.asarray(nearly_constant(1e-4, "float32")):
        v, m = d * v + a * g * g, d * m + a * g
        least = min(least, np.min(v - m * m))
    assert least < 0  # torch, optax, Keras and TensorFlow take its root: NaN


@pytest.mark.parametrize(  # every two of them with every pair of values
    ("scale_by", "eps_in_sqrt", "bias_correction"),
    [
        (scale_by_rms, False, False),
        (scale_by_rms, True, True),
        (scale_by_stddev, False, True),
        (scale_by_stddev, True, False),
    ],
)
def test_zero_over_zero_is_zero(scale_by, eps_in_sqrt, bias_correction):
    tx = scale_by(eps=0.0, eps_in_sqrt=eps_in_sqrt, bias_correction=bias_correction)
    dtypes = ("float16", "float32", "complex128")
    updates, state = train(tx, {dtype: jnp.zeros((3, 2), dtype) for dtype in dtypes})
    for leaf in updates.values():
        assert np.all(np.asarray(leaf) == 0)
    assert is_finite(state)


def test_the_second_epsilon_is_lost_in_larger_moments():
    gradients = jnp.array([[1e-13, 1.0]], jnp.float32)  # squares of 1e-26 and 1
    updates, _ = train(scale_by_rms(0.9, eps=0.0), gradients)
    np.testing.assert_allclose(updates, [[1 / np.sqrt(0.1)] * 2], rtol=3e-7)


@pytest.mark.parametrize(
    ("scale_by", "eps_in_sqrt"), [(scale_by_rms, False), (scale_by_stddev, True)]
)
def test_a_spike_has_derivatives(scale_by, eps_in_sqrt):
    def update(decay, eps, g):
        tx = scale_by(decay, eps, eps_in_sqrt=eps_in_sqrt)
        return tx.update(g, tx.init(g))[0]

    compiled = jax.jit(jax.jacrev(update, (0, 1, 2)))
    # The update is (1 - decay)**-0.5, centered (decay * (1 - decay))**-0.5.
    exact = {scale_by_rms: 500, scale_by_stddev: 497.4}[scale_by]
    for size in (9e18, 3e25, 3e38):
        by_decay, by_eps, by_gradient = compiled(*map(jnp.float32, (0.99, 1e-8, size)))
        np.testing.assert_allclose(by_decay, exact, rtol=0.01)
        np.testing.assert_allclose((by_eps, by_gradient), 0, atol=1e-16)


@pytest.mark.parametrize(("centered", "decay"), [(False, 0.99), (True, 0.9)])
def test_a_spike_is_bounded_and_forgotten(centered, decay):
    # The root of the clipped spike, 9e18 * sqrt(1 - decay), fades in 2 log(9e18)
    # memories.
    steps = int(100 / (1 - decay))
    gradients = np.ones(steps)
    gradients[20] = 3e25
    gradients[1::2] *= -1  # centered: a deviation to measure
    lr = 1e-2
    tx = rmsprop(lr, decay, centered=centered)
    dtypes = ("bfloat16", "float32", "complex64")
    updates, state = train(tx, {d: jnp.asarray(gradients, d) for d in dtypes})
    bound = lr / np.sqrt(1 - decay)
    assert is_finite(state)
    assert is_finite(updates)
    for dtype in dtypes:
        size = np.abs(np.asarray(updates[dtype], np.complex128))
        assert bound * 0.99 <= size[20] <= bound * 1.01, dtype
        assert size[21] < 1e-15, dtype
        np.testing.assert_allclose(size[-1], lr, rtol=0.1, err_msg=dtype)


@pytest.mark.parametrize(  # every two of them with every pair of values
    ("scale_by", "bias_correction", "decay"),
    [
        (scale_by, bias_correction, decay)
        for i, decay in enumerate([0.01, 0.9999])
        for scale_by in (scale_by_rms, scale_by_stddev)
        for bias_correction in [(scale_by is scale_by_rms) == (i % 2 == 0)]
    ],
)
def test_the_largest_numbers_stay_finite(scale_by, bias_correction, decay):
    signs = np.where(np.arange(300) // 50 % 2, -1.0, 1.0)
    gradients = np.stack([signs, np.abs(signs), signs * (np.arange(300) % 7 == 0)], 1)
    gradients = {
        d: jnp.asarray(gradients, d) * jnp.asarray(float(jnp.finfo(d).max), d)
        for d in ALL
    }
    updates, state = train(scale_by(decay, bias_correction=bias_correction), gradients)
    assert is_finite(state)
    assert is_finite(updates)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_weight_decay_of_the_largest_numbers_is_finite(dtype, decoupled):
    largest = float(jnp.finfo(dtype).max)
    params = {"w": jnp.asarray([largest, -largest, 1.0, jnp.inf], dtype)}
    gradients = {"w": jnp.asarray([largest, -largest, jnp.inf, 1.0], dtype)}
    for mask in (None, {"w": True}):
        tx = rmsprop(
            weight_decay=10.0, decoupled_weight_decay=decoupled, weight_decay_mask=mask
        )
        updates, _ = tx.update(gradients, tx.init(params), params)
        exact = [-0.01 * largest, 0.01 * largest] if decoupled else [-0.1, 0.1]
        np.testing.assert_allclose(updates["w"][:2].real, exact, rtol=1e-5)
        # An infinite gradient passes as without weight decay. The state clips it.
        assert not jnp.isfinite(updates["w"][2:].real).any()


@pytest.mark.parametrize("centered", [False, True])
def test_an_infinite_gradient_is_forgotten_with_weight_decay_too(centered):
    gradients = jnp.ones((2000, 2), jnp.float32).at[5, 0].set(jnp.inf)
    gradients = gradients.at[1::2].multiply(-1)
    tx = rmsprop(decay=0.9, centered=centered, weight_decay=1e-3)
    params = jnp.zeros(2, jnp.float32)
    state = tx.init(params)

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, state, gradients)
    assert is_finite(state)
    assert np.isnan(updates[5]).tolist() == [True, False]
    np.testing.assert_allclose(updates[-1, 0], updates[-1, 1], rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_centered_quotient_is_exact_up_to_1e22_and_limited(dtype):
    tx = scale_by_stddev(eps=1e-8, bias_correction=True)
    g = jnp.asarray([1.0, 1e10, 1e14], dtype)
    np.testing.assert_allclose(tx.update(g, tx.init(g))[0], g / 1e-8, rtol=2e-7)
    tx = scale_by_stddev(eps=0.0, bias_correction=True)
    if dtype == "float32":
        largest = tx.update(g * 1e4, tx.init(g))[0][1:]
        np.testing.assert_array_less(largest, 2.0**100)
        np.testing.assert_array_less(2.0**95, largest)


@pytest.mark.parametrize("centered", [False, True])
def test_real_gradients_of_complex_parameters(centered):
    tx = rmsprop(momentum=0.9, centered=centered)
    state = tx.init(jnp.zeros(2, jnp.complex64))
    g = jnp.array([1.0, -2.0], jnp.float32)
    for params in (None, jnp.zeros(2, jnp.complex64)):
        updates, new = tx.update(g, state, params)
        as_complex, _ = tx.update(g.astype(jnp.complex64), state, params)
        assert updates.dtype == as_complex.dtype == jnp.complex64
        np.testing.assert_array_equal(updates, as_complex)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_steady_centered_gradients_is_finite(nesterov):
    sizes = {
        dtype: jnp.asarray([1.0, 1e18, float(jnp.finfo(dtype).max)], dtype)
        for dtype in ("float32", "float64")
    }
    options = {"centered": True, "bias_correction": True, "eps": 0.0}
    tx = rmsprop(momentum=1 - 2**-25, nesterov=nesterov, **options)
    steady = jax.tree.map(lambda x: jnp.broadcast_to(x, (2000, 3)), sizes)
    updates, state = train(tx, steady)
    assert is_finite(updates)
    assert is_finite(state)


@pytest.mark.parametrize("decay", [1e-45, 1e-38, 1e-30])
def test_next_to_no_memory_is_finite(decay):
    gradients = jnp.ones((3, 1), jnp.float32)
    updates, state = train(rmsprop(decay=decay, centered=True), gradients)
    assert is_finite(updates)
    assert is_finite(state)


@pytest.mark.parametrize("decay", [0.9, 0.999])
@pytest.mark.parametrize("wide", [False, True])
def test_the_first_bias_corrected_gradient_has_no_variance(wide, decay):
    jax.config.update("jax_enable_x64", wide)  # without it decay is rounded to float32
    gradients = jnp.array([[1.0, 2.5, -1e-3]], jnp.float32)
    tx = scale_by_stddev(decay, eps=1e-8, bias_correction=True)
    updates, _ = train(tx, gradients)
    np.testing.assert_allclose(updates, gradients / 1e-8, rtol=1e-6)


@pytest.mark.parametrize(  # every two of them with every pair of values
    ("decay", "momentum", "centered"),
    [(0.9, 0.0, False), (0.9, 0.9, True), (0.99, 0.0, True), (0.99, 0.9, False)],
)
def test_float16_gradients_follow_exact_arithmetic(decay, momentum, centered):
    rng = np.random.default_rng(1)
    sizes = np.repeat([1e-5, 300.0], 4)
    gradients = jnp.asarray(sizes * rng.uniform(-1, 1, (500, 8)), jnp.float16)
    options = {"decay": decay, "momentum": momentum, "centered": centered, "eps": 1e-8}
    updates, _ = train(rmsprop(**options), gradients)
    exact = exact_updates(gradients, **options)
    # A float16 has 11 bits, and steps below 6e-5 fewer.
    np.testing.assert_allclose(updates, exact, rtol=1e-3, atol=1e-7)


def test_low_precision_parameters_keep_a_true_second_moment():
    rng = np.random.default_rng(2)
    numbers = rng.normal(size=(4000, 16))
    gradients = {d: jnp.asarray(numbers, d) for d in ("bfloat16", "float16")}
    _, state = train(rmsprop(decay=0.999), gradients)
    for dtype, leaf in gradients.items():
        *_, (_, exact) = reference.rmsprop(
            np.zeros(16), np.asarray(leaf, np.float64), decay=0.999
        )
        nu = optax.tree.get(state, "nu")[dtype]
        np.testing.assert_allclose(nu, exact["nu"], rtol=0.02, err_msg=dtype)


@pytest.mark.parametrize("options", [{}, {"centered": True, "momentum": 0.9}], ids=str)
def test_a_gradient_that_is_not_finite_shows(options):
    numbers = np.ones((3, 4))
    numbers[1, :3] = np.nan, np.inf, -np.inf
    gradients = {dtype: jnp.asarray(numbers, dtype) for dtype in REAL}
    updates, _ = train(rmsprop(**options), gradients)
    for dtype in REAL:
        shows = np.isnan(np.asarray(updates[dtype], np.float64))
        assert shows[1, :3].all(), dtype
        assert not shows[0].any(), dtype
        assert not shows[:, 3].any(), dtype


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_momentum_and_clipping_do_not_hide_it_either(bad):
    tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(momentum=0.9))
    updates, _ = train(tx, jnp.ones((2, 2)).at[1, 0].set(bad))
    assert np.isnan(updates[1]).any()


# Properties. Hyperparameters are arrays, so that one compilation serves all examples.

repeatable = settings(derandomize=True, deadline=None, max_examples=25)
fractions = st.floats(0, 1, width=32)
SHAPE = 2, 3
STEPS = 5
RTOL = {"float32": 3e-4, "float64": 1e-12}  # observed: 7e-5, 1e-13


@functools.partial(jax.jit, static_argnames=("centered", "eps_in_sqrt"))
def train_any(gradients, hyperparameters, centered, eps_in_sqrt):
    tx = rmsprop(**hyperparameters, centered=centered, eps_in_sqrt=eps_in_sqrt)
    return train(tx, gradients)


def random_gradients(seed, low, high, dtype):
    """Every element of its own size, from 10**low to 10**high, and some zeros."""
    rng, shape = np.random.default_rng(seed), (STEPS, *SHAPE)
    sizes = rng.choice([0, 1, 1, 1], shape) * 10.0 ** rng.uniform(low, high, shape)
    most = float(jnp.finfo(dtype).max)
    values = np.clip(sizes * rng.normal(size=shape), -most, most)
    return jnp.asarray(values, dtype)


@repeatable
@given(
    centered=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    decay=fractions.filter(lambda x: x < 1),
    momentum=fractions.filter(lambda x: x < 1),
    eps=st.sampled_from([0.0, 1e-30, 1e-8, 1e-2]),
    initial_scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
)
def test_anything_finite_stays_finite(centered, seed, **hyperparameters):
    gradients = {dtype: random_gradients(seed, -30, 30, dtype) for dtype in ALL}
    hyperparameters = {k: jnp.float32(v) for k, v in hyperparameters.items()}
    with jax.numpy_dtype_promotion("standard"):  # float32 arrays on float64 leaves
        updates, state = train_any(gradients, hyperparameters, centered, False)
    assert is_finite(updates)
    assert is_finite(state)


@repeatable
@given(
    dtype=st.sampled_from(["float32", "float64"]),
    centered=st.booleans(),
    eps_in_sqrt=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    scale=st.integers(-12, 12),
    decay=st.sampled_from([0.5, 0.9, 0.99]),
    momentum=st.sampled_from([0.0, 0.9]),
    eps=st.sampled_from([1e-20, 1e-8, 1e-2]),
)
def test_gradients_of_any_scale_follow_exact_arithmetic(
    dtype, centered, eps_in_sqrt, seed, scale, **hyperparameters
):
    gradients = random_gradients(seed, scale - 1, scale, dtype)
    arrays = {k: jnp.asarray(v, dtype) for k, v in hyperparameters.items()}
    updates, _ = train_any(gradients, arrays, centered, eps_in_sqrt)
    exact = exact_updates(
        gradients, **hyperparameters, centered=centered, eps_in_sqrt=eps_in_sqrt
    )
    np.testing.assert_allclose(updates, exact, rtol=RTOL[dtype])
