"""At home in JAX: traced once, any dtype, vmap, None leaves, derivatives."""

import functools
import importlib
import itertools
import subprocess
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reference
from helpers import (
    ENTRIES,
    by_reference,
    by_step,
    covering,
    falling,
    problem,
    slow_but,
    stepper,
    train,
    train_compiled,
)
from optax_rmsprop import rmsprop, scale_by_rms, scale_by_stddev

STEPS = 6
FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}  # observed: 7e-15
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # observed: 1e-6

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
    "weight_decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "everything": EVERYTHING | {"learning_rate": falling, "initial_scale": 1.0},
    "everything_centered": EVERYTHING | {"centered": True, "bias_correction": True},
}
EXTREMES = ("plain", "everything", "everything_centered")
in_extremes = pytest.mark.parametrize(
    "options", [CASES[case] for case in EXTREMES], ids=EXTREMES
)


def arrays(dtype=None):
    params, gradients, _ = problem(STEPS)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, gradients))


def kinds(tree):
    """The properties of every leaf that make JAX trace again when they change."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def averages(state):
    found = {name: optax.tree.get(state, name) for name in ENTRIES}
    return {name: slot for name, slot in found.items() if slot is not None}


@in_extremes
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


@in_extremes
@pytest.mark.usefixtures("x64")
def test_eager_equals_jit(options):
    tx = rmsprop(**options)
    params, gradients = arrays()
    expected = train_compiled(tx, params, gradients)
    actual = train(tx, params, gradients)
    chex.assert_trees_all_close(actual, expected, **FLOAT64)
    assert kinds(actual) == kinds(expected)


# Parameters, gradients, averages, and updates.
DTYPES = [
    ("float16", "float16", "float32", "float16"),
    ("float16", "bfloat16", "float32", "float32"),
    ("float16", "float32", "float32", "float32"),
    ("bfloat16", "float16", "float32", "float32"),
    ("bfloat16", "bfloat16", "float32", "bfloat16"),
    ("bfloat16", "float32", "float32", "float32"),
    ("float32", "float16", "float32", "float32"),
    ("float32", "bfloat16", "float32", "float32"),
    ("float32", "float32", "float32", "float32"),
    ("float32", "float64", "float32", "float64"),
    ("float64", "float32", "float64", "float64"),
    ("float64", "float64", "float64", "float64"),
    ("complex64", "complex64", "complex64", "complex64"),
    ("complex128", "complex64", "complex128", "complex128"),
    ("complex128", "complex128", "complex128", "complex128"),
]
# An update is made in the dtype of the averages and rounded to its own.
ROUNDING = {
    "float16": 1e-3,  # observed: 4e-4
    "bfloat16": 8e-3,  # observed: 4e-3
    "float32": 4e-6,  # observed: 6e-7
    "float64": 1e-14,  # observed: 0
    "complex64": 4e-6,  # observed: 8e-7
    "complex128": 1e-14,  # observed: 2e-15
}


def exact_parts(tree):
    """In float64, real and imaginary part apart; that of a real number is 0."""
    parts = {"real": jnp.real, "imag": jnp.imag}
    return {
        name: jax.tree.map(lambda leaf: part(leaf).astype(jnp.float64), tree)  # noqa: B023
        for name, part in parts.items()
    }


# optax itself adds the gradient to the parameter, and to the trace.
PROMOTIONS = {
    "strict": [row for row in DTYPES if row[0] == row[1]],
    "standard": [row for row in DTYPES if row[0] != row[1]],
}


@pytest.mark.parametrize(
    ("case", "promotion"),
    [("everything", "strict"), ("everything_centered", "standard")],
)
@pytest.mark.usefixtures("x64")
def test_dtypes(case, promotion):
    """One tree has a leaf of each pair of dtypes, so that one program serves all."""
    tx = rmsprop(**CASES[case])
    rows = {"-".join(row[:2]): row for row in PROMOTIONS[promotion]}
    params, gradients = {}, {}
    for name, (of_params, of_gradients, of_state, _) in rows.items():
        shapes = {"leaf": (16,)}
        p, g, _ = problem(STEPS, np.result_type(of_state, "float32"), shapes)
        params[name] = jnp.asarray(p["leaf"], of_params)
        gradients[name] = jnp.asarray(g["leaf"], of_gradients)
    exact_params = exact_parts(params)
    state, exact_state = tx.init(params), tx.init(exact_params)
    kinds_at_first = kinds(state)
    update = jax.jit(tx.update)
    for g in by_step(gradients):
        with jax.numpy_dtype_promotion(promotion):
            updates, state = update(g, state, params)
        exact, exact_state = update(exact_parts(g), exact_state, exact_params)
        assert kinds(state) == kinds_at_first
        parts = exact_parts(updates)
        for name, (_, _, of_state, of_updates) in rows.items():
            assert updates[name].dtype == of_updates, name
            rounding = max(ROUNDING[of_state], ROUNDING[of_updates])
            for part in ("real", "imag"):
                np.testing.assert_allclose(
                    parts[part][name],
                    exact[part][name],
                    rtol=rounding,
                    atol=rounding / 100,
                    err_msg=f"{name}, {part}",
                )
    for slot in averages(state).values():
        for name, (_, _, of_state, _) in rows.items():
            assert slot[name].dtype == of_state, name


@pytest.mark.parametrize("make", [scale_by_rms, scale_by_stddev, rmsprop])
def test_updates_have_the_gradients_dtype_or_the_parameters_if_wider(make):
    tx, g = make(), jnp.full((2,), 0.25, jnp.float16)
    state = tx.init(g.astype(jnp.float32))
    alone, _ = tx.update(g, state)
    beside, _ = tx.update(g, state, g.astype(jnp.float32))
    exact, _ = tx.update(g.astype(jnp.float32), state)
    assert (alone.dtype, beside.dtype) == (jnp.float16, jnp.float32)
    chex.assert_trees_all_equal(beside, exact)


def test_a_small_rate_is_not_lost_between_float16_gradients_and_float32_parameters():
    params = jnp.ones(2)
    tx = rmsprop(1e-8, eps=0.0)
    updates, _ = tx.update(params.astype(jnp.float16), tx.init(params), params)
    np.testing.assert_allclose(updates, -1e-7, rtol=1e-6)  # 0 in float16


ANYTHING = {
    "function": jnp.tanh,
    "string": "float32",
    "class": float,
    "integer": 3,
    "integers": jnp.arange(3),
    "key": jax.random.key(0),
    "tree": {"inside": [object()]},
    "nothing": None,
}
TRANSFORMS = {
    "scale_by_rms": scale_by_rms(),
    "scale_by_stddev": scale_by_stddev(),
    "rmsprop": rmsprop(),
    "mask": rmsprop(
        weight_decay=0.1, weight_decay_mask=lambda tree: {n: True for n in tree}
    ),
    **{case: rmsprop(**CASES[case]) for case in ("weight_decay", *EXTREMES)},
}


@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_parameters_without_gradient_may_be_anything(tx):
    params, gradients = arrays()
    state, g = tx.init(params), by_step(gradients)[0]
    expected, expected_state = tx.update(g, state, params)
    nothing = dict.fromkeys(ANYTHING)
    updates, state = tx.update(
        g | nothing, tx.init(params | nothing), params | ANYTHING
    )
    chex.assert_trees_all_equal(updates, expected | nothing)
    chex.assert_trees_all_equal(jax.tree.leaves(state), jax.tree.leaves(expected_state))


@pytest.mark.parametrize("make", [scale_by_rms, scale_by_stddev, rmsprop])
@pytest.mark.parametrize(
    ("of_params", "of_state"), [("float32", "float64"), ("complex64", "complex128")]
)
@pytest.mark.usefixtures("x64")
def test_accumulator_dtype(make, of_params, of_state):
    tx = make(accumulator_dtype="float64")
    params = jnp.ones(2, of_params)
    state = tx.init(params)
    for _ in range(2):
        slots = averages(state)
        assert {slot.dtype.name for slot in slots.values()} == {of_state}
        updates, state = tx.update(params, state, params)
    assert updates.dtype == params.dtype


SETTINGS = {
    "learning_rate": [1e-2, 1e-3, 3e-2],
    "decay": [0.9, 0.999, 0.5],
    "eps": [1e-8, 1e-2, 0.0],
    "momentum": [0.9, 0.0, 0.5],
    "weight_decay": [0.0, 0.1, 1e-3],
    "initial_scale": [0.0, 1.0, 0.1],
}
STRUCTURES = {
    "centered": {"centered": True, "eps_in_sqrt": True},
    "lr_in_momentum": {"lr_in_momentum": True, "decoupled_weight_decay": True},
    "bias_correction": {"bias_correction": True},
}


@pytest.mark.parametrize(
    ("structure", "dtype"),
    list(zip(STRUCTURES, ["float32", "float64", "float32"], strict=True)),
)
def test_vmap_over_every_number(structure, dtype, request):
    options = STRUCTURES[structure]
    if dtype == "float64":
        request.getfixturevalue("x64")
    settings = dict(SETTINGS)
    if "bias_correction" in options:
        del settings["initial_scale"]  # the two exclude each other
    run = arrays()

    def parameters_after(numbers, train=train):
        return train(rmsprop(**numbers, **options), *run)[0]

    stacked = {name: jnp.asarray(values) for name, values in settings.items()}
    mapped = jax.vmap(functools.partial(parameters_after, train=train_compiled))
    together = jax.tree.map(np.asarray, mapped(stacked))
    for i in range(3):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf: leaf[i], together),  # noqa: B023
            parameters_after({name: values[i] for name, values in settings.items()}),
            **(FLOAT64 if dtype == "float64" else FLOAT32),
        )


@in_extremes
@pytest.mark.usefixtures("x64")
def test_none_in_parameters(options):
    params, gradients = arrays()
    tx = rmsprop(**options)
    with_none = train(tx, params | {"frozen": None}, gradients | {"frozen": None})[0]
    assert with_none.pop("frozen", "gone") is None
    chex.assert_trees_all_equal(with_none, train(tx, params, gradients)[0])


@in_extremes
@pytest.mark.usefixtures("x64")
def test_none_as_a_gradient_leaves_its_state(options):
    params, gradients = arrays()
    tx = rmsprop(**options)
    first, second, *_ = by_step(gradients)
    params, state = stepper(tx)(params, tx.init(params), first)
    expected, expected_state = tx.update(second, state, params)
    partly, partly_state = tx.update(second | {"matrix": None}, state, params)
    chex.assert_trees_all_equal(partly, expected | {"matrix": None})
    before, after = averages(state), averages(expected_state)
    assert before.keys() == after.keys()
    stays = {name: after[name] | {"matrix": before[name]["matrix"]} for name in after}
    chex.assert_trees_all_equal(averages(partly_state), stays)
    assert kinds(partly_state) == kinds(state)


@in_extremes
@pytest.mark.usefixtures("x64")
def test_a_scalar_is_a_vector_of_one(options):
    params, gradients = ({"x": tree["scalar"]} for tree in arrays())
    tx = rmsprop(**options)
    scalar, _ = train(tx, params, gradients)
    vector, _ = train(tx, {"x": params["x"][None]}, {"x": gradients["x"][:, None]})
    assert scalar["x"].shape == (STEPS,)
    chex.assert_trees_all_close(scalar["x"], vector["x"][:, 0], **FLOAT64)


@in_extremes
def test_an_empty_tree_counts_its_updates(options):
    tx = rmsprop(**options)
    state = tx.init({})
    for _ in range(3):
        updates, state = tx.update({}, state, {})
        assert updates == {}
    counts = jax.tree.leaves(state)
    assert counts == [3] * len(counts) != []


@in_extremes
def test_init_from_shapes(options):
    tx = rmsprop(**options)
    params, _ = arrays()
    state = tx.init(params)
    abstract = jax.eval_shape(lambda: params)
    chex.assert_trees_all_equal(tx.init(abstract), state)
    assert kinds(tx.init(abstract)) == kinds(state)
    assert kinds(jax.eval_shape(tx.init, params)) == kinds(state)


OFF = [
    {"momentum": None, "weight_decay": None},
    {"momentum": 0, "weight_decay": 0},
    {"momentum": 0.0, "weight_decay": 0.0, "decoupled_weight_decay": True},
    {"momentum": np.float32(0), "weight_decay": np.zeros(())},
]


def program(options):
    """The state's structure, and all that an update computes."""
    tx = rmsprop(**options)
    params, gradients = arrays()
    state, g = tx.init(params), by_step(gradients)[0]
    return jax.tree.structure(state), str(jax.make_jaxpr(tx.update)(g, state, params))


