"""Bad input: an error that names the argument, the rule, the value and the remedy."""

import collections
import inspect
import re

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
    scale_by_stddev,
)
from optax_rmsprop._errors import FOREIGN
from optax_rmsprop.transforms import ScaleByRmsState

LONGEST = 600  # characters of an error

# Arguments, error, what its text must match.
BAD = [
    ({"learning_rate": -0.1}, ValueError, r"`learning_rate` .* \[0, inf\), got -0\.1"),
    ({"learning_rate": np.nan}, ValueError, r"`learning_rate` .* got nan"),
    ({"learning_rate": np.inf}, ValueError, r"`learning_rate` .* got inf"),
    ({"learning_rate": None}, TypeError, r"`learning_rate` must be a number"),
    ({"learning_rate": "0.1"}, TypeError, r"`learning_rate` .* got '0\.1'"),
    ({"decay": 1.5}, ValueError, r"`decay` .* \[0, 1\), got 1\.5 \(torch .* alpha\)"),
    ({"decay": 1}, ValueError, r"`decay` .* \[0, 1\), got 1"),
    ({"decay": -0.1}, ValueError, r"`decay` .* \[0, 1\), got -0\.1"),
    ({"decay": np.nan}, ValueError, r"`decay` .* got nan"),
    ({"decay": 0, "centered": True}, ValueError, r"`decay` .* \(0, 1\), .*variance 0"),
    ({"decay": jnp.float32(2)}, ValueError, r"`decay` .* got 2"),
    ({"decay": jnp.ones(3)}, TypeError, r"`decay` .* shape \(3,\).*; use jax\.vmap"),
    ({"decay": jnp.bfloat16(0.9)}, TypeError, r"`decay` .* hyperparam_dtype"),
    ({"decay": 0.9 + 0j}, TypeError, r"`decay` must be a number"),
    ({"decay": jnp.complex64(0.9)}, TypeError, r"`decay` must be a number"),
    ({"eps": 1e300}, ValueError, r"`eps` .* got 1e\+300, which is infinite in float32"),
    ({"decay": True}, TypeError, r"`decay` .* got True"),
    ({"eps": -1e-8}, ValueError, r"`eps` .* got -1e-08"),
    ({"eps": np.nan}, ValueError, r"`eps` .* got nan"),
    ({"momentum": -0.9}, ValueError, r"`momentum` .* \[0, 1\), got -0\.9"),
    ({"momentum": 1.0}, ValueError, r"`momentum` .* \[0, 1\), got 1"),
    ({"momentum": np.nan}, ValueError, r"`momentum` .* got nan"),
    ({"weight_decay": -1.0}, ValueError, r"`weight_decay` .* got -1"),
    ({"weight_decay": np.nan}, ValueError, r"`weight_decay` .* got nan"),
    ({"momentum": lambda t: t}, TypeError, r"(?s)`momentum` .*; .*inject"),
    ({"initial_scale": -1.0}, ValueError, r"`initial_scale` .* got -1"),
    ({"initial_scale": np.nan}, ValueError, r"`initial_scale` .* got nan"),
    (
        {"initial_scale": 1.0, "bias_correction": True},
        ValueError,
        r"`initial_scale` must be 0 with bias_correction, got 1\.0; .* choose one",
    ),
    ({"nesterov": True}, ValueError, r"`nesterov` .* momentum"),
    ({"nesterov": True, "momentum": 0}, ValueError, r"`nesterov` .* momentum"),
    ({"centered": 1}, TypeError, r"`centered` must be True or False, got 1"),
    ({"maximize": None}, TypeError, r"`maximize` must be True or False"),
    ({"eps_in_sqrt": "no"}, TypeError, r"`eps_in_sqrt` must be True or False"),
    ({"bias_correction": 0.0}, TypeError, r"`bias_correction` must be True or False"),
    ({"nesterov": 1, "momentum": 0.9}, TypeError, r"`nesterov` must be True or False"),
    ({"lr_in_momentum": 1}, TypeError, r"`lr_in_momentum` must be True or False"),
    ({"decoupled_weight_decay": 1}, TypeError, r"`decoupled_.*` must be True or False"),
    ({"accumulator_dtype": "bfloat16"}, ValueError, r"got bfloat16; an average in few"),
    ({"accumulator_dtype": "float64"}, ValueError, r"got float64; .*jax_enable_x64"),
    ({"accumulator_dtype": "int32"}, ValueError, r"`accumulator_dtype` .* int32"),
    ({"accumulator_dtype": "float33"}, ValueError, r"None or float32, got 'float33'"),
    (
        {"accumulator_dtype": jnp.ones(())},
        TypeError,
        r"must be a dtype, .* static_args",
    ),
    ({"weight_decay_mask": {"w": 1}}, TypeError, r"mask` .* got 1 at \['w'\]"),
    ({"weight_decay_mask": jnp.array(True)}, TypeError, r"mask` .* static_args"),
    (
        {"learning_rate": 10**400},
        ValueError,
        r"`learning_rate` .* got 1000+ \.\.\. 000",
    ),
    ({"decay": 10**400}, ValueError, r"`decay` .* got 1000+ \.\.\. 000"),
    ({"eps": -(10**400)}, ValueError, r"`eps` .* got -1000+ \.\.\. 000"),
    (
        {"decay": np.array("x")},
        TypeError,
        r"`decay` must be a number .* got array\('x'",
    ),
    (
        {"decay": np.array(None)},
        TypeError,
        r"`decay` must be a number .*got array\(None",
    ),
    (
        {"decay": np.timedelta64(1, "s")},
        TypeError,
        r"`decay` must be a number .*timedelta64",
    ),
    (
        {"decay": np.array(True)},
        TypeError,
        r"`decay` must be a number .* array\(True\)",
    ),
    ({"decay": jnp.array(True)}, TypeError, r"`decay` must be a number .* Array\(True"),
    ({"decay": jax.random.key(0)}, TypeError, r"`decay` must be a number .*key<fry>"),
    (
        {"decay": [0.5] * 10**6},
        TypeError,
        r"`decay` must be .* got \[0\.5.* \.\.\. .*\]",
    ),
    ({"learning_rate": float}, TypeError, r"`learning_rate` .* got <class 'float'>"),
    ({"weight_decay": float}, TypeError, r"`weight_decay` .* got <class 'float'>"),
    (
        {"accumulator_dtype": "x" * 10**6},
        ValueError,
        r"None or float32, got 'x+ \.\.\. ",
    ),
    ({"weight_decay_mask": "x" * 10**6}, TypeError, r"mask` .* got 'x+ \.\.\. x+' at"),
    (
        {"weight_decay_mask": bool},
        TypeError,
        r"mask` .* got <class 'bool'> at the root",
    ),
    ({"lr": 0.1}, TypeError, r"rmsprop\(\) takes no `lr`, got 0\.1; here it is `learn"),
    ({"warmth": 1}, TypeError, r"rmsprop\(\) got an unexpected .* 'warmth'"),
]


