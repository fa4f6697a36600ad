"""At home in optax: under its wrappers and tools, the numbers of doing it by hand."""

import functools
import os
import pickle
import subprocess
import sys

import chex
import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import optax_rmsprop
from helpers import (
    STEPS,
    arrays,
    by_reference,
    by_step,
    falling,
    problem,
    stepper,
    train,
    train_compiled,
)
from optax_rmsprop import (
    compress_state,
    dialects,
    rmsprop,
    scale_by_rms,
    scale_by_stddev,
)

pytestmark = pytest.mark.usefixtures("x64")

TOLERANCE = {"rtol": 1e-12, "atol": 1e-14}  # float64; observed: 5e-16
MULTI_STEPS_TOLERANCE = {"rtol": 0, "atol": 1e-6}  # float32 mean; observed: 3e-7
FLOAT32_DECAY_TOLERANCE = 3e-5  # 1 - float32(0.999) is off by 1.3e-5; observed: 1.3e-5

# Every slot that an option can add, and an eps that matters to small gradients.
OPTIONS = {"decay": 0.9, "eps": 1e-2, "momentum": 0.8, "weight_decay": 0.1}


def assert_close(actual, expected):
    chex.assert_trees_all_close(actual, expected, **TOLERANCE)


SCHEDULES = {
    "falling": falling,
    "warmup": optax.warmup_exponential_decay_schedule(0.0, 1e-2, 4, 4, 0.5),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("schedule", "lr_in_momentum"),
    list(zip(SCHEDULES.values(), [False, True], strict=True)),
    ids=SCHEDULES,
)
def test_learning_rate_schedule(schedule, lr_in_momentum):
    params, gradients = arrays()
    options = OPTIONS | {"lr_in_momentum": lr_in_momentum}
    history, _ = train(rmsprop(schedule, **options), params, gradients)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(STEPS, dtype=jnp.int32)))
    expected, _ = by_reference(
        params, gradients, learning_rate=lambda t: rates[t], **options
    )
    assert_close(history, expected)


@pytest.mark.parametrize(
    ("decoupled", "lr_in_momentum"), [(False, True), (True, False), (True, True)]
)
def test_weight_decay_schedule(decoupled, lr_in_momentum):
    params, gradients = arrays()
    options = OPTIONS | {
        "learning_rate": falling,
        "weight_decay": lambda count: 20 * falling(count),
        "decoupled_weight_decay": decoupled,
        "lr_in_momentum": lr_in_momentum,
    }
    history, _ = train(rmsprop(**options), params, gradients)
    assert_close(history, by_reference(params, gradients, **options)[0])


def test_chain_after_clip_by_global_norm():
    params, gradients = arrays()
    squares = [np.square(g).reshape(STEPS, -1).sum(axis=1) for g in gradients.values()]
    norms = np.sqrt(sum(squares))
    limit = np.median(norms)
    tx = optax.chain(optax.clip_by_global_norm(limit), rmsprop(**OPTIONS))
    history, _ = train(tx, params, gradients)
    factors = np.minimum(1, limit / np.where(norms > 0, norms, 1))
    clipped = {k: (factors * np.asarray(g).T).T for k, g in gradients.items()}
    expected, _ = by_reference(params, clipped, **OPTIONS)
    assert_close(history, expected)