@pytest.mark.parametrize("options", OFF, ids=str)
def test_an_option_that_is_off_costs_nothing(options):
    assert program(options) == program({})


@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_an_array_of_0_is_not_off(name):
    structure, text = program({name: jnp.zeros(())})
    plain_structure, plain_text = program({})
    assert structure != plain_structure
    assert text.count("\n") > plain_text.count("\n")


MODULES = (
    "optax_rmsprop",
    "optax_rmsprop.dialects",
    "optax_rmsprop.carry.torch_layers",
    "optax_rmsprop.torch_layers",
)


@pytest.mark.parametrize("name", MODULES)
def test_a_star_import_brings_the_public_names_and_no_others(name):
    namespace = {}
    exec(f"from {name} import *", namespace)
    module = importlib.import_module(name)
    functions = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith(module.__name__)
        and isinstance(value, types.FunctionType)
    }
    assert namespace.keys() - {"__builtins__"} == set(module.__all__) >= functions


def test_import_needs_neither_torch_nor_flax():
    code = """import sys, optax_rmsprop
assert optax_rmsprop.rmsprop(0.1).init(1.0)[0].nu == 0
assert "optax_rmsprop.dialects" not in sys.modules  # until it is used
assert optax_rmsprop.dialects.torch(0.1).init(1.0)[0].nu == 0
assert optax_rmsprop.from_torch and optax_rmsprop.from_keras
assert optax_rmsprop.torch_layers.linear
assert not hasattr(optax_rmsprop, "nonsense")
from optax_rmsprop import *
assert from_torch_checkpoint and torch_layers.lstm
print(sorted({"torch", "flax", "keras"} & sys.modules.keys()))"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


# Three gradients, as factors of the parameter. Of the five parameters one has none, one
# has none at first, one has none later, and the last one's hardly vary.
CURVATURES = np.array([[0, 0, 1, 1, 0.5], [0, 0.5, 0, -0.3, 0.5], [0, 0.7, 0, 2, 0.5]])
START = np.array([1, -2, 0.5, 1, 3])
NUMBERS = {"learning_rate": 1e-2, "decay": 0.9, "momentum": 0.9}
DERIVATIVE_TOLERANCE = 1e-5  # observed: 3e-6, the forward difference in eps
BRANCHES = {
    "eps": (0.0, 1e-8, 1e-2),
    "eps_in_sqrt": (False, True),
    "centered": (False, True),
    "bias_correction": (False, True),
}
COMBINATIONS = [
    dict(zip(BRANCHES, values, strict=True))
    for values in itertools.product(*BRANCHES.values())
]


# The flags make programs of their own, eps does not.
FLAGS = covering([{k: v for k, v in c.items() if k != "eps"} for c in COMBINATIONS])


def of_programs(flags):
    return [c for c in COMBINATIONS if {k: c[k] for k in FLAGS[0]} in flags]


def starts_without_variance(case):
    """The first update is g/eps then: not differentiable at 0, nor well conditioned."""
    return case["centered"] and case["bias_correction"]


@functools.partial(
    jax.jit, static_argnames=("eps_in_sqrt", "centered", "bias_correction")
)
@functools.partial(jax.grad, argnums=(0, 1))
def derivatives(params, numbers, **flags):
    """The derivatives of the parameters' sum after three updates."""
    tx = rmsprop(**numbers, **flags)

    def step(carry, curvature):
        params, state = carry
        g = jax.grad(lambda p: jnp.sum(curvature * p**2) / 2)(params)
        return stepper(tx)(params, state, g), None

    curvatures = jnp.asarray(CURVATURES, params.dtype)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), curvatures)
    return jnp.sum(params)