@pytest.mark.parametrize("function", [rmsprop, scale_by_rms, scale_by_stddev, diagnose])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_name_is_told_ours_and_its_dialect(function, foreign):
    ours, dialect = FOREIGN[foreign]
    of_rmsprop = ""
    if ours not in inspect.signature(function).parameters:
        of_rmsprop = " of rmsprop()"
        assert ours in inspect.signature(rmsprop).parameters
    with pytest.raises(TypeError) as error:
        function(**{foreign: 0.5})
    assert str(error.value) == (
        f"{function.__name__}() takes no `{foreign}`, got 0.5; here it is `{ours}`"
        f"{of_rmsprop}, and dialects.{dialect} takes `{foreign}`"
    )
    assert foreign in inspect.signature(getattr(dialects, dialect)).parameters


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (rmsprop, "give maximize=True"),
        (dialects.torch, "give maximize=True"),
        (dialects.keras, "put optax.scale(-1.0) before this in an optax.chain"),
    ],
    ids=["rmsprop", "torch", "keras"],
)
def test_a_negative_learning_rate_is_told_how_to_ascend(make, remedy):
    for rate in (-0.1, jnp.float32(-0.5)):
        with pytest.raises(
            ValueError, match=rf"got -0\.\d; to ascend {re.escape(remedy)}$"
        ):
            make(rate)