MASKS = {
    "tree": {"matrix": True, "scalar": False, "empty": True},
    "function": lambda tree: {name: name != "scalar" for name in tree},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked(mask):
    params, gradients = arrays()
    tx = optax.masked(rmsprop(**OPTIONS), mask)
    history, state = train(tx, params, gradients)
    expected, averages = by_reference(params, gradients, **OPTIONS)
    # optax.masked passes the gradient of a masked leaf on as it is.
    raw = params["scalar"] + np.cumsum(gradients["scalar"])
    assert_close(history, expected | {"scalar": raw})
    kept = averages["nu"] | {"scalar": optax.MaskedNode()}
    assert_close(optax.tree.get(state, "nu"), kept)


def test_masked_leaf_stays_untouched():
    params, gradients = arrays()
    steps_taken = jnp.arange(3)  # integers: rmsprop itself would refuse them
    tx = optax.masked(rmsprop(**OPTIONS), {"params": True, "steps_taken": False})
    tree = {"params": params, "steps_taken": steps_taken}
    g = {"params": by_step(gradients)[0], "steps_taken": jnp.zeros_like(steps_taken)}
    params_after, _ = stepper(tx)(tree, tx.init(tree), g)
    chex.assert_trees_all_equal(params_after["steps_taken"], steps_taken)
    expected, _ = by_reference(params, gradients, **OPTIONS)
    assert_close(params_after["params"], by_step(expected)[0])


def test_partition_equals_separate_runs():
    params, gradients = arrays()
    groups = {"a": OPTIONS, "b": {"decay": 0.5, "centered": True, "maximize": True}}
    labels = {"matrix": "a", "scalar": "b", "empty": "a"}
    tx = optax.partition({k: rmsprop(**group) for k, group in groups.items()}, labels)
    history, state = train(tx, params, gradients)
    a, a_slots = by_reference(params, gradients, **groups["a"])
    b, b_slots = by_reference(params, gradients, **groups["b"])
    assert_close(history, a | {"scalar": b["scalar"]})
    for slot, expected in {"nu": a_slots, "trace": a_slots, "var": b_slots}.items():
        masked = optax.tree.get(state, slot)
        named = {k: v for k, v in masked.items() if v != optax.MaskedNode()}
        assert_close(named, {name: expected[slot][name] for name in named})


def of_dtype(dtype):
    return lambda tree: jax.tree.map(lambda leaf: leaf.dtype == dtype, tree)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(rmsprop, 1.0, decoupled_weight_decay=True),
        functools.partial(dialects.torch, 1.0),
        functools.partial(dialects.keras, 1.0),
        functools.partial(dialects.timm, 1.0, decoupled_decay=True),
    ],
    ids=["rmsprop", "torch", "keras", "timm"],
)
@pytest.mark.parametrize("gradient", ["bfloat16", "float32"])
def test_a_mask_sees_the_parameters_as_they_are(make, gradient):
    params = {"half": jnp.ones(2, jnp.bfloat16), "full": jnp.ones(2, jnp.float32)}
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, gradient), params)
    seen, expected = [], {"half": True, "full": False}

    def mask(tree):
        seen.append(tree)
        return of_dtype(jnp.bfloat16)(tree)

    tx = make(weight_decay=0.1, weight_decay_mask=mask)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert [of_dtype(jnp.bfloat16)(tree) for tree in seen] == 2 * [expected]
    assert updates["half"].all()
    assert not updates["full"].any()
    if make.func is not dialects.torch:  # whose decay is divided by its own root
        np.testing.assert_allclose(np.float32(updates["half"]), -0.1, rtol=4e-3)


# Ends that a schedule could have: torch's OneCycleLR also moves the momentum.
TABLES = {
    "learning_rate": np.geomspace(1e-1, 1e-3, STEPS),
    "decay": np.linspace(0.5, 0.99, STEPS),
    "eps": np.geomspace(1e-1, 1e-4, STEPS),
    "momentum": np.linspace(0.95, 0.5, STEPS),
    "weight_decay": np.linspace(0.0, 0.5, STEPS),
}
CONSTANTS = {"learning_rate": 1e-2, **OPTIONS}