def derivatives_of(case):
    flags = dict(case)
    numbers = NUMBERS | {"eps": flags.pop("eps")}
    return derivatives(*jax.tree.map(jnp.asarray, (START, numbers)), **flags)


def difference_quotients(case):
    """The same derivatives, of the NumPy reference."""

    def final_sum(params, numbers):
        path = [params]
        gradients = (curvature * path[-1] for curvature in CURVATURES)
        for p, _ in reference.rmsprop(params, gradients, **numbers):
            path.append(p)
        return np.sum(path[-1])

    def quotient(change, low, high):
        return (change(high) - change(low)) / (high - low)

    def by_start(i):
        unit = np.arange(len(START)) == i
        return quotient(lambda h: final_sum(START + h * unit, numbers), -1e-6, 1e-6)

    def by_number(name):
        low = 0 if numbers[name] < 1e-7 else -1e-7  # eps may be 0
        return quotient(
            lambda h: final_sum(START, numbers | {name: numbers[name] + h}), low, 1e-7
        )

    numbers = NUMBERS | case
    starts = np.array([by_start(i) for i in range(len(START))])
    return starts, {name: by_number(name) for name in [*NUMBERS, "eps"]}


@pytest.mark.slow
def test_the_derivative_by_no_memory_is_finite():
    def second_update(decay):
        tx = scale_by_rms(decay, bias_correction=True)
        _, state = tx.update(jnp.ones(()), tx.init(jnp.ones(())))
        return tx.update(2 * jnp.ones(()), state)[0]

    # nu = (4 + decay)/(1 + decay), so that 2/√nu grows by 3/8.
    assert jax.grad(second_update)(0.0) == pytest.approx(3 / 8, rel=1e-6)


def test_the_count_does_not_overflow():
    tx = scale_by_rms(bias_correction=True)
    last = jnp.iinfo(jnp.int32).max
    state = tx.init(jnp.ones(()))._replace(count=jnp.int32(last))
    assert tx.update(jnp.ones(()), state)[1].count == last


@pytest.mark.parametrize(
    "case",
    slow_but(
        of_programs(FLAGS[:1]),
        [c for c in of_programs(FLAGS) if c["eps"] or not starts_without_variance(c)],
    ),
)
@pytest.mark.usefixtures("x64")
def test_derivatives_are_right(case):
    found = derivatives_of(case)
    chex.assert_tree_all_finite(found)
    if case["eps"] > 1e-3 or not starts_without_variance(case):
        chex.assert_trees_all_close(
            found, difference_quotients(case), rtol=DERIVATIVE_TOLERANCE
        )
