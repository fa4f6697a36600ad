"""`single_pass` where XLA joins loops; `test_single_pass.py` runs this with the flag.

A loop is counted if it writes a whole array; the counters of a state have their own.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import BRANCHING, WRAPPERS, make_mesh, stepper
from optax_rmsprop import dialects, rmsprop
from optax_rmsprop.wrappers import compress_state, joins_loops, single_pass

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPE = (512, 512)
everything = functools.partial(rmsprop, centered=True, momentum=0.9, weight_decay=1e-2)
CASES = {
    "plain": lambda: rmsprop(1e-2),
    "momentum": lambda: rmsprop(1e-2, momentum=0.9),
    "decoupled decay": lambda: everything(1e-2, decoupled_weight_decay=True),
    "all options": lambda: everything(
        lambda count: 1e-2 / (1 + count),
        nesterov=True,
        eps_in_sqrt=True,
        lr_in_momentum=True,
        bias_correction=True,
        maximize=True,
    ),
    "adam": lambda: optax.adam(1e-2),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-2),
    **{
        f"dialects.{name}": functools.partial(getattr(dialects, name), 1e-2)
        for name in ("tensorflow", "keras", "paddle", "mlx", "dqn2015")
    },
    **{
        name: functools.partial(wrap, lambda: rmsprop(1e-2, momentum=0.9))
        for name, wrap in WRAPPERS.items()
        if name not in BRANCHING
    },
}


def trees(shape=SHAPE, steps=3, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    tree = lambda: {"w": jnp.asarray(rng.normal(size=shape), dtype)}  # noqa: E731
    return tree(), [tree() for _ in range(steps)]


def compiled(tx, params, grads):
    step = jax.jit(stepper(tx), donate_argnums=(0, 1))
    return step.lower(params, jax.eval_shape(tx.init, params), grads).compile()


def loops_of(program, shape=SHAPE):
    """The number of loops that write an array of a shape, and the number of copies."""
    text = program.as_text()
    entry = text[text.index("ENTRY") :]
    size = f"[{','.join(map(str, shape))}]"
    results = re.findall(r"= (.*?) (fusion|copy|reduce|call)\(", entry)
    kinds = [kind for result, kind in results if size in result]
    return len(kinds) - kinds.count("copy"), kinds.count("copy")


def last(step, tx, params, gradients):
    """Parameters and state after the last of some compiled steps, which donate them."""
    params = jax.tree.map(jnp.copy, params)
    state = jax.jit(tx.init)(params)
    for g in gradients:
        params, state = step(params, state, g)
    return params, state


def compared(tx, params, gradients):
    """The compiled steps of `tx` and `single_pass(tx)`, which give the same bits."""
    steps = [compiled(t, params, gradients[0]) for t in (tx, single_pass(tx))]
    plain, ours = (last(step, tx, params, gradients) for step in steps)
    assert_same_bits(ours, plain)
    return steps


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_xla_joins_loops():
    assert joins_loops()


@pytest.mark.parametrize("name", CASES)
def test_one_loop_with_the_same_bits(name):
    tx = CASES[name]()
    params, gradients = trees()
    _, program = compared(tx, params, gradients)
    # XLA joins loops of less than 20 operands. All options together are at the limit.
    if name != "all options":
        assert loops_of(program) == (1, 0)
        assert program.memory_analysis().temp_size_in_bytes < 2**10


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_loops_that_write_another_dtype_are_not_joined(dtype):
    tx = rmsprop(1e-2, centered=True, momentum=0.9)
    params, gradients = trees(dtype=dtype)
    plain, ours = compared(tx, params, gradients)
    assert loops_of(plain) == (4, 0)
    assert loops_of(ours) == (2, 0)


def test_slots_of_two_dtypes_are_as_in_tx():
    tx = optax.adam(1e-2, mu_dtype=jnp.bfloat16)
    params, gradients = trees()
    plain, ours = compared(tx, params, gradients)
    assert loops_of(plain) == loops_of(ours)


def test_complex_parameters():
    tx = rmsprop(1e-2, momentum=0.9)
    _, program = compared(tx, *trees(dtype=jnp.complex64))
    assert loops_of(program) == (1, 0)


def test_the_program_for_small_leaves_is_that_of_tx():
    tx = rmsprop(1e-2, momentum=0.9)
    params, gradients = trees((64, 64))
    step = lambda tx: jax.make_jaxpr(tx.update)(gradients[0], tx.init(params), params)  # noqa: E731
    assert str(step(single_pass(tx))) == str(step(tx))
    # Beside a large one, small ones are computed once.
    both = {"small": params["w"], "large": trees()[0]["w"]}
    program = compiled(single_pass(tx), both, both)
    assert loops_of(program) == (1, 0)
    assert loops_of(program, (64, 64)) == loops_of(
        compiled(tx, params, params), (64, 64)
    )


def test_one_loop_in_a_scan():
    tx = rmsprop(1e-2, centered=True, momentum=0.9)
    params, gradients = trees()
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)

    def run(tx, params, stacked):
        body = lambda carry, g: (stepper(tx)(*carry, g), None)  # noqa: E731
        return jax.lax.scan(body, (params, tx.init(params)), stacked)[0]

    plain, ours = (
        jax.jit(functools.partial(run, t)).lower(params, stacked).compile()
        for t in (tx, single_pass(tx))
    )
    joined = "(f32[512,512]{1,0}, f32[512,512]{1,0}, f32[512,512]{1,0}, f32[512,512]"
    assert len(re.findall(rf"= {re.escape(joined)}.* fusion\(", ours.as_text())) == 1
    assert_same_bits(ours(params, stacked), plain(params, stacked))


def test_vmap_over_learning_rates():
    params, gradients = trees()

    def step(wrap, rate):
        tx = wrap(rmsprop(rate, momentum=0.9))
        return stepper(tx)(params, tx.init(params), gradients[0])

    rates = jnp.array([1e-2, 1e-3])
    ours, plain = (
        jax.jit(jax.vmap(functools.partial(step, wrap)))(rates)
        for wrap in (single_pass, lambda tx: tx)
    )
    assert_same_bits(ours, plain)


def test_derivatives_through_steps():
    params, gradients = trees()

    def loss(wrap, params, rate):
        tx = wrap(rmsprop(rate, momentum=0.9, eps=0.1))
        state = tx.init(params)
        for g in gradients[:2]:
            g = jax.tree.map(jnp.multiply, g, params)
            params, state = stepper(tx)(params, state, g)
        return jnp.sum(params["w"] ** 2)

    ours, plain = (
        jax.jit(jax.grad(functools.partial(loss, wrap), argnums=(0, 1)))(params, 1e-2)
        for wrap in (single_pass, lambda tx: tx)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, ours, plain)


@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P()])
def test_shards(spec):
    tx = rmsprop(1e-2, momentum=0.9)
    mesh = make_mesh({"data": 8}, axis_types=(jax.sharding.AxisType.Auto,))
    params, gradients = trees((1024, 1024))
    params, gradients = jax.device_put((params, gradients), NamedSharding(mesh, spec))
    _, program = compared(tx, params, gradients)
    sharded = NamedSharding(mesh, spec).shard_shape((1024, 1024))
    assert loops_of(program, sharded) == (1, 0)
    assert "all-" not in program.as_text()


@pytest.mark.parametrize("name", BRANCHING)
def test_what_branches_is_wrapped_inside(name):
    wrap = WRAPPERS[name]
    make = lambda: rmsprop(1e-2, momentum=0.9)  # noqa: E731
    inside, plain = wrap(lambda: single_pass(make())), wrap(make)
    params, gradients = trees()
    of_plain, outside = compared(plain, params, gradients)
    program = compiled(inside, params, gradients[0])
    slots = ", ".join(["f32[512,512]{1,0}"] * 2)
    assert f"= ({slots}, " in program.as_text()
    assert_same_bits(
        last(program, inside, params, gradients),
        last(of_plain, plain, params, gradients),
    )
    # Around it, it changes nothing: the branches of lax.cond are not repeated.
    assert loops_of(outside) == loops_of(of_plain)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
def test_small_states(dtype):
    tx = compress_state(rmsprop(1e-2, momentum=0.9), dtype)
    plain, ours = compared(tx, *trees())
    fewer = loops_of(ours)[0] < loops_of(plain)[0]
    assert fewer == (dtype == jnp.bfloat16)
    assert fewer or loops_of(ours) == loops_of(plain)


def test_leaves_that_are_no_arrays():
    params, gradients = trees()
    own = {"f": jax.nn.relu, "number": 2.0}
    full = {**params, **own}
    is_array = {"w": True, "f": False, "number": False}
    plain = optax.masked(optax.sgd(1e-2, momentum=0.9), is_array)
    results = []
    for tx in (plain, single_pass(plain)):

        def step(g, tx=tx):
            updates, state = tx.update({"w": g, **own}, tx.init(full), full)
            assert updates["f"] is jax.nn.relu
            return updates["w"], state

        results.append(jax.jit(step)(gradients[0]["w"]))
    assert_same_bits(*results)


def test_derivatives_that_are_not_compiled_are_those_of_tx():
    """`tx` may branch on values there."""
    params, gradients = trees()

    def update(updates, state, params=None):
        factor = 2.0 if updates["w"][0, 0] > 0 else 3.0
        return jax.tree.map(lambda u: factor * u, updates), state

    tx = single_pass(optax.GradientTransformation(lambda params: (), update))
    f = lambda g: jnp.sum(tx.update(g, (), params)[0]["w"])  # noqa: E731
    factor = 2.0 if gradients[0]["w"][0, 0] > 0 else 3.0
    np.testing.assert_array_equal(jax.grad(f)(gradients[0])["w"], factor)


@pytest.mark.parametrize("keys", [(jax.tree_util.GetAttrKey("x"),) * 2, (["x"], ["y"])])
def test_keys_that_are_equal_or_have_no_hash(keys):
    class Pair(list):
        pass

    jax.tree_util.register_pytree_with_keys(
        Pair,
        lambda pair: (tuple(zip(keys, pair, strict=True)), None),
        lambda _, leaves: Pair(leaves),
    )
    tree = Pair([jnp.ones(SHAPE), jnp.ones(2**15)])
    tx = optax.adam(1e-2)
    ours, plain = (
        jax.jit(lambda g, t=t: t.update(g, tx.init(tree), tree))(tree)
        for t in (single_pass(tx), tx)
    )
    assert_same_bits(ours, plain)
