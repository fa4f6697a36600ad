"""Derivatives through updates: right, finite, and in both modes the same.

Forward mode goes through the formulas in their order. Reverse mode goes backwards, and
may overflow on its way to a number that is finite.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_rmsprop import rmsprop, scale_by_rms, scale_by_stddev

pytestmark = pytest.mark.usefixtures("x64")

STEPS = 4
# Every program takes seconds to compile, so every pair of options is in one of these.
PROGRAMS = [
    (scale_by_rms, {"bias_correction": False, "eps_in_sqrt": False}, "float32"),
    (scale_by_rms, {"bias_correction": True, "eps_in_sqrt": True}, "float64"),
    (scale_by_stddev, {"bias_correction": True, "eps_in_sqrt": False}, "float32"),
    (scale_by_stddev, {"bias_correction": False, "eps_in_sqrt": True}, "float64"),
]


def updates_of(arguments, scale_by, **options):
    gradients, numbers = arguments
    tx = scale_by(**numbers, **options)

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]


def textbook_updates_of(arguments, scale_by, bias_correction, eps_in_sqrt):
    gradients, numbers = arguments
    old, mean, updates = numbers["initial_scale"], 0.0, []
    under, outside = (numbers["eps"] * float(x) for x in (eps_in_sqrt, not eps_in_sqrt))
    for t, g in enumerate(gradients, start=1):
        a = 1 - numbers["decay"]
        a = a / (1 - numbers["decay"] ** t) if bias_correction else a
        square = g**2 if scale_by is scale_by_rms else (1 - a) * (g - mean) ** 2
        old = (1 - a) * old + a * square
        mean = (1 - a) * mean + a * g
        updates.append(g / (jnp.sqrt(old + under) + outside))
    return jnp.stack(updates)


def second(f):
    """The product of a vector with the second derivatives of f's sum.

    All of them would take JAX half a minute to trace and compile.
    """

    def product(at, vector):
        return jax.jvp(jax.grad(lambda at: jnp.sum(f(at))), (at,), (vector,))[1]

    return product


def second_along_a_line(f):
    """With a vector in which no two numbers are equal."""
    return lambda at: second(f)(at, jax.tree.map(jnp.cos, at))


def of_textbook():
    """Forward mode is tested below."""
    pairs = (jax.jacrev, PROGRAMS), (second_along_a_line, PROGRAMS[1::2])
    for derivatives, programs in pairs:
        for program in programs:
            quick = derivatives is jax.jacrev and program is PROGRAMS[2]
            marks = [pytest.mark.slow] * (not quick)
            name = f"{derivatives.__name__}-{program[0].__name__}-{program[2]}"
            yield pytest.param(derivatives, *program, marks=marks, id=name)


@pytest.mark.parametrize(
    ("derivatives", "scale_by", "options", "dtype"), list(of_textbook())
)
def test_derivatives_are_those_of_the_textbook(derivatives, scale_by, options, dtype):
    scale = 1.0 - options["bias_correction"]
    numbers = {"decay": 0.7, "eps": 0.1, "initial_scale": scale}
    numbers = {name: jnp.asarray(x, dtype) for name, x in numbers.items()}
    at = jnp.array([0.3, -1.0, 0.2], dtype), numbers
    ours, exact = (
        functools.partial(f, scale_by=scale_by, **options)
        for f in (updates_of, textbook_updates_of)
    )
    leaves = (jax.tree.leaves(jax.jit(derivatives(f))(at)) for f in (ours, exact))
    for got, expected in zip(*leaves, strict=True):
        assert np.isfinite(got).all()
        # The textbook's root has none where the first centered variance is 0.
        expected = np.where(np.isfinite(expected), expected, got)
        tolerance = {"float32": 1e-3, "float64": 1e-9}[dtype]
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@functools.partial(
    jax.jit, static_argnames=("scale_by", "bias_correction", "eps_in_sqrt")
)
def jacobians(arguments, **options):
    f = functools.partial(updates_of, **options)
    return f(arguments), jax.jacfwd(f)(arguments), jax.jacrev(f)(arguments)


SHAPES = [
    [1, 1, 1, 1],
    [1, 1 + 1e-6, 1, 1],
    [0, 0, 1, 0],
    [1, 0, 0, 0],
    [0, 0, 0, 0],
    [1, -1, 3, 0.1],
    [1e-9, 1, 1, 1],
]
# Observed: 1.2e-6 and 6e-15. Terms are summed that may cancel.
RTOL = {"float32": 1e-5, "float64": 1e-13}


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    program=st.sampled_from(PROGRAMS),
    shape=st.sampled_from(SHAPES),
    size=st.integers(-20, 15).map(lambda x: 10.0**x),
    decay=st.sampled_from([0.01, 0.5, 0.9, 0.9999]),
    eps=st.sampled_from([0.0, 1e-30, 1e-8, 1.0]),
    initial_scale=st.sampled_from([0.0, 1e-30, 1.0]),
)
def test_reverse_mode_agrees_with_forward_mode(
    program, shape, size, initial_scale, decay, eps
):
    scale_by, options, dtype = program
    if options["bias_correction"]:
        initial_scale = 0.0
    numbers = {"decay": decay, "eps": eps, "initial_scale": initial_scale}
    gradients = jnp.asarray(np.array(shape) * size, dtype)
    numbers = {name: jnp.asarray(x, dtype) for name, x in numbers.items()}
    updates, forward, reverse = jax.tree.map(
        np.asarray, jacobians((gradients, numbers), scale_by=scale_by, **options)
    )
    assert np.isfinite(updates).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(forward))

    # Derivatives are sums of terms, which may cancel, of about this size.
    sizes = abs(np.asarray(gradients, np.float64))[None]
    terms = np.max(abs(np.float64(forward[0])) * sizes, 1) + abs(np.float64(updates))
    by_gradients = np.where(
        sizes > 0,
        terms[:, None] / np.where(sizes > 0, sizes, 1),
        abs(forward[0]).max(1)[:, None],
    )
    atol = (
        by_gradients,
        {
            "decay": terms / (1 - decay),
            "eps": np.zeros(STEPS),
            "initial_scale": np.zeros(STEPS),
        },
    )

    def check(one, other, atol):
        one, other, atol = (np.asarray(x, np.float64) for x in (one, other, atol))
        assert np.all(abs(one - other) <= RTOL[dtype] * (abs(one) + atol))

    jax.tree.map(check, forward, reverse, atol)


STEADY = [
    (0.9, 1e-8, 3, 3e5, "float32"),
    (0.5, 0.0, 400, 1.0, "float32"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "eps", "steps", "g", "dtype"), STEADY)
def test_a_steady_gradient_has_derivatives(decay, eps, steps, g, dtype):
    tx = scale_by_stddev(decay, eps)

    def last(gradients):
        step = lambda state, g: tx.update(g, state)[::-1]  # noqa: E731
        return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1][-1]

    gradients = jnp.full(steps, g, dtype)
    both = jax.jit(lambda at: (last(at), jax.jacfwd(last)(at), jax.jacrev(last)(at)))
    value, forward, reverse = map(np.asarray, both(gradients))
    assert np.isfinite(forward).all()
    terms = abs(forward).max() + abs(value / g)
    np.testing.assert_allclose(reverse, forward, atol=RTOL[dtype] * terms)


def test_the_first_bias_corrected_centered_step():
    tx = rmsprop(centered=True, bias_correction=True, eps=0.0)
    f = lambda g: tx.update(g, tx.init(g))[0]  # noqa: E731
    g = jnp.float32(1)
    for derivative in (jax.grad(f), jax.jacfwd(f)):
        np.testing.assert_allclose(jax.jit(derivative)(g), f(g), rtol=1e-6)  # linear


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale_by", "options", "dtype"),
    PROGRAMS[1:3],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_second_derivatives_at_a_zero_gradient(scale_by, options, dtype):
    numbers = {"decay": 0.9, "eps": 0.0, "initial_scale": 0.0}
    arrays = {name: jnp.asarray(x, dtype) for name, x in numbers.items()}
    gradients = jnp.zeros(2, dtype)
    f = functools.partial(updates_of, scale_by=scale_by, **options)
    at = gradients, arrays
    product = jax.jit(second(f))
    by_all = product(at, jax.tree.map(jnp.ones_like, at))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(by_all))
    # In reverse mode twice. `lax.scan` treats constants in another way.
    sums = lambda g: jnp.sum(f((g, numbers)))  # noqa: E731
    of_sums = jax.jit(jax.grad(lambda g: jnp.sum(jax.grad(sums)(g))))(gradients)
    vector = jnp.ones_like(gradients), jax.tree.map(jnp.zeros_like, arrays)
    np.testing.assert_allclose(of_sums, product(at, vector)[0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("eps", "momentum", "centered"), [(0.0, 0.9, True), (1e-8, 0.0, False)]
)
def test_derivatives_by_the_initial_parameters(eps, momentum, centered):
    tx = rmsprop(0.1, eps=eps, momentum=momentum, centered=centered, weight_decay=1e-2)

    def last_loss(params):
        loss = lambda p: jnp.sum(jnp.where(p > 0, p, 0) ** 2)  # noqa: E731
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = params + updates
        return loss(params)

    params = jnp.array([1.0, 0.0, -1.0, 1e-12], jnp.float32)
    both = jax.jit(lambda p: (jax.jacfwd(last_loss)(p), jax.grad(last_loss)(p)))
    forward, reverse = both(params)
    assert jnp.isfinite(forward).all()
    np.testing.assert_allclose(reverse, forward, rtol=1e-4, atol=1e-5)