def row_id(row):
    """The options, without the address of a function."""
    return "-".join(f"{k}={v!r}"[:40].split(" at 0x")[0] for k, v in row[0].items())


@pytest.mark.parametrize(("options", "error", "text"), BAD, ids=map(row_id, BAD))
def test_bad_arguments_raise_at_construction(options, error, text):
    with pytest.raises(error, match=text) as raised:
        rmsprop(**options)
    assert len(str(raised.value)) <= LONGEST


SHARED = {"decay", "eps", "initial_scale", "eps_in_sqrt", "bias_correction"}
BAD_SHARED = [row for row in BAD if row[0].keys() <= SHARED | {"accumulator_dtype"}]


@pytest.mark.parametrize("scale_by", [scale_by_rms, scale_by_stddev])
@pytest.mark.parametrize(
    ("options", "error", "text"), BAD_SHARED, ids=map(row_id, BAD_SHARED)
)
def test_bad_arguments_of_the_transforms(scale_by, options, error, text):
    if scale_by is scale_by_stddev:
        text = text.replace(r"\[0, 1\)", r"\(0, 1\)")
    with pytest.raises(error, match=text):
        scale_by(**options)


@pytest.mark.parametrize(
    "number", [0.5, np.float32(0.5), np.array(0.5), 0, jnp.int32(0)], ids=repr
)
def test_every_kind_of_number_is_accepted(number):
    tx = rmsprop(
        number,
        number,
        number,
        momentum=number,
        weight_decay=number,
        maximize=np.bool_(True),
    )
    params = jnp.ones(2)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates.dtype == jnp.float32


def test_traced_values_are_not_checked():
    def first_update(learning_rate):
        tx = rmsprop(learning_rate)
        return tx.update(jnp.ones(()), tx.init(jnp.ones(())))[0]

    assert jax.jit(first_update)(-1.0) > 0


@pytest.mark.parametrize("name", ["learning_rate", "decay", "eps", "initial_scale"])
def test_arrays_that_are_not_traced_are_checked_within_jit_too(name):
    def first_step(value):
        tx = rmsprop(**{name: value})
        return tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0]

    half, none, negative = jnp.float32(0.5), jnp.int32(0), jnp.float32(-1)
    within = jax.jit(lambda: first_step(half))()
    np.testing.assert_allclose(within, first_step(0.5), rtol=1e-6)
    jax.jit(lambda: first_step(none))()
    with pytest.raises(ValueError, match=f"`{name}` must be .* got -1"):
        jax.jit(lambda: first_step(negative))()


# The result of a schedule, and the error's text.
RETURNED = [
    (None, TypeError, "got None from its schedule"),
    ("x", TypeError, "got 'x' from its schedule"),
    (jnp.ones(1), TypeError, r"got an array of shape \(1,\) from its schedule"),
    (np.ones(1), TypeError, r"got an array of shape \(1,\) from its schedule"),
    (jnp.array(True), TypeError, "got .* from its schedule"),
    (jnp.complex64(0.1), TypeError, "got .*"),
    (-0.1, ValueError, r"got -0\.1 from its schedule"),
    (jnp.array(1j), TypeError, r"got .*j.* from its schedule(\n|$)"),
    (np.nan, ValueError, "got nan from its schedule"),
]


