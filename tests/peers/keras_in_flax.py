"""The recorded run of Keras' recurrent layers, as it goes on in Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

from optax_rmsprop.carry import keras_layers

# Relative to an array's largest element, after ten steps in float32; observed: 9e-7.
TOLERANCE = 5e-6


def output(params, x):
    """The LSTM, GRU and dense layer of the recorded run."""
    lstm, gru = {"cell": params["lstm"]}, keras_layers.one_bias(params["gru"])
    x = linen.RNN(linen.LSTMCell(4)).apply({"params": lstm}, x)
    x = linen.RNN(linen.GRUCell(3)).apply({"params": {"cell": gru}}, x)
    return linen.Dense(2).apply({"params": params["dense"]}, x[:, -1])


def end_of(run, x, y, steps):
    """The parameters of a carried run after more steps on the same batch."""
    params, tx, state = run

    def loss(params):
        return jnp.mean((output(params, x) - y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


def far_from(params, expected):
    """The largest difference of two trees, relative to the largest element."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)
