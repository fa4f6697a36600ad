"""Whatever an argument is, it works, or an error of ours names it in a few words."""

import datetime
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import slow_but
from optax_rmsprop import (
    compress_state,
    diagnose,
    dialects,
    rmsprop,
    scale_by_rms,
    scale_by_stddev,
    scaled_to_batch,
)

LONGEST = 600  # characters of an error

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}

RETURNED = [
    None,
    "x",
    True,
    5,
    -1.0,
    math.nan,
    10**400,
    1j,
    np.float32(0.5),
    np.ones(1),
    np.array("x"),
    jnp.ones(()),
    jnp.int32(1),
    jnp.ones(1),
    jnp.array(True),
    jax.random.key(0),
    {"w": True, "b": np.False_},
    {"w": True},
    {"w": True, "b": True, "c": True},
    {"w": [True], "b": True},
    list(range(10**5)),
]
VALUES = [
    *RETURNED,
    *[lambda _, value=value: value for value in RETURNED],
    lambda argument: argument,
    False,
    0,
    0.5,
    1,
    -(10**400),
    10**5000,
    math.inf,
    -math.inf,
    "x" * 10**6,
    "float32",
    "uint8",
    b"x",
    float,
    jnp.float32,
    np.dtype("bfloat16"),
    object(),
    ...,
    datetime.timedelta(1),
    range(3),
    [[1], [1, 2]],
    {1, 2},
    np.timedelta64(1, "s"),
    np.datetime64("2020"),
    np.array(None),
    np.array(0.5),
    np.array(True),
    np.array([]),
    np.zeros((), "V4"),
    jnp.bfloat16(0.5),
    jnp.complex64(0.5),
    jnp.float8_e4m3fn(0.5),
    jnp.array([1, 2]),
    jax.random.PRNGKey(0),
    jax.ShapeDtypeStruct((), jnp.float32),
    optax.sgd(0.1),
    optax.constant_schedule(0.5),
    rmsprop().init(PARAMS),
    PARAMS,
]
# Every function with the arguments that it needs.
FUNCTIONS = {
    "rmsprop": (rmsprop, {}),
    "scale_by_rms": (scale_by_rms, {}),
    "scale_by_stddev": (scale_by_stddev, {}),
    "compress_state": (
        compress_state,
        {"tx": rmsprop(), "dtype": "uint8", "min_size": 1},
    ),
    "diagnose": (diagnose, {"opt_state": rmsprop().init(PARAMS)}),
    "scaled_to_batch": (scaled_to_batch, {"factor": 2}),
    **{
        name: (
            getattr(dialects, name),
            {next(iter(inspect.signature(getattr(dialects, name)).parameters)): 0.1},
        )
        for name in dialects.__all__
    },
}

repeatable = settings(derandomize=True, deadline=None, max_examples=25)
# Under strict promotion, a schedule that returns an integer does not fit a parameter.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def use(function, **arguments):
    """The result of a first update, or of `diagnose`."""
    tx = function(**arguments)
    if function is diagnose:
        return tx
    if function is scaled_to_batch:
        tx = rmsprop(**tx)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    return updates


def works_or_names(names, call):
    caught = None
    try:
        result = call()
    except (TypeError, ValueError) as error:
        caught, result = error, None
    if caught is not None:
        text = str(caught)
        assert type(caught) in (TypeError, ValueError), text[:LONGEST]
        assert len(text) <= LONGEST
        assert names & set(re.findall(r"`(\w+)`", text)), text
    for leaf in jax.tree.leaves(result):
        assert np.isfinite(np.asarray(leaf, np.complex128)).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_value_of_any_argument(name):
    function, needed = FUNCTIONS[name]
    parameters = set(inspect.signature(function).parameters)

    @repeatable
    @given(
        given=st.dictionaries(
            st.sampled_from(sorted(parameters)),
            st.sampled_from(range(len(VALUES))),
            min_size=1,
            max_size=2,
        )
    )
    def check(given):
        arguments = {name: VALUES[i] for name, i in given.items()}
        works_or_names(parameters, lambda: use(function, **needed | arguments))

    check()


TRANSFORMS = {
    "rmsprop": rmsprop(momentum=0.9, weight_decay=0.1),
    "scheduled": rmsprop(
        lambda count: 0.1, weight_decay=0.1, weight_decay_mask={"w": True, "b": False}
    ),
    "scale_by_rms": scale_by_rms(),
    "scale_by_stddev": scale_by_stddev(bias_correction=True),
    "compress_state": compress_state(rmsprop(), "uint8", min_size=1),
}
LEAVES = [
    None,
    "float32",
    b"x",
    0,
    1.0,
    -1.0,
    10**400,
    1j,
    float,
    jnp.tanh,
    np.array("x"),
    np.array(None),
    np.ones(3),
    np.zeros(3, jax.dtypes.float0),
    np.timedelta64(1, "s"),
    jax.random.key(0),
    optax.MaskedNode(),
    jnp.int32(-5),
    jnp.zeros(2, jnp.int32),
    *[
        jnp.ones(shape, dtype)
        for shape in [(), (3,), (2, 3), (1,) * 40]
        for dtype in ["float32", "float16", "float8_e8m0fnu", "int32", "complex64"]
    ],
    {f"{'long ' * 20}{i}": np.ones(3) for i in range(20)},
    {"x" * 1000: np.ones(3)},
]
leaves = st.sampled_from(range(len(LEAVES))).map(LEAVES.__getitem__)
trees = st.recursive(
    leaves,
    lambda parts: (
        st.dictionaries(st.sampled_from(["w", "b", "c"]), parts, max_size=3)
        | st.lists(parts, max_size=2)
    ),
    max_leaves=5,
)


@st.composite
def changed(draw, tree):
    """A tree with another leaf or tree in place of a leaf, or of all."""
    leaves, structure = jax.tree.flatten(tree)
    place, new = draw(st.integers(0, len(leaves))), draw(trees)
    if place == len(leaves):
        return new
    leaves[place] = new
    return structure.unflatten(leaves)


@pytest.mark.parametrize("which", ["init", "updates", "params", "state"])
@pytest.mark.parametrize(
    "name", slow_but(TRANSFORMS.keys() - {"compress_state"}, TRANSFORMS)
)
def test_any_tree(name, which):
    tx = TRANSFORMS[name]
    arguments = {"updates": PARAMS, "state": tx.init(PARAMS), "params": PARAMS}

    names = {*arguments, "weight_decay_mask"}

    # compress_state's own init compiles a program for each shape.
    compiles = (name, which) == ("compress_state", "init")

    @settings(repeatable, max_examples=8 if compiles else repeatable.max_examples)
    @given(tree=changed(PARAMS if which == "init" else arguments[which]))
    def check(tree):
        def call():
            if which == "init":
                return tx.init(tree) and ()
            return tx.update(**arguments | {which: tree})[0]

        works_or_names(names, call)

    check()