@pytest.mark.parametrize("scheduled", [*([k] for k in TABLES), list(TABLES)], ids=str)
def test_inject_hyperparams_schedules(scheduled):
    params, gradients = arrays()
    tables = {k: TABLES[k] for k in scheduled}
    schedules = {k: jnp.asarray(table).__getitem__ for k, table in tables.items()}
    tx = optax.inject_hyperparams(rmsprop)(**CONSTANTS | schedules)
    history, state = train(tx, params, gradients)

    p = jax.tree.map(np.asarray, params)
    nu = b = {name: np.zeros_like(leaf) for name, leaf in p.items()}
    for t, (gs, actual) in enumerate(by_step((gradients, history))):
        now = CONSTANTS | {k: v[t] for k, v in tables.items()}
        lr, decay, eps, momentum, weight_decay = (now[k] for k in TABLES)
        for k in p:
            g = np.asarray(gs[k]) + weight_decay * p[k]
            nu = nu | {k: decay * nu[k] + (1 - decay) * g**2}
            b = b | {k: momentum * b[k] + g / (np.sqrt(nu[k]) + eps)}
            p = p | {k: p[k] - lr * b[k]}
        assert_close(actual, p)
    assert_close({k: state.hyperparams[k] for k in CONSTANTS}, now)


def test_inject_hyperparams_in_float32_for_bfloat16_parameters():
    params, gradients, _ = jax.tree.map(jnp.bfloat16, problem(STEPS))
    inject = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)
    tx = inject(decay=0.999, momentum=lambda _: 0.5)
    _, state = train(tx, params, gradients)
    for value in state.hyperparams.values():
        assert value.dtype == jnp.float32
    assert state.hyperparams["decay"] == np.float32(0.999)  # 1 in bfloat16
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, gradients))
    _, averages = by_reference(*exact, decay=0.999)
    chex.assert_trees_all_close(
        optax.tree.get(state, "nu"),
        jax.tree.map(np.float32, averages["nu"]),
        rtol=FLOAT32_DECAY_TOLERANCE,
    )


def test_inject_hyperparams_refuses_bfloat16_hyperparameters():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = optax.inject_hyperparams(rmsprop)(decay=0.999)
    message = r"at least float32, got bfloat16.*hyperparam_dtype=jnp\.float32"
    with pytest.raises(TypeError, match=message):
        tx.init(params)


def test_inject_hyperparams_allocates_no_unused_slot():
    params, gradients = arrays()
    history, state = train(optax.inject_hyperparams(rmsprop)(), params, gradients)
    plain_history, plain_state = train(rmsprop(), params, gradients)
    assert_close(history, plain_history)
    assert_close(state.inner_state, plain_state)
    assert not {"momentum", "weight_decay"} & state.hyperparams.keys()


def test_inject_hyperparams_by_hand():
    params, gradients = arrays()
    tx = optax.inject_hyperparams(rmsprop)(learning_rate=1e-2, **OPTIONS)
    p, state = params, tx.init(params)
    for t, g in enumerate(by_step(gradients)):
        if t == 5:
            state.hyperparams["learning_rate"] = jnp.asarray(1e-3)
        p, state = stepper(tx)(p, state, g)
    expected, _ = by_reference(
        params, gradients, learning_rate=lambda t: 1e-2 if t < 5 else 1e-3, **OPTIONS
    )
    assert_close(p, by_step(expected)[-1])


@pytest.mark.usefixtures("standard_promotion")
def test_multi_steps_equals_the_mean():
    every = 4
    params, gradients = arrays(STEPS * every)
    multi_steps = optax.MultiSteps(rmsprop(**OPTIONS), every)
    history, state = train(
        multi_steps, params, gradients, jax.jit(stepper(multi_steps))
    )
    means = {
        name: np.mean(np.reshape(g, (STEPS, every, *g.shape[1:])), axis=1)
        for name, g in gradients.items()
    }
    expected, averages = by_reference(params, means, **OPTIONS)
    # The parameters stay where they are until the last of each few gradients.
    still = {
        name: np.repeat(np.concatenate([[params[name]], p]), every, axis=0)[1:]
        for name, p in expected.items()
    }
    chex.assert_trees_all_close(
        [history, optax.tree.get(state, "nu"), optax.tree.get(state, "trace")],
        [
            {k: p[: STEPS * every] for k, p in still.items()},
            averages["nu"],
            averages["trace"],
        ],
        **MULTI_STEPS_TOLERANCE,
    )