@pytest.mark.parametrize(("value", "error", "text"), RETURNED, ids=repr)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("lr_in_momentum", [False, True])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_schedule_that_returns_no_number(
    name, lr_in_momentum, decoupled, value, error, text
):
    options = {"weight_decay": 0.1, name: lambda count: value}
    tx = rmsprop(
        **options, lr_in_momentum=lr_in_momentum, decoupled_weight_decay=decoupled
    )
    state = tx.init(PARAMS)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(error, match=f"`{name}` must be a number in .*{text}"):
            update(PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    "value",
    [
        *[0, 1, 0.5, np.float64(0.5), np.array(0.5), np.int32(1), jnp.int32(1)],
        *[jnp.float32(-0.5), jnp.bfloat16(0.5), jnp.array(0.5), jnp.array(jnp.nan)],
        np.asarray(0.5, jnp.bfloat16)[()],
    ],
    ids=repr,
)
def test_a_schedule_may_return_any_real_number(value):
    tx = rmsprop(lambda count: value, weight_decay=0.1)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(PARAMS, tx.init(PARAMS), PARAMS)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    given = jnp.sign(jnp.asarray(value, jnp.float32))
    np.testing.assert_array_equal(jnp.sign(updates["b"]), jnp.full(3, -given))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", [rmsprop, scale_by_rms], ids=["rmsprop", "rms"])
def test_numbers_that_inject_hyperparams_makes_complex(make):
    params = jnp.ones(2, jnp.complex64)
    with pytest.raises(
        TypeError, match=r"(?s)`\w+` .*; .* hyperparam_dtype=jnp\.float32$"
    ):
        optax.inject_hyperparams(make)().init(params)
    tx = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)()
    assert tx.update(params, tx.init(params), params)[0].dtype == jnp.complex64


# A mask, and what is said of it.
MASKS = [
    ({"w": True}, ValueError, r"a prefix of it: missing \['b'\](\n|$)"),
    (
        {"w": True, "c": True},
        ValueError,
        r"it: missing \['b'\]; unexpected \['c'\](\n|$)",
    ),
    (
        {"w": [True], "b": True},
        ValueError,
        r"missing \['w'\]; unexpected \['w'\]\[0\](\n|$)",
    ),
    (lambda params: {"w": True}, ValueError, r"a prefix of it: missing \['b'\](\n|$)"),
    (
        lambda params: None,
        ValueError,
        r"a prefix of it: missing \['b'\], \['w'\](\n|$)",
    ),
    (
        lambda params: 5,
        TypeError,
        r"a function that returns one, got 5 at the root(\n|$)",
    ),
    (lambda params: "yes", TypeError, r"returns one, got 'yes' at the root(\n|$)"),
    (lambda params: params, TypeError, r"returns one, got .* at \['b'\](\n|$)"),
]


@pytest.mark.parametrize(("mask", "error", "text"), MASKS, ids=[m[2] for m in MASKS])
def test_a_mask_that_does_not_match_the_parameters(mask, error, text):
    tx = rmsprop(weight_decay=0.1, weight_decay_mask=mask)
    for init in (tx.init, jax.jit(tx.init)):
        with pytest.raises(error, match=rf"(?s)`weight_decay_mask` must .*{text}"):
            init(PARAMS)


def test_none_is_0():
    params = jnp.ones(2)
    zero = rmsprop(momentum=0.0, weight_decay=0.0)
    none = rmsprop(momentum=None, weight_decay=None)
    structures = [jax.tree.structure(tx.init(params)) for tx in (zero, none, rmsprop())]
    assert structures[0] == structures[1] == structures[2]


TRANSFORMS = {
    "scale_by_rms": scale_by_rms(),
    "scale_by_stddev": scale_by_stddev(),
    "rmsprop": rmsprop(),
    "momentum": rmsprop(momentum=0.9),
    "compressed": compress_state(rmsprop(), "uint8"),
}
PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}

# A tree that does not match, and what is said of it.
MISMATCHED = [
    ({"w": jnp.ones((2, 3))}, r"missing \['b'\]"),
    (PARAMS | {"c": jnp.ones(3)}, r"unexpected \['c'\]"),
    (
        PARAMS | {"w": jnp.ones((3, 2))},
        r"\['w'\] has shape \(3, 2\), expected \(2, 3\)",
    ),
    (PARAMS | {"b": jnp.ones(())}, r"\['b'\] has shape \(\), expected \(3,\)"),
    (
        {"w": jnp.ones(1), "c": jnp.ones(3)},
        r"\['w'\].*; missing .*'b'.*; unexpected .*c",
    ),
    (jnp.ones(3), r"missing \['b'\], \['w'\]; unexpected the root"),
    (None, r"missing \['b'\], \['w'\]$"),
    (PARAMS | {"c": None}, r"unexpected \['c'\]$"),
]
mismatched = pytest.mark.parametrize(
    ("gradients", "text"), MISMATCHED, ids=[row[1] for row in MISMATCHED]
)


