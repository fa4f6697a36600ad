"""At home in Flax, NNX and Linen: the parameters of a plain optax loop."""

import chex
import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import stepper
from optax_rmsprop import compress_state, decompress_state, rmsprop

pytest.importorskip("flax")
from flax import linen, nnx
from flax.training.train_state import TrainState

STEPS = 5
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}  # observed: 6e-7

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(32, 4)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(32, 2)), jnp.float32)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


OPTIONS = {
    "plain": {},
    "everything": {
        "eps": 1e-3,
        "momentum": 0.9,
        "centered": True,
        "weight_decay": 0.1,
        "weight_decay_mask": matrices,
    },
}
in_every_case = pytest.mark.parametrize(
    "options",
    [pytest.param(OPTIONS["plain"], marks=pytest.mark.slow), OPTIONS["everything"]],
    ids=OPTIONS,
)


def plain_loop(tx, params, loss):
    """The parameters after every update."""
    state = tx.init(params)
    step, gradient = jax.jit(stepper(tx)), jax.jit(jax.grad(loss))
    for _ in range(STEPS):
        params, state = step(params, state, gradient(params))
        yield params


def squared_error(prediction):
    return jnp.mean((prediction - Y) ** 2)


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.out = nnx.Linear(8, 2, rngs=rngs)
        self.scale = nnx.Variable(jnp.asarray(2.0))  # not an nnx.Param: not trained

    def __call__(self, x):
        return self.scale[...] * self.out(nnx.tanh(self.hidden(x)))


@in_every_case
def test_nnx_optimizer(options):
    tx = rmsprop(**options)
    model = NnxModel()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: squared_error(model(X)))(model)
        optimizer.update(model, gradients)

    graph, params, rest = nnx.split(NnxModel(), nnx.Param, ...)

    def loss(params):
        return squared_error(nnx.merge(graph, params, rest)(X))

    for expected in plain_loop(tx, params, loss):
        step(model, optimizer)
        assert model.scale[...] == 2
        actual = nnx.state(model, nnx.Param)
        chex.assert_trees_all_close(
            nnx.to_pure_dict(actual), nnx.to_pure_dict(expected), **TOLERANCE
        )


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(linen.tanh(linen.Dense(8)(x)))


@in_every_case
def test_linen_train_state(options):
    tx = rmsprop(**options)
    model = LinenModel()
    params = model.init(jax.random.key(0), X)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        def loss(params):
            return squared_error(state.apply_fn(params, X))

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for expected in plain_loop(tx, params, lambda p: squared_error(model.apply(p, X))):
        state = step(state)
        chex.assert_trees_all_close(state.params, expected, **TOLERANCE)
    assert state.step == optax.tree.get(state.opt_state, "count") == STEPS
    copy = cloudpickle.loads(cloudpickle.dumps(state))
    chex.assert_trees_all_equal(step(copy).params, step(state).params)


@pytest.mark.slow
def test_small_states_in_nnx_and_linen():
    tx = compress_state(rmsprop(momentum=0.9), "uint8", min_size=8)
    model = NnxModel()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    linen_model = LinenModel()
    state = TrainState.create(
        apply_fn=linen_model.apply, params=linen_model.init(jax.random.key(0), X), tx=tx
    )

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: squared_error(model(X)))(model)
        optimizer.update(model, gradients)

    @jax.jit
    def linen_step(state):
        def loss(params):
            return squared_error(state.apply_fn(params, X))

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    before = squared_error(model(X)), squared_error(state.apply_fn(state.params, X))
    for _ in range(30):
        step(model, optimizer)
        state = linen_step(state)
    assert squared_error(model(X)) < 0.8 * before[0]
    assert squared_error(state.apply_fn(state.params, X)) < 0.8 * before[1]
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)}
    assert jnp.dtype("uint8") in dtypes
    nu = optax.tree.get(decompress_state(state.opt_state), "nu")
    chex.assert_trees_all_equal_shapes_and_dtypes(nu, state.params)
    in_nnx = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(optimizer))}
    assert jnp.dtype("uint8") in in_nnx
