"""RMSprop as each framework has it: its argument names, order, defaults and numbers.

    tx = dialects.tensorflow(0.016, decay=0.9, momentum=0.9, epsilon=1e-3)

is `tf.compat.v1.train.RMSPropOptimizer(0.016, decay=0.9, momentum=0.9, epsilon=1e-3)`.
Each function calls `optax_rmsprop.rmsprop`, and everything said there holds here: the
learning rate may be an optax schedule, nothing finite becomes NaN, the state is read
with `optax.tree.get`. Parameters go to `init`, not to the dialect. Errors use the
framework's names. Options that would change numbers, and that we do not reproduce, are
refused with what to use in their place; traced values cannot be checked.
`docs/dialects.md` has all of them in one table.
"""

from optax_rmsprop.dialects._jax import jax_example_libraries, optax
from optax_rmsprop.dialects._others import (
    chainer,
    mindspore,
    mlx,
    optimisers_jl,
    paddle,
)
from optax_rmsprop.dialects._papers import dqn2015, graves2013
from optax_rmsprop.dialects._tensorflow import keras, tensorflow, tf_keras
from optax_rmsprop.dialects._torch import bitsandbytes, stable_baselines3, timm, torch

__all__ = [
    "bitsandbytes",
    "chainer",
    "dqn2015",
    "graves2013",
    "jax_example_libraries",
    "keras",
    "mindspore",
    "mlx",
    "optax",
    "optimisers_jl",
    "paddle",
    "stable_baselines3",
    "tensorflow",
    "tf_keras",
    "timm",
    "torch",
]
