"""The three RMSprops of TensorFlow and Keras, none of which equals another."""

from __future__ import annotations  # so that help() shows these types by name

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_rmsprop import _errors
from optax_rmsprop._errors import shown
from optax_rmsprop.dialects._arguments import refuse, speaks
from optax_rmsprop.optimizer import rmsprop


@speaks(eps="epsilon")
def tensorflow(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-10,
    use_locking: bool = False,
    centered: bool = False,
    name: str = "RMSProp",
) -> optax.GradientTransformationExtraArgs:
    """`tf.compat.v1.train.RMSPropOptimizer`, of EfficientNet, Inception and IMPALA.

        v <- v + (1 - decay) * (g² - v)         v starts at 1
        b <- momentum * b + learning_rate * g / √(v + epsilon)
        p <- p - b

    Differs from torch's in:
      1. epsilon is under the root.
      2. v starts at 1, so that gradients below 1 begin with short steps, not long ones.
      3. The learning rate is inside the momentum buffer.
      4. There is no weight decay. Models add it to the loss: a factor times
         tf.nn.l2_loss is torch's weight_decay of that factor.
      5. Defaults: decay 0.9, epsilon 1e-10, no learning rate.

    Args:
      learning_rate: a number in [0, ∞) or an optax schedule.
      decay: in [0, 1); (0, 1) if centered. torch: alpha.
      momentum: in [0, 1). At 0 it takes no slot here; TensorFlow's takes one.
      epsilon: in [0, ∞), in the square of the gradient's unit.
      use_locking, name: accepted; they change no number.
      centered: whether to divide by the standard deviation.

    Run: tensorflow 2.21.0, dense gradients on a CPU. Sparse gradients leave untouched
    rows as they are, slots included, which nothing here does.
    Source: tensorflow/python/training/rmsprop.py and
    tensorflow/core/kernels/training_ops.cc.
    """
    return rmsprop(
        learning_rate,
        decay,
        epsilon,
        momentum=momentum,
        centered=centered,
        initial_scale=1.0,
        eps_in_sqrt=True,
        lr_in_momentum=True,
    )


