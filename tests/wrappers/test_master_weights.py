"""bfloat16 parameters with a correction: exact bits, and runs that equal float32's."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import by_step, make_mesh, stepper
from optax_rmsprop import compress_state, decompress_state, rmsprop
from optax_rmsprop.wrappers import (
    MasterWeightsState,
    bfloat16_params,
    check_state_shardings,
    float32_params,
    master_weights,
    state_shardings,
    stochastic_apply_updates,
)

# optax.apply_updates adds a float32 to a bfloat16.
pytestmark = pytest.mark.usefixtures("standard_promotion")
in_either = pytest.mark.parametrize("dtype", ["int8", "int16"])
LARGEST = float(jnp.finfo(jnp.bfloat16).max)
LIMIT = 2.0**119
# It adds what it is given.
ADD = optax.identity()


def bits_of(x):
    return np.asarray(x, np.float32).view(np.uint32)


def from_bits(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def rounded(x, dropped=16):
    """The nearest float32 numbers whose last bits are 0, in NumPy's integers."""
    bits = bits_of(x).astype(np.int64) + 2 ** (dropped - 1)
    return from_bits(bits >> dropped << dropped)


def split(masters, dtype="int16", tx=ADD):
    """Parameters and a state for these master weights."""
    masters = jnp.asarray(masters, jnp.float32)
    return bfloat16_params(
        masters, master_weights(tx, dtype).init(masters.astype(jnp.bfloat16))
    )


def step(masters, updates, dtype="int16"):
    """The parameters, as float32, and the master weights after adding updates."""
    params, state = split(masters, dtype)
    tx = master_weights(ADD, dtype)
    updates, state = jax.jit(tx.update)(jnp.asarray(updates), state, params)
    params = optax.apply_updates(params, updates)
    assert params.dtype == jnp.bfloat16
    new = float32_params(params, state)
    return np.asarray(params, np.float32), np.asarray(new)


# Every lower half of a float32, beside these upper halves: 1, the last number before 2,
# a number near 1e-3, the least normal number, and two of smaller numbers.
UPPER_HALVES = [0x3F80, 0x3FFF, 0x3A83, 0x0080, 0x007F, 0x0000]


@in_either
def test_every_float32_is_a_bfloat16_and_a_correction(dtype):
    bits = np.add.outer(np.asarray(UPPER_HALVES) << 16, np.arange(2**16))
    masters = from_bits([bits, bits + 2**31])  # and the negative ones
    params, state = split(masters, dtype)
    assert state.corrections.dtype == dtype
    found = np.asarray(float32_params(params, state))
    expected = masters if dtype == "int16" else rounded(masters, 8)
    is_normal = abs(masters) >= 2.0**-126
    for got, exact in ((found, expected), (params, rounded(expected))):
        off = bits_of(got) != bits_of(exact)
        assert not off[is_normal].any()
        # The device may flush subnormal numbers to 0.
        assert (bits_of(got)[off] % 2**31 == 0).all()


@in_either
def test_the_bits_of_a_worked_example(dtype):
    params, state = split(jnp.float32(0.1), dtype)
    assert bits_of(0.1) == 0x3DCCCCCD
    assert bits_of(params) == 0x3DCD0000
    assert state.corrections == {"int16": 0xCCCD - 2**16, "int8": -0x33}[dtype]


def test_what_is_added_makes_exactly_the_nearest_bfloat16():
    """From numbers near 1 to 2 to every bfloat16, and to the last bits beside 0."""
    rng = np.random.default_rng(0)
    q = from_bits(np.arange(2**16) << 16)
    q = np.append(q[abs(q) < LIMIT], np.float32(np.arange(-1024, 1024) * 2.0**-24))
    p = from_bits((0x3F80 + np.arange(128)) << 16)[:, None]
    corrections = rng.integers(-(2**15), 2**15, (128, q.size))
    masters = from_bits(bits_of(p) + corrections)
    updates = q - masters
    params, new = step(masters, updates)
    np.testing.assert_array_equal(params, rounded(new))
    exact = masters + updates
    is_far = abs(exact) < 2.0**-16 * p
    # Not every float32 can be reached from there.
    assert 0.4 < is_far.mean() < 0.5
    np.testing.assert_array_equal(new[~is_far], exact[~is_far])
    error = abs(new - exact)
    assert (error <= 2.0**-23 * p).all()
    assert error.max() > 0