@pytest.mark.usefixtures("standard_promotion")
def test_apply_if_finite_takes_float16_gradients_in_the_parameters_dtype():
    """As docs/faq.md says; its branch that skips returns zeros like the gradient."""
    params = jnp.ones(3, jnp.float32)
    g = params.astype(jnp.float16)
    tx = optax.apply_if_finite(rmsprop(0.1), max_consecutive_errors=3)
    state = tx.init(params)
    for make in (rmsprop, optax.rmsprop):
        alone = optax.apply_if_finite(make(0.1), max_consecutive_errors=3)
        with pytest.raises(TypeError, match="branches must have equal output types"):
            alone.update(g, alone.init(params), params)
    updates, _ = tx.update(g.astype(params.dtype), state, params)
    np.testing.assert_allclose(updates, -1.0, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_apply_if_finite_skips_one_gradient(bad):
    params, gradients = arrays()
    tx = optax.apply_if_finite(rmsprop(**OPTIONS), max_consecutive_errors=3)
    steps = by_step(gradients)
    spoilt = steps[5] | {"matrix": steps[5]["matrix"].at[0, 0].set(bad)}
    step = jax.jit(stepper(tx))
    p, state = params, tx.init(params)
    for g in steps[:5]:
        p, state = step(p, state, g)
    before = p, state.inner_state
    p, state = step(p, state, spoilt)
    chex.assert_trees_all_equal((p, state.inner_state), before)
    for g in steps[5:]:
        p, state = step(p, state, g)
    expected, _ = by_reference(params, gradients, **OPTIONS)
    assert_close(p, by_step(expected)[-1])


@pytest.mark.usefixtures("standard_promotion")
def test_lookahead():
    params, gradients = arrays()
    tx = rmsprop(**OPTIONS)
    ahead = optax.lookahead(tx, sync_period=3, slow_step_size=0.25)
    synced = optax.LookaheadParams.init_synced(params)
    history, _ = train(ahead, synced, gradients, jax.jit(stepper(ahead)))

    step = stepper(tx)
    slow, fast, state = params, params, tx.init(params)
    for t, (g, actual) in enumerate(by_step((gradients, history))):
        fast, state = step(fast, state, g)
        if t % 3 == 2:
            slow = jax.tree.map(lambda s, f: s + 0.25 * (f - s), slow, fast)
            fast = slow
        assert_close(actual, optax.LookaheadParams(fast=fast, slow=slow))


def test_schedule_free():
    params, gradients = arrays()
    tx = rmsprop(1e-2, weight_decay=0.1, decoupled_weight_decay=True)
    free = optax.contrib.schedule_free(tx, learning_rate=1e-2, b1=0.9)
    history, state = train(free, params, gradients)

    def blend(weight, first, second):
        return jax.tree.map(lambda a, b: weight * a + (1 - weight) * b, first, second)

    x, y, z, inner = params, params, params, tx.init(params)
    for t, (g, actual) in enumerate(by_step((gradients, history)), start=1):
        updates, inner = tx.update(g, inner, y)
        z = optax.apply_updates(z, updates)
        x = blend(1 / t, z, x)
        y = blend(0.9, x, z)
        assert_close(actual, y)
    assert_close(optax.contrib.schedule_free_eval_params(state, actual), x)


def test_flatten():
    params, gradients = arrays()
    history, state = train(optax.flatten(rmsprop(**OPTIONS)), params, gradients)
    expected, averages = by_reference(params, gradients, **OPTIONS)
    assert_close(history, expected)
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(averages["nu"])]
    assert_close(optax.tree.get(state, "nu"), np.concatenate(leaves))


