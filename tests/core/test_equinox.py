"""At home in Equinox: update gets the whole model, with all that is no array in it."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

from optax_rmsprop import (
    compress_state,
    diagnose,
    rmsprop,
    scale_by_rms,
    scale_by_stddev,
    stochastic_apply_updates,
)

LR = 1e-2


class Model(eqx.Module):
    """A network with a function, a string, an integer, a key and None as leaves."""

    mlp: eqx.nn.MLP
    name: str
    steps: jax.Array
    key: jax.Array
    nothing: None


def model():
    key = jax.random.key(0)
    mlp = eqx.nn.MLP(2, 1, 4, 1, key=key)
    return Model(mlp, "float32", jnp.zeros([], jnp.int32), key, None)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


# A tree of booleans in the model's own form, which is callable as the model is.
MASK = matrices(
    eqx.filter(
        eqx.filter_eval_shape(model).mlp, lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )
)

TRANSFORMATIONS = {
    "mask": rmsprop(LR, weight_decay=0.1, weight_decay_mask=matrices),
    "centered": rmsprop(LR, centered=True, eps=1e-2),
    "scale_by_rms": scale_by_rms(),
    "compress_state": compress_state(
        rmsprop(LR, weight_decay=0.1), "uint8", min_size=8
    ),
    "chain": optax.chain(optax.clip_by_global_norm(0.1), rmsprop(LR, weight_decay=0.1)),
}


def gradient(model):
    return eqx.filter_grad(lambda m: jnp.sum(m.mlp(jnp.ones(2)) ** 2))(model)


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_a_whole_model_is_its_arrays(tx):
    whole = model()
    arrays = eqx.filter(whole, eqx.is_inexact_array)
    state, g = tx.init(arrays), gradient(whole)
    expected = tx.update(g, state, arrays)
    chex.assert_trees_all_equal(tx.update(g, state, whole), expected)
    assert any(u.any() for u in jax.tree.leaves(expected[0]))


def test_a_compiled_step_of_a_whole_model():
    tx, whole = TRANSFORMATIONS["mask"], model()
    arrays, rest = eqx.partition(whole, eqx.is_inexact_array)
    state = tx.init(arrays)
    expected, _ = tx.update(gradient(whole), state, arrays)

    @eqx.filter_jit
    def step(model, state):
        updates, state = tx.update(gradient(model), state, model)
        return eqx.apply_updates(model, updates), state

    after, _ = step(whole, state)
    chex.assert_trees_all_close(
        eqx.filter(after, eqx.is_inexact_array),
        eqx.apply_updates(arrays, expected),
        rtol=1e-5,
        atol=1e-6,
    )
    assert eqx.tree_equal(eqx.partition(after, eqx.is_inexact_array)[1], rest)


def test_a_mask_in_the_form_of_a_callable_model():
    mlp = model().mlp
    arrays = eqx.filter(mlp, eqx.is_inexact_array)
    zeros = jax.tree.map(jnp.zeros_like, arrays)
    make = functools.partial(
        rmsprop, 1.0, weight_decay=0.1, decoupled_weight_decay=True
    )
    by_tree, by_function = (make(weight_decay_mask=mask) for mask in (MASK, matrices))
    updates, _ = by_tree.update(zeros, by_tree.init(arrays), mlp)
    expected, _ = by_function.update(zeros, by_function.init(arrays), mlp)
    chex.assert_trees_all_equal(updates, expected)
    assert updates.layers[0].weight.all()
    assert not updates.layers[0].bias.any()


def test_stochastic_apply_updates_leaves_what_has_no_update():
    whole = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model()
    )
    arrays = eqx.filter(whole, eqx.is_inexact_array)
    updates = jax.tree.map(jnp.ones_like, arrays)
    after = stochastic_apply_updates(whole, updates, jax.random.key(1))
    expected = stochastic_apply_updates(arrays, updates, jax.random.key(1))
    chex.assert_trees_all_equal(eqx.filter(after, eqx.is_inexact_array), expected)
    is_other = functools.partial(eqx.filter, filter_spec=eqx.is_inexact_array)
    assert eqx.tree_equal(is_other(after, inverse=True), is_other(whole, inverse=True))


def test_diagnose():
    arrays = eqx.filter(model(), eqx.is_inexact_array)
    tx = rmsprop(LR)
    _, state = tx.update(gradient(model()), tx.init(arrays), model())
    sizes = diagnose(state, LR).step_size
    assert jax.tree.structure(sizes) == jax.tree.structure(arrays)


@pytest.mark.parametrize(
    "tx",
    [rmsprop(), scale_by_rms(), scale_by_stddev(), compress_state(rmsprop(), "uint8")],
    ids=["rmsprop", "rms", "stddev", "compressed"],
)
def test_init_names_what_cannot_be_trained(tx):
    says = (
        r"`params` must be .*, got an? \w+ at \.mlp\.activation; leave .*optax\.masked"
        r", or .* equinox\.filter\(model, equinox\.is_inexact_array\)"
    )
    with pytest.raises(TypeError, match=says):
        tx.init(model())
