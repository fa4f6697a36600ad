"""`to_nnx` makes an `nnx.Optimizer` that goes on as a plain optax loop does."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from helpers import stepper
from optax_rmsprop import dialects
from optax_rmsprop.carry import Run, to_nnx

pytest.importorskip("flax")
from flax import linen, nnx

BEFORE, AFTER = 3, 4
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # observed: 1e-7
LAYERS = 11  # more than ten: the order of numbers is not that of texts


class Model(nnx.Module):
    def __init__(self, layers=LAYERS):
        rngs = nnx.Rngs(0)
        self.chain = nnx.Sequential(
            *[nnx.Linear(2, 2, rngs=rngs) for _ in range(layers)]
        )
        self.scale = nnx.Variable(jnp.ones(()))  # no nnx.Param: not trained

    def __call__(self, x):
        for layer in self.chain.layers:
            x = x + nnx.tanh(layer(x))
        return self.scale[...] * x


def loss(model):
    return jnp.mean((model(jnp.array([[1.0, -0.5]])) - 2) ** 2)


def as_lists(tree):
    return {"chain": {"layers": [tree["chain"]["layers"][i] for i in range(LAYERS)]}}


def label(path, _):
    return "odd" if path[2].idx % 2 else "even"


def transformation(groups, params):
    one = dialects.torch(0.01, eps=1e-2, momentum=0.9)
    if groups == 1:
        return one
    labels = jax.tree_util.tree_map_with_path(label, params)
    two = dialects.torch(0.003, eps=1e-2, weight_decay=0.1)
    return optax.partition({"odd": one, "even": two}, labels)


def plain_run(groups):
    """A run in lists, after some updates, and the parameters after each further one."""
    graph, state, rest = nnx.split(Model(), nnx.Param, ...)
    params = as_lists(nnx.to_pure_dict(state))

    @jax.jit
    def gradient(params):
        def of_lists(params):
            layers = dict(enumerate(params["chain"]["layers"]))
            state = nnx.State({"chain": {"layers": layers}})
            return loss(nnx.merge(graph, state, rest))

        return jax.grad(of_lists)(params)

    tx = transformation(groups, params)
    opt_state, run, history = tx.init(params), None, []
    step = jax.jit(stepper(tx))
    for update in range(BEFORE + AFTER):
        if update == BEFORE:
            run = Run(params, tx, opt_state)
        params, opt_state = step(params, opt_state, gradient(params))
        history.append(params)
    return run, history[BEFORE:]


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_goes_on(groups):
    run, history = plain_run(groups)
    model = Model()
    optimizer = to_nnx(run, model)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    assert optimizer.step[...] == BEFORE
    for expected in history:
        step(model, optimizer)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        chex.assert_trees_all_close(as_lists(params), expected, **TOLERANCE)
    assert optimizer.step[...] == BEFORE + AFTER
    assert model.scale[...] == 1


def test_only_what_the_filter_chooses():
    model = Model(layers=2)
    params = {"chain": {"layers": {1: {"bias": jnp.ones(2)}}}}
    tx = dialects.torch(0.1)

    def of_last_bias(path, _):
        return path[-2:] == (1, "bias")

    optimizer = to_nnx(Run(params, tx, tx.init(params)), model, wrt=of_last_bias)
    first, last = model.chain.layers
    assert first.bias[...].tolist() == [0, 0]
    assert last.bias[...].tolist() == [1, 1]
    kernel = last.kernel[...]
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, of_last_bias))(model)
    optimizer.update(model, grads)
    assert (last.bias[...] != 1).all()
    chex.assert_trees_all_equal(last.kernel[...], kernel)


def small_run():
    params = {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}
    tx = dialects.torch()
    return Run(params, tx, tx.init(params))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"bias": jnp.ones(2)}, "of the model: missing kernel; let the port"),
        (
            {"bias": jnp.ones(2), "weight": jnp.ones((3, 2)), "x": {"y": jnp.ones(())}},
            r"missing kernel; unexpected weight, x\.y; let the port return the names",
        ),
        (
            {"bias": jnp.ones(2), "kernel": jnp.ones((2, 3))},
            r"shapes of the model, got kernel \(2, 3\) for \(3, 2\); let the port",
        ),
        (
            {f"a_long_name_{i}" * 9: jnp.ones(2) for i in range(999)},
            "missing bias, kernel; unexpected a_long_name_0.* and 998 more; let",
        ),
    ],
    ids=["missing", "unexpected", "shape", "long"],
)
def test_other_names_and_shapes_are_refused(params, says):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(ValueError, match=f"^`run` must have the .*{says}") as error:
        to_nnx(small_run()._replace(params=params), model)
    assert len(str(error.value)) < 600
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)


def test_other_kinds_are_refused():
    with pytest.raises(TypeError, match="`run` must be a Run, got a tuple; give what"):
        to_nnx(tuple(small_run()), Model())
    with pytest.raises(TypeError, match=r"`model` must be an nnx\.Module, got a Dense"):
        to_nnx(small_run(), linen.Dense(3))


def test_the_state_of_another_transformation_is_refused():
    run = small_run()
    other = run._replace(opt_state=optax.sgd(0.1).init(run.params))
    with pytest.raises(ValueError, match="`run` must have a state of its own"):
        to_nnx(other, nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