@pytest.mark.slow
def test_random_steps_are_those_of_float32():
    rng = np.random.default_rng(0)
    signs, sizes = rng.choice([-1, 1], (2, 100_000)), rng.uniform(1, 2, (2, 100_000))
    exponents = rng.integers([[-30], [-40]], 5, (2, 100_000))
    masters, updates = (signs * sizes * 2.0**exponents).astype(np.float32)
    params, new = step(masters, updates)
    np.testing.assert_array_equal(new, masters + updates)
    np.testing.assert_array_equal(params, rounded(masters + updates))
    # With 24 bits the new number is one of the two neighbours.
    masters = rounded(masters, 8)
    params, new = step(masters, updates, "int8")
    assert (bits_of(new) % 2**8 == 0).all()
    exact = bits_of(masters + updates).astype(np.int64)
    assert (abs(bits_of(new) - exact) < 2**8).all()
    np.testing.assert_array_equal(params, rounded(new))


def test_tiny_updates_arrive_in_the_mean_with_24_bits():
    steps, size, update = 1000, (64, 64), 2.0**-20  # a 32nd of the spacing at 1
    tx = master_weights(ADD, "int8")
    params = jnp.ones(size, jnp.bfloat16)
    updates = jnp.full(size, update)

    def body(_, carry):
        return stepper(tx)(*carry, updates)

    run = jax.jit(lambda *carry: jax.lax.fori_loop(0, steps, body, carry))
    new = np.asarray(float32_params(*run(params, tx.init(params))), np.float64)
    # Each step goes up by 2**-15 with probability 1/32.
    deviation = 2.0**-15 * np.sqrt(steps * 31) / 32
    error = new.mean() - (1 + steps * update)
    assert abs(error) < 5 * deviation / np.sqrt(new.size)
    # Random bits that are spread over the steps leave less than independent ones would.
    assert 0 < new.std() < deviation / 3


# Parameters and updates: beyond the range, zeros, infinity and NaN.
EXTREMES = [
    (LARGEST, LARGEST),
    (-LARGEST, -1e30),
    (LARGEST, -3.4e38),
    (-1e-3, 3.4e38),
    (-LARGEST, 1.0),
    (0.0, -0.0),
    (-0.0, -0.0),
    (1.0, -1.0),
    (1.0, np.inf),
    (1.0, -np.inf),
    (1.0, np.nan),
    (np.nan, 1.0),
    (-np.inf, 1.0),
]


@in_either
def test_what_is_finite_stays_finite_and_the_rest_is_nan(dtype):
    params, updates = np.transpose(EXTREMES).astype(np.float32)
    total = params.astype(float) + updates
    expected = np.where(np.isfinite(total), np.clip(total, -LIMIT, LIMIT), np.nan)
    tx, params = master_weights(ADD, dtype), jnp.bfloat16(params)
    updates, state = tx.update(jnp.asarray(updates), tx.init(params), params)
    with jax.numpy_dtype_promotion("strict"):
        new = stochastic_apply_updates(params, updates, jax.random.key(0))
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(np.float32(new), np.float32(params))
    for found in (params, float32_params(params, state)):
        np.testing.assert_allclose(np.float32(found), expected, rtol=2.0**-8)


@in_either
def test_parameters_that_were_changed_take_their_corrections_along(dtype):
    masters = jnp.asarray([1.003, 0.999, -0.999, 0.999, 0.999])
    _, state = split(masters, dtype)
    params = np.float32([2, 2, 0, -0.0, np.nan])
    new = np.asarray(float32_params(jnp.bfloat16(params), state))
    np.testing.assert_array_equal(new[2:], params[2:])
    np.testing.assert_array_equal(rounded(new[:2]), params[:2])
    assert 2 < new[0] < 2.008
    assert 1.996 < new[1] < 2


def noisy_gradient(p, noise):
    return (p * p - 1) * noise


def problem():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(16, 8)), "b": rng.normal(size=8)}
    noise = {k: rng.normal(size=(12, *np.shape(p))) for k, p in params.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (params, noise))


