"""RMSprop of each framework: its argument names, their order, defaults and numbers.

    tx = dialects.tensorflow(0.016, decay=0.9, momentum=0.9, epsilon=1e-3)

is `tf.compat.v1.train.RMSPropOptimizer(0.016, decay=0.9, momentum=0.9, epsilon=1e-3)`.
Each function calls `optax_rmsprop.rmsprop`, and everything in its documentation is true
here too: the learning rate may be an optax schedule, nothing finite becomes NaN, the
state is read with `optax.tree.get`. Parameters are given to `init`, not to the dialect.

Errors use the framework's names. An option that would change the numbers and is not
supported is refused, and the error says what to use instead; traced values cannot be
checked. A file has the dialects of related frameworks, and `_arguments.py` has what all
of them share. `docs/dialects.md` compares them in one table.
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