@mismatched
@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_that_do_not_match_the_state(name, gradients, text):
    tx = TRANSFORMS[name]
    text = r"`updates` must have .* of the parameters given to init: " + text
    with pytest.raises(ValueError, match=text):
        tx.update(gradients, tx.init(PARAMS))


@pytest.mark.parametrize(
    ("gradients", "text"),
    [row for row in MISMATCHED if row[0] is not None],
    ids=[row[1] for row in MISMATCHED if row[0] is not None],
)
def test_gradients_that_do_not_match_the_parameters(gradients, text):
    tx = rmsprop(weight_decay=0.1)
    with pytest.raises(
        ValueError, match=r"`updates` must have .* of `params`: " + text
    ):
        tx.update(gradients, tx.init(gradients), PARAMS)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e8m0fnu"])
def test_gradients_of_another_kind(name, dtype):
    tx = TRANSFORMS[name]
    bad = PARAMS | {"b": jnp.ones(3, dtype)}
    text = rf"`updates` must be floating point, got {dtype}.* at \['b'\]; compare with"
    with pytest.raises(TypeError, match=text):
        tx.update(bad, tx.init(PARAMS))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_gradient_of_an_integer(name):
    tx = TRANSFORMS[name]
    bad = PARAMS | {"b": np.zeros(3, jax.dtypes.float0)}
    with pytest.raises(TypeError, match=r"got float0 at \['b'\]; .* give None in"):
        tx.update(bad, tx.init(PARAMS))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_parameters_that_do_not_match_the_gradients(name):
    tx = TRANSFORMS[name]
    state = tx.init(PARAMS)
    for params, text in [
        ({"w": PARAMS["w"]}, r"unexpected \['b'\]"),
        (PARAMS | {"b": jnp.ones(4)}, r"\['b'\] has shape \(3,\), expected \(4,\)"),
        (PARAMS | {"b": jnp.arange(3)}, r"\['b'\] is an .* None beside int32"),
        (PARAMS | {"b": jax.random.key(0)}, r"\['b'\] is an .* None beside key<fry>"),
        (PARAMS | {"b": None}, r"\['b'\] is an array, expected None beside None"),
        (PARAMS | {"b": "float32"}, r"\['b'\] is an array, expected None beside a str"),
    ]:
        with pytest.raises(ValueError, match=r"`updates` must .* of `params`: " + text):
            tx.update(PARAMS, state, params)


def test_an_error_about_many_leaves_names_the_first_few():
    many = {f"{i:04}": np.ones(2, np.float32) for i in range(2000)}
    other = {f"x{i:04}": leaf for i, leaf in enumerate(many.values())}
    wider = jax.tree.map(lambda leaf: np.ones(3, np.float32), many)
    state = ScaleByRmsState(jnp.int32(0), many)
    for gradients, text in [
        (other, r"missing \['0000'\],.* and 19\d\d more; unexpected .* more$"),
        (wider, r"\['0000'\] has shape \(3,\).*; and 19\d\d more$"),
        (tuple(many.values()), r"missing .* more; unexpected \[0\],.* more$"),
        (collections.OrderedDict(many), r"got .* \.\.\. .*, expected .* \.\.\. "),
    ]:
        with pytest.raises(ValueError, match=r"`updates` must .*: " + text) as raised:
            scale_by_rms().update(gradients, state)
        assert len(str(raised.value)) <= LONGEST


