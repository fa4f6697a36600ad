"""What RMSprop has been in JAX itself and in optax."""

from __future__ import annotations  # so that help() shows these types by name

import optax as optax_
from jax.typing import ArrayLike

from optax_rmsprop.dialects._arguments import speaks
from optax_rmsprop.optimizer import rmsprop


@speaks()
def optax(
    learning_rate: optax_.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> optax_.GradientTransformationExtraArgs:
    """`optax.rmsprop` on a core that stays finite.

        v <- decay * v + (1 - decay) * g²       v starts at initial_scale
        b <- momentum * b + learning_rate * g / √(v + eps)
        p <- p - b                              nesterov: the step plus momentum * b

    Differs from torch's in:
      1. eps is under the root, unless eps_in_sqrt=False.
      2. The learning rate is inside the momentum buffer.
      3. There is no weight decay.
      4. Defaults: decay 0.9, no learning rate.

    Differs from optax's own in: complex numbers (parts apart; optax averages |g|²),
    initial_scale with bias_correction (refused), centered with bias_correction (there
    the first step divides by the root of a rounding error, or NaN), the state's types,
    and docs/differences.md.

    Args:
      learning_rate: a number in [0, ∞) or an optax schedule.
      decay: in [0, 1); (0, 1) if centered.
      eps, initial_scale: in [0, ∞).
      eps_in_sqrt, centered, bias_correction: as in `rmsprop`.
      momentum: None or in [0, 1).
      nesterov: whether to look ahead; refused without momentum.

    Run: optax 0.2.8. Source: optax/_src/alias.py, optax/_src/transform.py.
    """
    return rmsprop(
        learning_rate,
        decay,
        eps,
        momentum=momentum,
        nesterov=nesterov,
        centered=centered,
        initial_scale=initial_scale,
        eps_in_sqrt=eps_in_sqrt,
        lr_in_momentum=True,
        bias_correction=bias_correction,
    )


@speaks(learning_rate="step_size", decay="gamma")
def jax_example_libraries(
    step_size: optax_.ScalarOrSchedule,
    gamma: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    momentum: ArrayLike | None = None,
) -> optax_.GradientTransformationExtraArgs:
    """`rmsprop` and, given momentum, `rmsprop_momentum` of `jax.example_libraries`.

        v <- gamma * v + (1 - gamma) * g²
        b <- momentum * b + step_size * g / √(v + eps)
        p <- p - b

    Differs from torch's in:
      1. eps is under the root.
      2. The learning rate is inside the momentum buffer.
      3. There is no weight decay, and no centered form.
      4. Defaults: gamma 0.9, no learning rate.

    Args:
      step_size: a number in [0, ∞) or a schedule of the step, as there.
      gamma: in [0, 1). torch: alpha.
      eps: in [0, ∞), in the square of the gradient's unit.
      momentum: None for `rmsprop`; in [0, 1) for `rmsprop_momentum`, which has 0.9 by
        default.

    Run: jax 0.10.2. Source: jax/example_libraries/optimizers.py.
    """
    return rmsprop(
        step_size, gamma, eps, momentum=momentum, eps_in_sqrt=True, lr_in_momentum=True
    )