MAPPED = {
    "rms": rmsprop(falling, **OPTIONS),
    "stddev": rmsprop(falling, centered=True, **OPTIONS),
    "masked": optax.masked(rmsprop(**OPTIONS), MASKS["function"]),
    "weight_decay_mask": rmsprop(weight_decay_mask=MASKS["tree"], **OPTIONS),
}


@pytest.mark.parametrize("tx", MAPPED.values(), ids=MAPPED)
def test_tree_map_params_reaches_the_averages_alone(tx):
    _, state = train(tx, *arrays())
    doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, state)
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    by_hand = [
        leaf if path[-1] == jax.tree_util.GetAttrKey("count") else 2 * leaf
        for path, leaf in paths
    ]
    assert {path[-1] for path, _ in paths} >= {jax.tree_util.GetAttrKey("count")}
    chex.assert_trees_all_equal(doubled, jax.tree.unflatten(tree, by_hand))


def test_donation():
    params, gradients = arrays()
    tx = rmsprop(**OPTIONS)
    expected, expected_state = train_compiled(tx, params, gradients)
    step = jax.jit(stepper(tx), donate_argnums=(0, 1))
    state = tx.init(params)
    for g in by_step(gradients):
        donated = jax.tree.leaves((params, state))
        params, state = step(params, state, g)
        assert all(leaf.is_deleted() for leaf in donated)
    assert_close(params, by_step(expected)[-1])
    assert_close(state, expected_state)


def test_scan_equals_a_loop():
    params, gradients = arrays()
    tx = rmsprop(falling, **OPTIONS)
    expected, expected_state = train_compiled(tx, params, gradients)
    step, state = stepper(tx), tx.init(params)
    for g, after in by_step((gradients, expected)):
        params, state = step(params, state, g)
        assert_close(params, after)
    assert_close(state, expected_state)


@pytest.mark.parametrize("serialized", [False, True])
def test_export_and_back(serialized):
    params, gradients = arrays()
    tx = rmsprop(**OPTIONS)
    # Leaves, for jax.export wants every type of NamedTuple registered under a name.
    leaves, tree = jax.tree.flatten((params, tx.init(params)))

    @jax.jit
    def step(leaves, g):
        return jax.tree.leaves(stepper(tx)(*jax.tree.unflatten(tree, leaves), g))

    exported = export.export(step)(leaves, by_step(gradients)[0])
    if serialized:
        exported = export.deserialize(exported.serialize())
    for g in by_step(gradients):
        leaves = exported.call(leaves, g)
    expected, _ = by_reference(params, gradients, **OPTIONS)
    assert_close(jax.tree.unflatten(tree, leaves)[0], by_step(expected)[-1])


def test_a_state_of_float64_goes_on_without_64_bit_mode():
    params, gradients = arrays()
    _, state = train(rmsprop(**OPTIONS), params, gradients)
    wide = jax.tree.map(np.asarray, state)
    assert optax.tree.get(wide, "nu")["matrix"].dtype == np.float64
    jax.config.update("jax_enable_x64", False)  # the fixture restores it
    params, g = jax.tree.map(np.float32, (params, by_step(gradients)[0]))
    _, state = rmsprop(**OPTIONS).update(g, wide, params)
    assert optax.tree.get(state, "nu")["matrix"].dtype == np.float32