def test_containers_that_do_not_match():
    tx = scale_by_rms()
    with pytest.raises(
        ValueError, match=r"`updates` .*: got PyTreeDef\(\(.*, expected"
    ):
        tx.update((jnp.ones(2),), tx.init([jnp.ones(2)]))


def test_gradients_that_match_only_one_slot():
    tx = rmsprop(momentum=0.9, centered=True)
    average, trace, rest = tx.init(PARAMS)
    small = jax.tree.map(lambda leaf: leaf[:1], PARAMS)  # which would broadcast
    for state in (
        (average._replace(mu=small), trace, rest),
        (average._replace(var=small), trace, rest),
        (average, trace._replace(trace=small), rest),
    ):
        with pytest.raises(
            ValueError, match=r"\['w'\] has shape \(2, 3\), expected \(1,"
        ):
            tx.update(PARAMS, state)


@pytest.mark.parametrize(
    "option",
    [
        {"weight_decay": 0.1, "weight_decay_mask": lambda tree: False},
        {"accumulator_dtype": jnp.float32},
    ],
    ids=["mask", "dtype"],
)
def test_what_inject_hyperparams_takes_for_a_schedule_is_refused(option):
    with pytest.raises(TypeError, match=r"must be .* static_args"):
        optax.inject_hyperparams(rmsprop)(**option).init(PARAMS)


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_needs_parameters(decoupled):
    tx = rmsprop(weight_decay=0.1, decoupled_weight_decay=decoupled)
    with pytest.raises(
        ValueError, match=r"`params` .* weight_decay, got None; call upd"
    ):
        tx.update(PARAMS, tx.init(PARAMS))


# Options whose states differ in a slot or in its place. Those that only change what is
# computed, such as maximize, leave states that are alike.
CONFIGURATIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "L2": {"weight_decay": 0.1},
    "masked L2": {"weight_decay": 0.1, "weight_decay_mask": {"w": True, "b": False}},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "lr in momentum": {"lr_in_momentum": True, "momentum": 0.9},
    "schedule": {"learning_rate": lambda count: 0.1},
}


@pytest.mark.parametrize("there", CONFIGURATIONS)
@pytest.mark.parametrize("here", CONFIGURATIONS)
def test_a_state_from_another_configuration(here, there):
    tx = rmsprop(**CONFIGURATIONS[here])
    state = rmsprop(**CONFIGURATIONS[there]).init(PARAMS)
    if here == there:
        assert tx.update(PARAMS, state, PARAMS)[0]["w"].shape == (2, 3)
    else:
        with pytest.raises(ValueError, match=r"`state` .* expected \(.*, got \(.*init"):
            tx.update(PARAMS, state, PARAMS)


def cast(dtype, field):
    """A state with a slot in another dtype."""
    return lambda state: state._replace(
        **{field: jax.tree.map(lambda x: x.astype(dtype), getattr(state, field))}
    )


def counting(value):
    return lambda state: state._replace(count=value)


