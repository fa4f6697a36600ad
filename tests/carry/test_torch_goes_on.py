"""A carried run goes on in NNX, Linen and Equinox with the steps that torch makes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")
import equinox as eqx
import torch
from flax import linen, nnx
from flax.training.train_state import TrainState

from optax_rmsprop.carry import from_torch, to_nnx, to_torch, torch_layers

STEPS = 5
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}  # observed: 4e-16

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 3)), RNG.normal(size=(8, 2))
GROUPS = {
    "one": [{}],
    "two": [{"weight_decay": 0.1}, {"lr": 3e-3, "alpha": 0.9}],
}
in_every_case = pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
pytestmark = pytest.mark.usefixtures("x64")


class TorchModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(3, 4)
        self.out = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x)))


def torch_run(groups):
    """After three steps; with two groups, of a layer each."""
    torch.manual_seed(0)
    model = TorchModel().double()
    layers = [model] if len(groups) == 1 else [model.hidden, model.out]
    optimizer = torch.optim.RMSprop(
        [
            {"params": layer.parameters(), **group}
            for layer, group in zip(layers, groups, strict=True)
        ],
        eps=1e-2,
        momentum=0.9,
        centered=True,
    )
    train(model, optimizer, steps=3)
    return model, optimizer


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.tensor(X)) - torch.tensor(Y)).square().mean()
        loss.backward()
        optimizer.step()


def squared_error(prediction):
    return jnp.mean((prediction - Y) ** 2)


def port(weights):
    return {name: torch_layers.linear(weights, name) for name in ("hidden", "out")}


def check_steps(model, optimizer, steps, port):
    """Compare the parameters after each further step with torch's."""
    for params in steps:
        train(model, optimizer)
        expected = port({k: v.numpy() for k, v in model.state_dict().items()})
        chex.assert_trees_all_close(params, expected, **TOLERANCE)


# Flax NNX


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(1)
        self.out = nnx.Linear(4, 2, rngs=rngs)
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.scale = nnx.Variable(jnp.ones(()))  # no nnx.Param

    def __call__(self, x):
        return self.scale[...] * self.out(nnx.tanh(self.hidden(x)))


def pure(tree):
    as_pure = getattr(nnx, "as_pure", None) or nnx.pure  # before flax 0.12
    return as_pure(tree)


@nnx.jit
def nnx_step(model, optimizer):
    grads = nnx.grad(lambda model: squared_error(model(X)))(model)
    optimizer.update(model, grads)


def nnx_steps(model, optimizer):
    for _ in range(STEPS):
        nnx_step(model, optimizer)
        yield nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("kind", [dict, nnx.State])
@in_every_case
def test_nnx(groups, kind):
    source, source_optimizer = torch_run(groups)
    run = from_torch(source, source_optimizer, lambda weights: kind(port(weights)))
    model = NnxModel()
    optimizer = to_nnx(run, model)
    assert optimizer.step[...] == 3
    chex.assert_trees_all_equal(pure(optimizer.opt_state), run.opt_state)
    check_steps(source, source_optimizer, nnx_steps(model, optimizer), port)
    assert optimizer.step[...] == 3 + STEPS


def test_a_state_from_the_start_is_noticed():
    source, source_optimizer = torch_run(GROUPS["one"])
    run = from_torch(source, source_optimizer, port)
    model = NnxModel()
    optimizer = to_nnx(run._replace(opt_state=run.tx.init(run.params)), model)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_steps(source, source_optimizer, nnx_steps(model, optimizer), port)


@in_every_case
def test_nnx_and_back(groups):
    source, source_optimizer = torch_run(groups)
    model = NnxModel()
    optimizer = to_nnx(from_torch(source, source_optimizer, port), model)
    *_, params = nnx_steps(model, optimizer)
    state = pure(optimizer.opt_state)
    to_torch(params, state, source, source_optimizer, port)
    train(source, source_optimizer)
    expected, expected_optimizer = torch_run(groups)
    train(expected, expected_optimizer, steps=STEPS + 1)
    torch.testing.assert_close(source.state_dict(), expected.state_dict())
    torch.testing.assert_close(
        source_optimizer.state_dict()["state"], expected_optimizer.state_dict()["state"]
    )


# Flax Linen


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.tanh(linen.Dense(4, name="hidden", param_dtype=float)(x))
        return linen.Dense(2, name="out", param_dtype=float)(x)


@in_every_case
def test_linen(groups):
    source, source_optimizer = torch_run(groups)
    run = from_torch(source, source_optimizer, port)
    state = TrainState(
        step=3,
        apply_fn=LinenModel().apply,
        params=run.params,
        tx=run.tx,
        opt_state=run.opt_state,
    )

    def loss(params):
        return squared_error(state.apply_fn({"params": params}, X))

    def steps(state):
        update = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
        for _ in range(STEPS):
            state = update(state)
            yield state.params

    check_steps(source, source_optimizer, steps(state), port)


# Equinox


class EquinoxModel(eqx.Module):
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self):
        first, second = jax.random.split(jax.random.key(1))
        self.hidden = eqx.nn.Linear(3, 4, key=first)
        self.out = eqx.nn.Linear(4, 2, key=second)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


@in_every_case
def test_equinox(groups):
    source, source_optimizer = torch_run(groups)
    arrays, static = eqx.partition(EquinoxModel(), eqx.is_inexact_array)

    def port(weights):  # Equinox has torch's layout
        def weight(path, _):
            return weights[jax.tree_util.keystr(path, simple=True, separator=".")]

        return jax.tree_util.tree_map_with_path(weight, arrays)

    run = from_torch(source, source_optimizer, port)
    model, opt_state = eqx.combine(run.params, static), run.opt_state

    @eqx.filter_jit
    def step(model, opt_state):
        def loss(model):
            return squared_error(jax.vmap(model)(X))

        grads = eqx.filter_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = run.tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state

    def steps(model, opt_state):
        for _ in range(STEPS):
            model, opt_state = step(model, opt_state)
            yield eqx.filter(model, eqx.is_inexact_array)

    check_steps(source, source_optimizer, steps(model, opt_state), port)
