"""torch.optim.RMSprop, and what torch users put in its place."""

from __future__ import annotations  # so that help() shows these types by name

from typing import Any

import optax
from jax.typing import ArrayLike

from optax_rmsprop import _errors
from optax_rmsprop._numerics import product
from optax_rmsprop.dialects._arguments import refuse, speaks
from optax_rmsprop.optimizer import rmsprop


@speaks(learning_rate="lr", decay="alpha")
def torch(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    capturable: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    *,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`torch.optim.RMSprop`, the yardstick of the other dialects.

        g <- g + weight_decay * p
        v <- alpha * v + (1 - alpha) * g²       centered: √(v - (average of g)²) below
        b <- momentum * b + g / (√v + eps)
        p <- p - lr * b

    Differs from torch's own in:
      1. alpha and momentum of 1 and above are refused; torch accepts them.
      2. Nothing finite gives NaN, and averages are kept in at least float32:
         docs/differences.md.

    Args:
      lr: a number in [0, ∞) or an optax schedule. A torch scheduler steps once an
        epoch, an optax schedule once an update.
      alpha: in [0, 1); (0, 1) if centered.
      eps, weight_decay: in [0, ∞).
      momentum: in [0, 1).
      centered, maximize: as in torch.
      capturable, foreach, differentiable: accepted; in torch they choose how to
        execute, and change no number.
      weight_decay_mask: True where weights decay, in place of parameter groups. See
        `rmsprop`.

    Run: torch 2.13.0. Source: torch/optim/rmsprop.py, `_single_tensor_rmsprop`.
    """
    return rmsprop(
        lr,
        alpha,
        eps,
        momentum=momentum,
        centered=centered,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        maximize=maximize,
    )


@speaks(learning_rate="lr", decay="alpha", decoupled_weight_decay="decoupled_decay")
def timm(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.9,
    eps: ArrayLike = 1e-10,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    corrected_weight_decay: bool = False,
    lr_in_momentum: bool = True,
    caution: bool = False,
    foreach: bool | None = None,
    *,
    max_lr: float | None = None,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """timm's `RMSpropTF` ("rmsproptf"); its factory sets a momentum of 0.9.

    The factory, `create_optimizer_v2`, also has "rmsprop": `torch(alpha=0.9,
    momentum=0.9)`.

        g <- g + weight_decay * p               decoupled_decay: p <- p * (1 - lr * wd)
        v <- v + (1 - alpha) * (g² - v)         v starts at 1
        b <- momentum * b + lr * g / √(v + eps)
        p <- p - b

    Differs from torch's in:
      1. eps is under the root.
      2. v starts at 1, so that gradients below 1 begin with short steps, not long ones.
      3. lr is inside the momentum buffer, unless lr_in_momentum=False.
      4. weight_decay can be decoupled, and then corrected: lr²/max_lr in place of lr.
      5. Defaults: alpha 0.9, eps 1e-10.

    Args:
      lr: a number in [0, ∞) or an optax schedule.
      alpha: in [0, 1); (0, 1) if centered.
      eps, weight_decay: in [0, ∞).
      momentum: in [0, 1).
      centered, decoupled_decay, corrected_weight_decay, lr_in_momentum: as in timm.
        A correction of a decay that is not decoupled is refused; timm ignores it.
      caution: refused.
      foreach: accepted; it changes no number.
      max_lr: what timm's constructor got as lr, in (0, ∞), for corrected_weight_decay
        where lr is a schedule or an array.
      weight_decay_mask: True where weights decay. See `rmsprop`.

    Run: timm 1.0.31. Source: timm/optim/rmsprop_tf.py.
    """
    refuse("caution", caution, False, "multiply the updates by the mask in the chain")
    _errors.flags(corrected_weight_decay=corrected_weight_decay)
    if corrected_weight_decay:
        weight_decay = _corrected(weight_decay, decoupled_decay, lr, max_lr)
    else:
        refuse("max_lr", max_lr, None, "it is for corrected_weight_decay")
    return rmsprop(
        lr,
        alpha,
        eps,
        momentum=momentum,
        centered=centered,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_decay,
        weight_decay_mask=weight_decay_mask,
        initial_scale=1.0,
        eps_in_sqrt=True,
        lr_in_momentum=lr_in_momentum,
    )


def _corrected(
    weight_decay: optax.ScalarOrSchedule,
    decoupled: bool,
    lr: optax.ScalarOrSchedule,
    max_lr: ArrayLike | None,
) -> optax.ScalarOrSchedule:
    """Shrink a decoupled weight decay, which is multiplied by lr, to lr²/max_lr."""
    if not decoupled:
        raise ValueError(
            "`corrected_weight_decay` must be False without decoupled_decay, got True; "
            "timm ignores it then"
        )
    if max_lr is None and isinstance(lr, int | float):  # which does not change
        return weight_decay
    max_lr = _errors.number(
        "max_lr",
        max_lr,
        zero=False,
        hint="; with corrected_weight_decay and an lr that changes give its maximum",
    )
    weight_decay = _errors.schedule("weight_decay", weight_decay)
    lr = _errors.schedule("lr", lr, below_0=_errors.ASCEND)
    return product(weight_decay, lr, 1 / max_lr)


@speaks(learning_rate="lr", decay="alpha")
def stable_baselines3(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    *,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Stable-Baselines3's `RMSpropTFLike`; its A2C uses torch's unless told otherwise.

        g <- g + weight_decay * p
        v <- alpha * v + (1 - alpha) * g²       v starts at 1
        b <- momentum * b + g / √(v + eps)
        p <- p - lr * b

    Differs from torch's in:
      1. eps is under the root.
      2. v starts at 1, so that gradients below 1 begin with short steps, not long ones.

    The learning rate stays outside the momentum buffer, unlike TensorFlow's.

    Args:
      lr: a number in [0, ∞) or an optax schedule.
      alpha: in [0, 1); (0, 1) if centered.
      eps, weight_decay: in [0, ∞).
      momentum: in [0, 1).
      centered: as in torch.
      weight_decay_mask: True where weights decay. See `rmsprop`.

    Run: stable_baselines3 2.9.2.
    Source: stable_baselines3/common/sb2_compat/rmsprop_tf_like.py.
    """
    return rmsprop(
        lr,
        alpha,
        eps,
        momentum=momentum,
        centered=centered,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        initial_scale=1.0,
        eps_in_sqrt=True,
    )


@speaks(learning_rate="lr", decay="alpha")
def bitsandbytes(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    optim_bits: int = 32,
    args: Any = None,
    min_8bit_size: int = 4096,
    percentile_clipping: int = 100,
    block_wise: bool = True,
    *,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """bitsandbytes' `RMSprop` with a state of 32 bits.

        g <- g + weight_decay * p
        v <- alpha * v + (1 - alpha) * g²
        p <- p - lr * g / (√v + eps)

    Differs from torch's in:
      1. There is no momentum: bitsandbytes accepts and ignores it, we refuse it.
      2. centered and alpha=0 are refused, as there.

    Args:
      lr: a number in [0, ∞) or an optax schedule.
      alpha: in (0, 1).
      eps, weight_decay: in [0, ∞).
      momentum, centered, args, percentile_clipping: refused unless left as they are.
      optim_bits: 32. Here 8 is refused.
      min_8bit_size, block_wise: accepted; with 32 bits they change no number. The
        version that was run has block_wise and percentile_clipping no longer.
      weight_decay_mask: True where weights decay. See `rmsprop`.

    Run: bitsandbytes 0.50.2, on a CPU. Source: bitsandbytes/optim/rmsprop.py.
    """
    refuse("momentum", momentum, 0, "bitsandbytes ignores it: use dialects.torch")
    refuse("centered", centered, False, "use dialects.torch")
    refuse("optim_bits", optim_bits, 32, "the state has 32 bits here")
    refuse("args", args, None, "give every option by its name")
    refuse(
        "percentile_clipping",
        percentile_clipping,
        100,
        "put optax.clip_by_global_norm before this in an optax.chain",
    )
    alpha = _errors.number("alpha", alpha, high=1, zero=False)
    return rmsprop(
        lr, alpha, eps, weight_decay=weight_decay, weight_decay_mask=weight_decay_mask
    )