# Changes to a state of averages, and the error's text.
BROKEN = [
    (
        cast("float16", "mu"),
        TypeError,
        r"float32.* got float16 at .*\.mu\['b'\] .*; leave",
    ),
    (cast("bfloat16", "var"), TypeError, r"got bfloat16 at .*\.var\['b'\] .*; leave"),
    (cast("int32", "var"), TypeError, r"got int32 at .*\.var\['b'\] .* init again"),
    (
        cast("complex64", "mu"),
        TypeError,
        r"complex64 at .* beside a parameter in float",
    ),
    (counting(jnp.float32(2.7)), TypeError, r"one integer, got float32 at .*\.count; "),
    (
        counting(jnp.float32(np.nan)),
        TypeError,
        r"one integer, got float32 at .*\.count",
    ),
    (counting(jnp.array(True)), TypeError, r"one integer, got bool at .*\.count; "),
    (counting(None), TypeError, r"one integer, got None at .*\.count; call init again"),
    (
        counting(jnp.zeros(3, "int32")),
        ValueError,
        r"got shape \(3,\) at .*; use jax\.vm",
    ),
]
BROKEN_IF_KNOWN = [
    (counting(jnp.int32(-5)), ValueError, r"integer from 0, got -5 at .*\.count; call"),
    (counting(np.int32(-5)), ValueError, r"integer from 0, got -5 at .*\.count; call"),
    (counting(-5), ValueError, r"integer from 0, got -5 at .*\.count; call init again"),
]
OF_STDDEV = {
    "scale_by_stddev": (scale_by_stddev(), lambda change, state: change(state)),
    "rmsprop": (
        rmsprop(centered=True, momentum=0.9, maximize=True),
        lambda change, state: (state[0], change(state[1]), *state[2:]),
    ),
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    BROKEN + BROKEN_IF_KNOWN,
    ids=[text for *_, text in BROKEN + BROKEN_IF_KNOWN],
)
@pytest.mark.parametrize("name", OF_STDDEV)
def test_a_state_that_was_changed(name, change, error, text):
    tx, within = OF_STDDEV[name]
    state = within(change, tx.init(PARAMS))
    compiled = jax.jit(tx.update)
    for update in (tx.update, compiled):
        if update is compiled and (change, error, text) in BROKEN_IF_KNOWN:
            continue
        with pytest.raises(error, match=rf"`state` must .*{text}"):
            update(PARAMS, state, PARAMS)


def test_a_trace_in_float16():
    tx = rmsprop(momentum=0.9)
    average, trace, rest = tx.init(PARAMS)
    state = average, cast("float16", "trace")(trace), rest
    with pytest.raises(TypeError, match=r"got float16 at \[1\]\.trace\['b'\]; leave"):
        tx.update(PARAMS, state)


def test_a_real_state_for_complex_parameters():
    tx, p = scale_by_rms(), jnp.ones(2, jnp.complex64)
    text = r"`state` must .* got float32 at \.nu beside a parameter in complex64;"
    with pytest.raises(TypeError, match=text):
        tx.update(p, tx.init(p.real), p)


@pytest.mark.parametrize("make", [scale_by_rms, scale_by_stddev, rmsprop])
def test_none_in_place_of_all_gradients_of_no_parameters(make):
    tx = make()
    with pytest.raises(ValueError, match=r"`updates` must .* missing the root"):
        tx.update(None, tx.init(None))


@pytest.mark.parametrize("make", [scale_by_rms, scale_by_stddev])
def test_a_misspelt_argument_of_update(make):
    tx = make()
    with pytest.raises(TypeError, match="parms"):
        tx.update(PARAMS, tx.init(PARAMS), parms=PARAMS)


def test_a_mask_for_other_parameters_than_none_at_all():
    tx = rmsprop(weight_decay=0.1, weight_decay_mask={"w": True})
    with pytest.raises(ValueError, match=r"`weight_decay_mask` .* unexpected \['w'\]"):
        tx.init({})


@jax.tree_util.register_pytree_node_class
class WithArrayInMetadata:
    """JAX cannot compare two of them: the metadata's == is an array."""

    def __init__(self, leaf, metadata):
        self.leaf, self.metadata = leaf, metadata

    def tree_flatten(self):
        return (self.leaf,), self.metadata

    @classmethod
    def tree_unflatten(cls, metadata, leaves):
        return cls(*leaves, metadata)


def test_trees_that_cannot_be_compared():
    one, other = (WithArrayInMetadata(jnp.ones(2), np.arange(n, n + 3)) for n in (0, 1))
    tx = rmsprop()
    with pytest.raises(ValueError, match="`updates` must have the structure"):
        tx.update(other, tx.init(one))


def test_a_count_of_a_scheduled_and_masked_weight_decay():
    tx = rmsprop(
        weight_decay=lambda count: 0.1, weight_decay_mask={"w": True, "b": False}
    )
    state = jax.tree.map(
        lambda x: -1 - x if x.dtype == jnp.int32 else x, tx.init(PARAMS)
    )
    text = r"got -1 at \[0\]\.inner_state\.count"
    with pytest.raises(ValueError, match=text):
        tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("centered", [False, True])