R = {"learning_rate": 0.01, "decay": 0.9}
RUNS = {
    "plain": rmsprop(**R),
    "everything": rmsprop(
        **R, eps=1e-2, centered=True, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "adamw": optax.adamw(0.01),
    "bfloat16 state": compress_state(rmsprop(**R), "bfloat16", min_size=1),
}


@pytest.mark.parametrize("tx", RUNS.values(), ids=RUNS)
def test_a_run_is_to_the_bit_one_in_float32(tx):
    """Its gradients are computed with the parameters rounded to bfloat16."""
    params, noise = problem()
    ours = master_weights(tx, "int16")
    masters = jax.tree.map(jnp.float32, params)
    state, plain = ours.init(params), tx.init(masters)
    for n in by_step(noise):
        grads = jax.tree.map(noisy_gradient, params, n)
        params, state = stepper(ours)(params, state, grads)
        grads = jax.tree.map(jnp.float32, grads)
        masters, plain = stepper(tx)(masters, plain, grads)
        chex.assert_trees_all_equal(float32_params(params, state), masters)
        nearest = jax.tree.map(rounded, masters)
        chex.assert_trees_all_equal(jax.tree.map(jnp.float32, params), nearest)
    chex.assert_trees_all_equal(state.inner, plain)
    chex.assert_trees_all_equal_dtypes(state.inner, plain)


@in_either
def test_compiled_once_in_place_and_the_state_keeps_its_kind(dtype):
    params, noise = problem()
    params["wide"] = jnp.ones(3)
    noise["wide"] = jnp.ones((12, 3))
    params["none"] = noise["none"] = None
    tx = master_weights(rmsprop(**R), dtype)
    state = tx.init(params)
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1), donate_argnums=(0, 1))
    chex.clear_trace_counter()
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state))
    assert kinds[1].corrections["w"] == ((16, 8), dtype, False)
    assert kinds[1].corrections["wide"] is kinds[1].corrections["none"] is None
    for n in by_step(noise)[:2]:
        old = params["w"], state.corrections["w"]
        params, state = step(params, state, n)
        assert all(x.is_deleted() for x in old)
        new = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state))
        assert new == kinds


@in_either
def test_what_has_no_update_stays_and_other_dtypes_have_the_updates_of_tx(dtype):
    params, grads = {"a": jnp.full(3, 1.001)}, jnp.full(3, 2.0)
    params, state = split(params["a"], dtype, optax.sgd(0.1))
    params = {"still": params, "f32": jnp.ones(3), "text": "as it is"}
    corrections = {"still": state.corrections, "f32": None, "text": None}
    state = state._replace(corrections=corrections)
    updates, after = master_weights(optax.sgd(0.1), dtype).update(
        {"still": None, "f32": grads, "text": None}, state, params
    )
    assert updates["still"] is updates["text"] is None
    chex.assert_trees_all_equal(updates["f32"], jnp.full(3, -0.2))
    chex.assert_trees_all_equal(after.corrections, corrections)


@pytest.mark.slow
def test_on_eight_devices_as_on_one():
    mesh = make_mesh({"data": 8})
    rows = NamedSharding(mesh, P("data"))
    rng = np.random.default_rng(0)
    params, g = (
        {"w": jnp.asarray(x, jnp.bfloat16)} for x in rng.normal(size=(2, 16, 8))
    )
    tx = master_weights(rmsprop(**R), "int8")
    step = jax.jit(stepper(tx))
    expected = step(params, tx.init(params), g)
    params, g = jax.device_put((params, g), rows)
    shardings = state_shardings(tx, params)
    assert shardings.corrections["w"] == shardings.inner[0].nu["w"] == rows
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    params, state = step(params, state, g)
    check_state_shardings(state, shardings)
    chex.assert_trees_all_equal((params, state), expected)


