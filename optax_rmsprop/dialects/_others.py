"""Paddle, MindSpore, MLX, Julia's Optimisers.jl and Chainer."""

from __future__ import annotations  # so that help() shows these types by name

from typing import Any

import optax
from jax.typing import ArrayLike

from optax_rmsprop import _errors
from optax_rmsprop.dialects._arguments import refuse, speaks
from optax_rmsprop.optimizer import rmsprop


@speaks(decay="rho", eps="epsilon")
def paddle(
    learning_rate: optax.ScalarOrSchedule,
    rho: ArrayLike = 0.95,
    epsilon: ArrayLike = 1e-6,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    *,
    weight_decay: ArrayLike | None = None,
    grad_clip: Any = None,
    name: str | None = None,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`paddle.optimizer.RMSProp`.

        g <- g + weight_decay * p
        v <- rho * v + (1 - rho) * g²
        b <- momentum * b + learning_rate * g / √(v + epsilon)
        p <- p - b

    Differs from torch's in:
      1. epsilon is under the root.
      2. The learning rate is inside the momentum buffer. (Paddle's own page calls it
         Nesterov momentum; it is not.)
      3. Defaults: rho 0.95, epsilon 1e-6, no learning rate.

    Args:
      learning_rate: a number in [0, ∞) or an optax schedule.
      rho: in [0, 1); (0, 1) if centered. torch: alpha.
      epsilon: in [0, ∞), in the square of the gradient's unit.
      momentum: in [0, 1).
      centered: whether to divide by the standard deviation.
      weight_decay: None or in [0, ∞), the coefficient of Paddle's L2Decay.
      grad_clip: refused, with what to use in the chain.
      name: accepted; it changes no number.
      weight_decay_mask: True where weights decay. See `rmsprop`.

    Run: paddlepaddle 3.3.1, on a CPU. Source: python/paddle/optimizer/rmsprop.py,
    paddle/phi/kernels/impl/rmsprop_kernel_impl.h.
    """
    clip = "put optax.clip or optax.clip_by_global_norm before this in an optax.chain"
    refuse("grad_clip", grad_clip, None, clip)
    return rmsprop(
        learning_rate,
        rho,
        epsilon,
        momentum=momentum,
        centered=centered,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        eps_in_sqrt=True,
        lr_in_momentum=True,
    )


@speaks(eps="epsilon")
def mindspore(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-10,
    use_locking: bool = False,
    centered: bool = False,
    loss_scale: float = 1.0,
    weight_decay: ArrayLike = 0.0,
    *,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`mindspore.nn.RMSProp`.

        g <- g + weight_decay * p
        v <- v + (1 - decay) * (g² - v)         v starts at 1
        b <- momentum * b + learning_rate * g / √(v + epsilon)
        p <- p - b

    Differs from torch's in:
      1. epsilon is under the root.
      2. v starts at 1, so that gradients below 1 begin with short steps, not long ones.
      3. The learning rate is inside the momentum buffer.
      4. Parameters with "beta" or "gamma" in their names do not decay there: give
         weight_decay_mask.
      5. Defaults: learning_rate 0.1, decay 0.9, epsilon 1e-10.

    Args:
      learning_rate: a number in [0, ∞) or an optax schedule.
      decay: in [0, 1); (0, 1) if centered. torch: alpha.
      momentum: in [0, 1).
      epsilon: in (0, ∞), in the square of the gradient's unit.
      use_locking: accepted; it changes no number.
      centered: whether to divide by the standard deviation.
      loss_scale: refused unless 1.
      weight_decay: in [0, ∞).
      weight_decay_mask: True where weights decay. See `rmsprop`.

    Run: mindspore 2.10.0, on a CPU. There, where not centered, arrays of 8 and more
    elements have another kernel, with √v + epsilon: that is `rmsprop` with
    initial_scale=1, lr_in_momentum=True. Source: mindspore/nn/optim/rmsprop.py.
    """
    refuse("loss_scale", loss_scale, 1, "divide the gradients by it")
    return rmsprop(
        learning_rate,
        decay,
        _errors.number("epsilon", epsilon, zero=False),
        momentum=momentum,
        centered=centered,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        initial_scale=1.0,
        eps_in_sqrt=True,
        lr_in_momentum=True,
    )


@speaks(decay="alpha")
def mlx(
    learning_rate: optax.ScalarOrSchedule,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """`mlx.optimizers.RMSprop`.

        v <- alpha * v + (1 - alpha) * g²
        p <- p - learning_rate * g / (√v + eps)

    Differs from torch's in:
      1. There is no momentum, no weight decay, no centered form.
      2. eps must not be 0.
      3. The learning rate has no default.

    Args:
      learning_rate: a number in [0, ∞) or an optax schedule.
      alpha: in [0, 1).
      eps: in (0, ∞), in the gradient's unit.

    Run: mlx 0.32.4, on a CPU. Source: python/mlx/optimizers/optimizers.py.
    """
    return rmsprop(learning_rate, alpha, _errors.number("eps", eps, zero=False))


@speaks(learning_rate="eta", decay="rho", eps="epsilon")
def optimisers_jl(
    eta: optax.ScalarOrSchedule = 0.001,
    rho: ArrayLike = 0.9,
    epsilon: ArrayLike = 1e-8,
    *,
    centred: bool = False,
    centered: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`RMSProp` of Julia's Optimisers.jl, and of Flux.

        v <- rho * v + (1 - rho) * g²
        p <- p - eta * g / (√v + epsilon)

    Differs from torch's in:
      1. There is no momentum and no weight decay (put `WeightDecay`'s counterpart,
         `optax.add_decayed_weights`, before this in an optax.chain).
      2. Complex numbers: it averages |g|², we both parts by themselves, as torch.
      3. Defaults: eta 0.001, rho 0.9.

    Args:
      eta: a number in [0, ∞) or an optax schedule.
      rho: in [0, 1); (0, 1) if centred. torch: alpha.
      epsilon: in [0, ∞), in the gradient's unit. Julia's Float16 raises it to 1e-7.
      centred, centered: either divides by the standard deviation, where a variance
        that rounds below 0 throws a DomainError in Julia.

    Not run: held to a transcription of src/rules.jl at commit 007b972.
    """
    _errors.flags(centred=centred, centered=centered)
    return rmsprop(eta, rho, epsilon, centered=centred or centered)


@speaks(learning_rate="lr", decay="alpha", eps_in_sqrt="eps_inside_sqrt")
def chainer(
    lr: optax.ScalarOrSchedule = 0.01,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    eps_inside_sqrt: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`chainer.optimizers.RMSprop`; its `RMSpropGraves` is `dialects.graves2013`.

        v <- alpha * v + (1 - alpha) * g²
        p <- p - lr * g / (√v + eps)            eps_inside_sqrt: √(v + eps) below

    Differs from torch's in:
      1. There is no momentum, no weight decay, no centered form.
      2. eps can go under the root.

    Args:
      lr: a number in [0, ∞) or an optax schedule.
      alpha: in [0, 1).
      eps: in [0, ∞). Chainer refuses one that the gradient's dtype rounds to 0.
      eps_inside_sqrt: whether eps goes under the root.

    Run: chainer 7.8.1. Source: chainer/optimizers/rmsprop.py.
    """
    return rmsprop(lr, alpha, eps, eps_in_sqrt=eps_inside_sqrt)