def test_a_negative_average_is_refused_and_nan_is_not(centered):
    tx = rmsprop(centered=centered)
    state, name = tx.init(PARAMS), "var" if centered else "nu"
    leaf = jnp.array([1.0, -1.0, 0.0])
    bad, unknown = (
        optax.tree.set(state, **{name: PARAMS | {"b": x}})
        for x in (leaf, leaf * jnp.nan)
    )
    says = rf"`state` must contain averages .* at \[0\]\.{name}\['b'\]; restore"
    for of_numpy in (False, True):
        given = jax.device_get(bad) if of_numpy else bad
        with pytest.raises(ValueError, match=says):
            tx.update(PARAMS, given)
    assert jnp.isnan(tx.update(PARAMS, unknown)[0]["b"]).all()
    jax.jit(tx.update)(PARAMS, bad)  # values are not known here


def test_a_negative_average_has_no_step_size():
    tx = scale_by_rms()
    state = tx.init(PARAMS)
    negative = state._replace(nu=state.nu | {"b": jnp.array([1.0, -1.0, 0.0])})
    complex_ = tx.init(jnp.ones(1, jnp.complex64))._replace(nu=jnp.array([1 - 1j]))
    for bad in (negative, complex_):
        with pytest.raises(ValueError, match=r"`opt_state` must .* a negative one at "):
            diagnose(bad)
        jax.jit(diagnose)(bad)  # where it is not known
    shown = state._replace(nu=state.nu | {"b": jnp.array([jnp.nan, jnp.inf, 0.0])})
    assert jnp.isnan(diagnose(shown).step_size["b"][0])


OF_OPTAX = {
    "scale_by_rms": optax.scale_by_rms(),
    "scale_by_stddev": optax.scale_by_stddev(),
    "rmsprop": optax.rmsprop(0.1),
    "momentum": optax.rmsprop(0.1, momentum=0.9),
    "compressed": optax.rmsprop(0.1),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_state_of_optax_is_told_apart_from_ours(name):
    says = r"`state` .* expected .*optax_rmsprop\.\w+.*, got .*optax\.\w+.* from_optax"
    with pytest.raises(ValueError, match=says):
        TRANSFORMS[name].update(PARAMS, OF_OPTAX[name].init(PARAMS))


@pytest.mark.parametrize("name", ["scale_by_rms", "scale_by_stddev"])
@pytest.mark.parametrize("state", [optax.EmptyState(), (), None])
def test_a_foreign_state_for_a_transform(name, state):
    with pytest.raises(
        ValueError, match=r"`state` must come from this transform's own"
    ):
        TRANSFORMS[name].update(PARAMS, state)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "float8_e8m0fnu"])
def test_parameters_that_are_not_floating_point(name, dtype):
    params = {"layer": [jnp.ones(2), jnp.ones(2, dtype)]}
    text = rf"`params` .* got {dtype}.* at \['layer'\]\[1\]; .* optax\.masked$"
    with pytest.raises(TypeError, match=text):
        TRANSFORMS[name].init(params)


OF_8_BITS = [
    name for name in dir(jnp) if re.match(r"float[48]_", name) and "e8m0" not in name
]


def test_parameters_of_4_and_8_bits():
    tx, params = rmsprop(), {dtype: jnp.ones(2, dtype) for dtype in OF_8_BITS}
    gradients = {dtype: jnp.full(2, -1, dtype) for dtype in OF_8_BITS}
    updates, state = jax.jit(tx.update)(gradients, tx.init(params), params)
    for dtype, update in updates.items():
        assert update.dtype == dtype
        assert (np.asarray(update, np.float32) >= 0).all()
        assert state[0].nu[dtype].dtype == jnp.float32


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("leaf", [jnp.tanh, "float32", float, np.dtype("float32")])
def test_parameters_that_are_no_arrays(name, leaf):
    text = r"`params` .* got an? \w+ at \['f'\]; .*optax\.masked, or .*equinox\.filter"
    with pytest.raises(TypeError, match=text):
        TRANSFORMS[name].init({"f": leaf})
