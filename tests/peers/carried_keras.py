"""How a run of Keras that `from_keras` has carried goes on in JAX."""

import jax
import numpy as np
import optax

# Relative to the largest parameter, after ten steps in float32; observed: 2e-7.
TOLERANCE = 2e-6


def port(weights):
    return {
        "frozen": weights["net/frozen/kernel"],
        "dense": {
            "kernel": weights["net/dense/kernel"],
            "bias": weights["net/dense/bias"],
        },
    }


def go_on(run, gradients, steps):
    """The parameters of a carried run after more steps, with torch's gradients."""
    params, tx, state = run
    update = jax.jit(tx.update)
    for step in steps:
        grads = {
            "frozen": np.ones((3, 3), np.float32),
            "dense": {
                "kernel": np.float32(gradients["weight"][step]).T,
                "bias": np.float32(gradients["bias"][step]),
            },
        }
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def difference(params, end):
    """The largest between parameters and those with which Keras ends."""
    expected = port({path: np.asarray(value) for path, value in end.items()})
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)
