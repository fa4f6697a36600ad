"""At home in JAX: traced once, any dtype, vmap, None leaves, derivatives."""

import functools
import itertools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reference
from optax_rmsprop import rmsprop
from runs import ENTRIES, problem
from test_optax import by_reference, by_step, falling, stepper, train

STEPS = 6
FLOAT64 = {"rtol": 1e-12, "atol": 1e-14}  # observed:
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # observed:

EVERYTHING = {
    "decay": 0.9,
    "eps": 1e-2,
    "momentum": 0.8,
    "nesterov": True,
    "weight_decay": 0.1,
    "maximize": True,
    "lr_in_momentum": True,
    "eps_in_sqrt": True,
}
CASES = {
    "plain": {},
    "centered": {"centered": True, "eps": 1e-2},
    "momentum": {"momentum": 0.9},
    "weight_decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "initial_scale": {"initial_scale": 1.0},
    "bias_correction": {"bias_correction": True},
    "schedule": {"learning_rate": falling},
    "everything": EVERYTHING,
    "everything_centered": EVERYTHING | {"centered": True, "bias_correction": True},
}
in_every_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def arrays(dtype=None):
    params, gradients, _ = problem(STEPS)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, gradients))


def kinds(tree):
    """Of every leaf, what makes JAX trace again when it changes."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def averages(state):
    found = {name: optax.tree.get(state, name) for name in ENTRIES}
    return {name: slot for name, slot in found.items() if slot is not None}


@in_every_case
def test_traced_once(options):
    tx = rmsprop(**options)
    params, gradients = arrays()
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1))
    state = tx.init(params)
    before = kinds((params, state))
    expected, _ = by_reference(*problem(STEPS)[:2], **options)
    for g, after in by_step((gradients, expected)):
        params, state = step(params, state, g)
        assert kinds((params, state)) == before
        chex.assert_trees_all_close(params, after, **FLOAT32)


@in_every_case
@pytest.mark.usefixtures("x64")
def test_eager_equals_jit(options):
    tx = rmsprop(**options)
    params, gradients = arrays()
    expected = train(tx, params, gradients)
    state, history = tx.init(params), []
    for g in by_step(gradients):
        params, state = stepper(tx)(params, state, g)
        history.append(params)
    history = jax.tree.map(lambda *leaves: jnp.stack(leaves), *history)
    chex.assert_trees_all_close((history, state), expected, **FLOAT64)
    assert kinds((history, state)) == kinds(expected)


# Of parameters and gradients: the dtype of the averages, and the rounding of an update.
DTYPES = {
    "float16": (jnp.float32, 1e-3),  # observed:
    "bfloat16": (jnp.float32, 8e-3),  # observed:
    "float32": (jnp.float32, 1e-5),  # observed:
    "float64": (jnp.float64, 1e-12),  # observed:
    "complex64": (jnp.complex64, 1e-5),  # observed:
    "complex128": (jnp.complex128, 1e-12),  # observed:
}


def exact_parts(tree):
    """In float64: a complex number is two, and a real one has an imaginary part of 0."""
    parts = {"real": jnp.real, "imag": jnp.imag}
    return {
        name: jax.tree.map(lambda leaf: part(leaf).astype(jnp.float64), tree)  # noqa: B023
        for name, part in parts.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "everything", "everything_centered"])
@pytest.mark.usefixtures("x64")
def test_dtypes_stay(case, dtype):
    tx = rmsprop(**CASES[case])
    state_dtype, tolerance = DTYPES[dtype]
    params, gradients, _ = problem(STEPS, np.result_type(jnp.dtype(dtype), "float32"))
    params, gradients = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, gradients))
    exact_params = exact_parts(params)
    state, exact_state = tx.init(params), tx.init(exact_params)
    kinds_of_state = kinds(state)
    update = jax.jit(tx.update)
    for g in by_step(gradients):
        updates, state = update(g, state, params)
        assert kinds(updates) == kinds(g)
        assert kinds(state) == kinds_of_state
        exact, exact_state = update(exact_parts(g), exact_state, exact_params)
        chex.assert_trees_all_close(
            exact_parts(updates), exact, rtol=tolerance, atol=1e-7 * tolerance
        )
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(averages(state))}
    assert dtypes == {jnp.dtype(state_dtype)}


SETTINGS = {
    "learning_rate": [1e-2, 1e-3, 3e-2, 0.0],
    "decay": [0.9, 0.99, 0.5, 0.999],
    "eps": [1e-8, 1e-2, 0.0, 1.0],
    "momentum": [0.9, 0.0, 0.5, 0.99],
    "weight_decay": [0.0, 0.1, 1e-3, 1.0],
    "initial_scale": [0.0, 1.0, 0.1, 10.0],
}
STRUCTURES = {
    "rms": {},
    "centered": {"centered": True, "eps_in_sqrt": True},
    "lr_in_momentum": {"lr_in_momentum": True, "decoupled_weight_decay": True},
    "bias_correction": {"bias_correction": True, "nesterov": True},
}


def settings_under_vmap(options):
    """Each setting's run under one vmap, and by itself with Python numbers."""
    settings = dict(SETTINGS)
    if "bias_correction" in options:
        del settings["initial_scale"]  # excluded by it
    run = arrays()

    def parameters_after(numbers):
        return train(rmsprop(**numbers, **options), *run)[0]

    together = jax.vmap(parameters_after)(jax.tree.map(jnp.asarray, settings))
    for i in range(4):
        alone = parameters_after({name: values[i] for name, values in settings.items()})
        yield jax.tree.map(lambda leaf: leaf[i], together), alone  # noqa: B023