@speaks(eps="epsilon")
def tf_keras(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    rho: ArrayLike = 0.9,
    momentum: float = 0.0,
    epsilon: ArrayLike | None = 1e-7,
    centered: bool = False,
    name: str = "RMSprop",
    *,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    decay: float = 0.0,
    lr: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """tf.keras up to 2.10, later `keras.optimizers.legacy.RMSprop` (OptimizerV2).

        v <- rho * v + (1 - rho) * g²
        without momentum
        p <- p - learning_rate * g / (√v + epsilon)
        with momentum
        b <- momentum * b + learning_rate * g / √(v + epsilon)
        p <- p - b

    Differs from torch's in:
      1. epsilon is under the root where momentum is not 0, and outside, as in torch,
         where it is.
      2. The learning rate is inside the momentum buffer.
      3. There is no weight decay.
      4. Defaults: learning_rate 0.001, rho 0.9, epsilon 1e-7.
      5. An epsilon of 0 or None means 1e-7.

    Args:
      learning_rate: a number in [0, ∞) or an optax schedule.
      rho: in [0, 1); (0, 1) if centered. torch: alpha.
      momentum: in [0, 1), a Python number, for it decides where epsilon goes.
      epsilon: in [0, ∞).
      centered: whether to divide by the standard deviation.
      name: accepted; it changes no number.
      clipnorm, clipvalue, global_clipnorm, decay: refused unless left as they are.
      lr: learning_rate by its old name.

    tf.keras 2.11 to 2.15 without `legacy` is `dialects.keras`.

    Run: tf_keras 2.21.0, dense gradients on a CPU.
    Source: tf_keras/src/optimizers/legacy/rmsprop.py.
    """
    _refuse_clipping(clipnorm, clipvalue, global_clipnorm)
    refuse(
        "decay", decay, 0, "schedule learning_rate=lambda step: lr / (1 + decay * step)"
    )
    _errors.flags(centered=centered)
    if callable(momentum) or isinstance(momentum, jax.Array):
        raise TypeError(
            f"`momentum` must be a Python number, for it decides where epsilon goes, "
            f"got {shown(momentum)}; with optax.inject_hyperparams name it in "
            "static_args"
        )
    has_momentum = not _errors.is_off(_errors.number("momentum", momentum, high=1))
    epsilon = _errors.number("epsilon", 1e-7 if epsilon is None else epsilon)
    if isinstance(epsilon, jax.Array):
        epsilon = jnp.where(epsilon == 0, 1e-7, epsilon)
    return rmsprop(
        learning_rate
        if lr is None
        else _errors.schedule("lr", lr, below_0=_errors.ASCEND),
        _errors.number("rho", rho, high=1, zero=not centered),
        1e-7 if _errors.is_off(epsilon) else epsilon,
        momentum=momentum,
        centered=centered,
        eps_in_sqrt=has_momentum,
        lr_in_momentum=True,
    )


@speaks(decay="rho", eps="epsilon")
def keras(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    rho: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-7,
    centered: bool = False,
    weight_decay: ArrayLike | None = None,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite_frequency: int | None = None,
    loss_scale_factor: float | None = None,
    gradient_accumulation_steps: int | None = None,
    name: str | None = None,
    *,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Keras 3's `keras.optimizers.RMSprop`.

        v <- rho * v + (1 - rho) * g²
        b <- momentum * b + learning_rate * g / √(v + epsilon)
        p <- p - learning_rate * weight_decay * p - b

    Differs from torch's in:
      1. epsilon is under the root.
      2. The learning rate is inside the momentum buffer.
      3. weight_decay is decoupled: it enters neither v nor b.
      4. Defaults: learning_rate 0.001, rho 0.9, epsilon 1e-7.

    Args:
      learning_rate: a number in [0, ∞) or an optax schedule.
      rho: in [0, 1); (0, 1) if centered. torch: alpha.
      momentum: in [0, 1).
      epsilon: in [0, ∞), in the square of the gradient's unit.
      centered: whether to divide by the standard deviation.
      weight_decay: None or in [0, ∞).
      clipnorm, clipvalue, global_clipnorm: refused unless left as they are, with what
        to use in the chain.
      use_ema, ema_momentum, ema_overwrite_frequency: likewise.
      loss_scale_factor, gradient_accumulation_steps: likewise.
      name: accepted; it changes no number.
      weight_decay_mask: True where weights decay, in place of
        `exclude_from_weight_decay`. See `rmsprop`.

    Run: keras 3.15.1 with its TensorFlow backend. With its torch backend, centered
    rounds otherwise. Source: keras/src/optimizers/rmsprop.py.
    """
    _refuse_clipping(clipnorm, clipvalue, global_clipnorm)
    average = "average the parameters with optax.incremental_update after each step"
    refuse("use_ema", use_ema, False, average)
    refuse("ema_momentum", ema_momentum, 0.99, average)
    refuse("ema_overwrite_frequency", ema_overwrite_frequency, None, average)
    refuse("loss_scale_factor", loss_scale_factor, None, "divide the gradients by it")
    refuse(
        "gradient_accumulation_steps",
        gradient_accumulation_steps,
        None,
        "wrap this in optax.MultiSteps",
    )
    return rmsprop(
        learning_rate,
        rho,
        epsilon,
        momentum=momentum,
        centered=centered,
        weight_decay=weight_decay,
        decoupled_weight_decay=True,
        weight_decay_mask=weight_decay_mask,
        eps_in_sqrt=True,
        lr_in_momentum=True,
    )


def _refuse_clipping(
    clipnorm: float | None, clipvalue: float | None, global_clipnorm: float | None
) -> None:
    norm = "put optax.clip_by_global_norm before this in an optax.chain"
    refuse("clipnorm", clipnorm, None, norm + " (Keras: one norm for each variable)")
    refuse("global_clipnorm", global_clipnorm, None, norm)
    refuse("clipvalue", clipvalue, None, "put optax.clip before this in an optax.chain")
