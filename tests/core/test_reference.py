"""Ours against NumPy over every option, and against what algebra says."""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from helpers import covering, falling, problem, run_ours, slow_but
from optax_rmsprop import rmsprop, scale_by_rms, scale_by_stddev

pytestmark = pytest.mark.usefixtures("x64")

STEPS = 100
CLOSE = {"rtol": 1e-11, "atol": 1e-13}  # observed: 1e-14 absolute

MOMENTUM = {"momentum": 0.9}
# The options in groups, in which one depends on another or excludes it.
GRID = {
    "momentum": (
        {},
        MOMENTUM,
        MOMENTUM | {"nesterov": True},
        MOMENTUM | {"lr_in_momentum": True},
        MOMENTUM | {"lr_in_momentum": True, "nesterov": True},
    ),
    "weight decay": (
        {},
        {"weight_decay": 0.3},
        {"weight_decay": 0.3, "decoupled_weight_decay": True},
    ),
    "start": ({}, {"initial_scale": 0.7}, {"bias_correction": True}),
    "average": ({}, {"centered": True}),
    "eps": ({}, {"eps_in_sqrt": True}),
    "sign": ({}, {"maximize": True}),
}
CASES = [
    dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())
]


def options_of(case):
    return functools.reduce(operator.or_, case.values())


@pytest.mark.parametrize(
    "case",
    slow_but(
        covering(CASES), covering(CASES, 3), lambda case: "-".join(options_of(case))
    ),
)
def test_equals_numpy(case):
    options = {"decay": 0.9, "eps": 1e-2} | options_of(case)
    params, gradients, learning_rates = problem(STEPS, shapes={"leaf": (4,)})
    ours = run_ours(params, gradients, learning_rates, np.float64, **options)
    steps = reference.rmsprop(
        params["leaf"],
        gradients["leaf"],
        lambda count: learning_rates[count],
        **options,
    )
    for step, (exact, averages) in enumerate(steps):
        np.testing.assert_allclose(ours["params"]["leaf"][step], exact, **CLOSE)
        for name in ours.keys() - {"params"}:
            np.testing.assert_allclose(
                ours[name]["leaf"][step], averages[name], **CLOSE
            )


def updates_of(tx, gradients):
    """The updates after each gradient, for parameters at 1."""
    gradients = jnp.asarray(gradients)
    params = jnp.ones_like(gradients[0])
    state, updates = tx.init(params), []
    for g in gradients:
        u, state = tx.update(g, state, params)
        updates.append(u)
    return np.stack(updates)


GRADIENTS = np.random.default_rng(0).normal(size=(10, 3))


@pytest.mark.parametrize("scale_by", [scale_by_rms, scale_by_stddev])
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])  # powers of 2 round nothing
def test_without_eps_the_scale_of_the_gradients_does_not_matter(scale_by, factor):
    tx = scale_by(0.9, eps=0.0)
    scaled = updates_of(tx, GRADIENTS * factor)
    np.testing.assert_array_equal(scaled, updates_of(tx, GRADIENTS))


def test_eps_in_sqrt_is_in_the_square_of_the_gradients_unit():
    inside = updates_of(scale_by_rms(0.9, eps=1e-4, eps_in_sqrt=True), GRADIENTS)
    scaled = scale_by_rms(0.9, eps=1e-4 * 2.0**20, eps_in_sqrt=True)
    np.testing.assert_allclose(
        updates_of(scaled, GRADIENTS * 2.0**10), inside, rtol=1e-14
    )


def test_without_memory_it_is_sign_descent():
    updates = updates_of(rmsprop(0.1, decay=0, eps=0), GRADIENTS)
    np.testing.assert_allclose(updates, -0.1 * np.sign(GRADIENTS), rtol=1e-15)


def test_the_first_bias_corrected_step_is_the_sign():
    first = updates_of(scale_by_rms(0.999, eps=0, bias_correction=True), GRADIENTS[:1])
    np.testing.assert_allclose(first, np.sign(GRADIENTS[:1]), rtol=1e-15)


def test_a_steady_gradient_comes_out_as_its_sign():
    steady = np.broadcast_to([1e-6, -1e6], (200, 2))
    last = updates_of(scale_by_rms(0.9, eps=0), steady)[-1]
    np.testing.assert_allclose(last, [1, -1], rtol=1e-8)


def test_a_traced_momentum_of_0_is_no_momentum():
    zero = updates_of(rmsprop(momentum=jnp.zeros(())), GRADIENTS)
    np.testing.assert_array_equal(zero, updates_of(rmsprop(), GRADIENTS))


@pytest.mark.parametrize("centered", [False, True])
def test_a_complex_number_is_two_real_ones(centered):
    tx = rmsprop(centered=centered, initial_scale=2.0, momentum=0.9)
    both = updates_of(tx, GRADIENTS + 3j * GRADIENTS[::-1])
    np.testing.assert_array_equal(both.real, updates_of(tx, GRADIENTS))
    np.testing.assert_array_equal(both.imag, updates_of(tx, 3 * GRADIENTS[::-1]))


@pytest.mark.parametrize("rate", [0.1, falling])
def test_the_rate_inside_and_outside_the_buffer(rate):
    inside, outside = (
        updates_of(rmsprop(rate, momentum=0.9, lr_in_momentum=is_inside), GRADIENTS)
        for is_inside in (True, False)
    )
    apart = np.abs(inside / outside - 1).max()
    assert apart > 0.1 if callable(rate) else apart < 1e-12


def test_maximizing_is_minimizing_the_negative():
    options = {"momentum": 0.9, "weight_decay": 0.1, "centered": True}
    ascent = updates_of(rmsprop(maximize=True, **options), GRADIENTS)
    np.testing.assert_array_equal(ascent, updates_of(rmsprop(**options), -GRADIENTS))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("lr_in_momentum", [False, True])
def test_a_mask_chooses_what_decays(decoupled, lr_in_momentum):
    options = {
        "momentum": 0.9,
        "decoupled_weight_decay": decoupled,
        "lr_in_momentum": lr_in_momentum,
    }
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    gradients = jax.tree.map(lambda p: 0.5 * p, params)

    def one_update(**decay):
        tx = rmsprop(**options, **decay)
        return tx.update(gradients, tx.init(params), params)[0]

    mask = {"kernel": True, "bias": False}
    masked = one_update(weight_decay=0.1, weight_decay_mask=mask)
    by_function = one_update(
        weight_decay=0.1,
        weight_decay_mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
    )
    decayed, plain = one_update(weight_decay=0.1), one_update()
    np.testing.assert_array_equal(masked["kernel"], decayed["kernel"])
    np.testing.assert_array_equal(masked["bias"], plain["bias"])
    assert np.all(masked["kernel"] != plain["kernel"])
    jax.tree.map(np.testing.assert_array_equal, by_function, masked)
