"""Every transformation within every wrapper of optax: its own updates and state."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from helpers import BRANCHING, ENTRIES, WRAPPERS, arrays, by_step, stepper
from optax_rmsprop import (
    compress_state,
    decompress_state,
    diagnose,
    dialects,
    rmsprop,
    scale_by_rms,
    scale_by_stddev,
)
from optax_rmsprop.wrappers import master_weights

EVERYTHING = {"eps": 1e-2, "momentum": 0.8, "weight_decay": 0.1}
MAKE = {
    "scale_by_rms": functools.partial(scale_by_rms, eps=1e-2),
    "scale_by_stddev": functools.partial(scale_by_stddev, eps=1e-2),
    "rmsprop": rmsprop,
    "everything": functools.partial(rmsprop, **EVERYTHING),
    "centered": functools.partial(rmsprop, centered=True, **EVERYTHING),
    "keras": functools.partial(dialects.keras, 0.1, momentum=0.8),
    "uint8": lambda: compress_state(rmsprop(**EVERYTHING), "uint8", min_size=1),
    "int8": lambda: master_weights(rmsprop(**EVERYTHING), "int8"),
}
SLOTS = {
    "scale_by_rms": {"nu"},
    "scale_by_stddev": {"mu", "var"},
    "rmsprop": {"nu"},
    "centered": {"mu", "var", "trace"},
}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32; observed: 6e-6
PARAMS, GRADIENTS = jax.tree.map(jnp.float32, arrays(3))
GRADIENTS = by_step(GRADIENTS)


OLD_OPTAX = optax.__version__ < "0.2.8"


def is_numeric(name):
    """Whether inject_hyperparams can make its arguments."""
    return name not in ("uint8", "int8")


def params_of(name):
    return jax.tree.map(jnp.bfloat16, PARAMS) if name == "int8" else PARAMS


def cases():
    for wrapper in WRAPPERS:
        for name in MAKE:
            # Before optax 0.2.8 MultiSteps sums in the dtype of the first gradients.
            if (wrapper, name) == ("MultiSteps", "int8") and OLD_OPTAX:
                continue
            if wrapper != "inject_hyperparams" or is_numeric(name):
                # Wrappers that branch, and compressed states, compile programs.
                often = wrapper in BRANCHING or not is_numeric(name)
                quick = not often or (wrapper, name) in QUICK
                marks = [pytest.mark.slow] * (not quick)
                yield pytest.param(wrapper, name, marks=marks)


QUICK = {
    ("apply_if_finite", "centered"),
    ("MultiSteps", "everything"),
    ("partition", "uint8"),
    ("MultiSteps", "int8"),
}


def run(tx, params, compiled):
    """The parameters after every update, and the states."""
    step = jax.jit(stepper(tx)) if compiled else stepper(tx)
    run = [(params, tx.init(params))]
    for g in GRADIENTS:
        run.append(step(*run[-1], g))
    return zip(*run, strict=True)


@functools.cache
def alone(name):
    return list(run(MAKE[name](), params_of(name), compiled=False))


def kinds(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@pytest.mark.usefixtures("standard_promotion")  # for MultiSteps
@pytest.mark.parametrize(("wrapper", "name"), list(cases()))
def test_the_updates_and_the_state_stay_what_they_are(wrapper, name):
    tx = WRAPPERS[wrapper](MAKE[name])
    history, states = run(tx, params_of(name), wrapper in BRANCHING)
    expected, expected_states = alone(name)
    chex.assert_trees_all_close(history, expected, **TOLERANCE)
    assert kinds(states[0]) == kinds(states[1]) == kinds(states[-1])
    inside, bare = (
        decompress_state(state) if name == "uint8" else state
        for state in (states[-1], expected_states[-1])
    )
    found = {slot for slot in ENTRIES if optax.tree.get(inside, slot) is not None}
    assert found == SLOTS.get(name, {"nu", "trace"})
    for slot in found:
        leaves = (
            jax.tree.leaves(optax.tree.get(state, slot)) for state in (inside, bare)
        )
        chex.assert_trees_all_close(*leaves, **TOLERANCE)
    sizes = (diagnose(state, 0.1, 1e-2) for state in (states[-1], expected_states[-1]))
    leaves = map(jax.tree.leaves, sizes)
    chex.assert_trees_all_close(*leaves, **TOLERANCE)