def matrices(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


PICKLED = {
    "rmsprop": rmsprop(**OPTIONS),
    "mask in a Partial": rmsprop(
        weight_decay_mask=jax.tree_util.Partial(matrices), **OPTIONS
    ),
    "schedule": rmsprop(optax.linear_schedule(0.1, 0.0, 9), lr_in_momentum=True),
    "dialects.keras": dialects.keras(0.1, weight_decay=0.1),
    "compress_state": compress_state(rmsprop(), "uint8", min_size=1),
    "partition": optax.partition({"a": rmsprop()}, lambda tree: "a"),
    "inject": optax.inject_hyperparams(rmsprop)(**OPTIONS),
    "apply_if_finite": optax.apply_if_finite(rmsprop(), 3),
}


def two_updates(tx):
    params, gradients = jax.tree.map(jnp.float32, arrays(2))
    return jax.tree.leaves(train(tx, params, gradients))


@pytest.mark.slow
def test_transformations_are_pickled_into_another_process(tmp_path):
    """As joblib and Ray do it."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        # Used ones are sent, too.
        expected = {name: two_updates(tx) for name, tx in PICKLED.items()}
        sent = cloudpickle.dumps((two_updates, PICKLED))
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    (tmp_path / "sent").write_bytes(sent)
    code = """import pickle, sys, jax
jax.config.update("jax_enable_x64", True)
two_updates, transformations = pickle.load(open("sent", "rb"))
results = {name: two_updates(tx) for name, tx in transformations.items()}
pickle.dump(results, open("back", "wb"))"""
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    results = pickle.loads((tmp_path / "back").read_bytes())
    assert results.keys() == expected.keys()
    for name, leaves in expected.items():
        assert_close(results[name], leaves)


def test_pickled_state_goes_on():
    params, gradients = arrays()
    tx = rmsprop(falling, centered=True, **OPTIONS)
    p, state = params, tx.init(params)
    for g in by_step(gradients):
        p, state = pickle.loads(pickle.dumps(stepper(tx)(p, state, g)))
    expected, expected_state = train(tx, params, gradients)
    assert_close(p, by_step(expected)[-1])
    assert_close(state, expected_state)


def test_extra_arguments_are_ignored():
    params, gradients = arrays()
    tx = rmsprop(**OPTIONS)
    g, state = by_step(gradients)[0], tx.init(params)
    plain = tx.update(g, state, params)
    extra = tx.update(g, state, params, value=jnp.inf, grad=None, unheard_of="of")
    chex.assert_trees_all_equal(extra, plain)


@pytest.mark.parametrize("name", ["trace", "add_decayed_weights"])
def test_building_blocks_of_optax_are_handed_on(name):
    assert getattr(optax_rmsprop, name) is getattr(optax, name)


RMS, STDDEV = scale_by_rms(0.9, 1e-2), scale_by_stddev(0.9, 1e-2)
DOWN = optax.scale_by_learning_rate(1e-2)
DECAYED, MOMENTUM = optax.add_decayed_weights(0.1), optax.trace(0.8)
CHAINS = {
    "centered": ({"centered": True}, [STDDEV, DOWN]),
    "decoupled_weight_decay": (
        {"weight_decay": 0.1, "momentum": 0.8, "decoupled_weight_decay": True},
        [RMS, MOMENTUM, DECAYED, DOWN],
    ),
    "maximize": (
        {"maximize": True, "weight_decay": 0.1},
        [optax.scale(-1.0), DECAYED, RMS, DOWN],
    ),
    "schedule": (
        {"learning_rate": falling, "momentum": 0.8},
        [RMS, MOMENTUM, optax.scale_by_learning_rate(falling)],
    ),
    "lr_in_momentum and nesterov": (
        {"momentum": 0.8, "nesterov": True, "lr_in_momentum": True},
        [RMS, optax.scale(1e-2), optax.trace(0.8, nesterov=True), optax.scale(-1.0)],
    ),
}


@pytest.mark.parametrize(("options", "transforms"), CHAINS.values(), ids=CHAINS)
def test_chained_by_hand(options, transforms):
    run = arrays()
    options = {"learning_rate": 1e-2, "decay": 0.9, "eps": 1e-2} | options
    ours = train_compiled(rmsprop(**options), *run)
    by_hand = train_compiled(optax.chain(*transforms), *run)
    # Their types differ: only ours says that the learning rate is inside the buffer.
    # XLA may contract other products and sums in each.
    both = map(jax.tree.leaves, (ours, by_hand))
    chex.assert_trees_all_close(*both, rtol=1e-12, atol=1e-14)