def test_tools_for_states_find_the_corrections():
    params, noise = problem()
    tx = optax.chain(master_weights(compress_state(rmsprop(**R), "uint8"), "int8"))
    _, state = stepper(tx)(params, tx.init(params), by_step(noise)[0])
    marked = optax.tree_map_params(
        tx, lambda _, p: p, state, params, transform_non_params=lambda x: x
    )
    chex.assert_trees_all_equal(marked[0].corrections, params)
    assert marked[0].count == 1
    copy = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))
    assert type(copy[0]) is MasterWeightsState
    chex.assert_trees_all_equal(copy, state)
    opened = decompress_state(state)
    assert opened[0].inner[0].nu["w"].dtype == jnp.float32
    chex.assert_trees_all_equal(*(float32_params(params, s) for s in (state, opened)))


@pytest.mark.slow
def test_runs_under_vmap_are_the_runs_one_by_one():
    rng = np.random.default_rng(0)
    params, g = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.bfloat16)
    tx = master_weights(rmsprop(**R), "int8")
    states = jax.vmap(tx.init)(params)
    step = jax.jit(stepper(tx))
    together = jax.jit(jax.vmap(step))(params, states, g)
    for i in range(3):
        expected = step(params[i], tx.init(params[i]), g[i])
        found = jax.tree.map(lambda x: x[i], together)  # noqa: B023
        chex.assert_trees_all_equal(found, expected)


def test_masked_parameters_have_no_corrections():
    params, noise = problem()
    g = by_step(noise)[0]
    inner = master_weights(rmsprop(**R), "int16")
    tx = optax.masked(inner, {"w": True, "b": False})
    updates, state = tx.update(g, tx.init(params), params)
    assert updates["b"] is g["b"]
    expected, all_state = inner.update(g, inner.init(params), params)
    chex.assert_trees_all_equal(updates, expected | {"b": g["b"]})
    new = float32_params(params, state)
    assert new["b"] is params["b"]
    chex.assert_trees_all_equal(
        new, float32_params(params, all_state) | {"b": new["b"]}
    )


BAD_ARGUMENTS = [
    ((None, "int8"), {}, TypeError, "`tx` must be an optax.Grad"),
    ((ADD, "uint8"), {}, ValueError, "`dtype` must be int8 or int16, got uint8; with"),
    ((ADD, "tiny"), {}, ValueError, "int16, got 'tiny'; with"),
    ((ADD, "int8"), {"seed": 2**32}, ValueError, r"`seed` must be .*4\.29.*got 4"),
]


@pytest.mark.parametrize(("args", "options", "error", "says"), BAD_ARGUMENTS)
def test_bad_arguments(args, options, error, says):
    with pytest.raises(error, match=says):
        master_weights(*args, **options)


def test_bad_parameters_and_states():
    tx, params = master_weights(ADD, "int8"), {"w": jnp.ones((2, 3), jnp.bfloat16)}
    state = tx.init(params)
    half = {"w": jnp.ones(2, jnp.float16)}
    wide = jax.tree.map(jnp.float32, params)
    of_16_bits = master_weights(ADD, "int16").init(params)
    as_in_init = (
        r"as in init, bfloat16 of shape \(2, 3\), got float32 of shape \(2, 3\) at"
    )
    cases = [
        (lambda: tx.init(half), r"`params` .* 32 bits, got float16 at \['w'\]; conv"),
        (lambda: tx.update(params, state), "`params` must be the parameters, got None"),
        (lambda: tx.update(params, state, wide), "`params` must be " + as_in_init),
        (lambda: tx.update(params, tx.init(wide), params), "was not bfloat16, got bf"),
        (
            lambda: tx.update(params, of_16_bits, params),
            "`state` .* in int8, got int16",
        ),
        (lambda: tx.update(params, ADD.init(params), params), "`state` must come from"),
        (lambda: tx.update({}, state, params), r"`updates` .* missing \['w'\]"),
        (lambda: tx.update({}, state, {}), "`params` must have the structure of the"),
        (lambda: float32_params(wide, state), "`params` must be " + as_in_init),
        (lambda: float32_params(params, {}), "`state` must have one Mast.*, got 0 in"),
        (
            lambda: bfloat16_params(params, state),
            "`masters` must be as in init, float32",
        ),
        (lambda: compress_state(tx, "uint8", min_size=0).init(params), "got int8 at"),
    ]
    for call, says in cases:
        with pytest.raises(ValueError, match=says):
            call()
