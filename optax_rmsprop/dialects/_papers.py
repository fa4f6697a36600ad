"""RMSprop as two papers have it."""

from __future__ import annotations  # so that help() shows these types by name

from typing import Any

import optax
from jax.typing import ArrayLike

from optax_rmsprop.dialects._arguments import speaks
from optax_rmsprop.optimizer import rmsprop


@speaks(learning_rate="lr", decay="alpha")
def graves2013(
    lr: optax.ScalarOrSchedule = 1e-4,
    alpha: ArrayLike = 0.95,
    momentum: ArrayLike = 0.9,
    eps: ArrayLike = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    """Alex Graves' RMSprop, the first centered one; `chainer.optimizers.RMSpropGraves`.

        n <- alpha * n + (1 - alpha) * g²
        m <- alpha * m + (1 - alpha) * g
        b <- momentum * b + lr * g / √(n - m² + eps)
        p <- p - b

    Differs from torch's in:
      1. It is always centered.
      2. eps is under the root.
      3. The learning rate is inside the momentum buffer.
      4. There is no weight decay.
      5. Defaults: lr 1e-4, alpha 0.95, momentum 0.9, eps 1e-4.

    Args:
      lr: a number in [0, ∞) or an optax schedule.
      alpha: in (0, 1).
      momentum: in [0, 1).
      eps: in [0, ∞), in the square of the gradient's unit.

    Run: chainer 7.8.1; and held to a transcription of the paper's equations 38-45,
    Generating Sequences With Recurrent Neural Networks, arXiv:1308.0850.
    """
    return rmsprop(
        lr,
        alpha,
        eps,
        momentum=momentum,
        centered=True,
        eps_in_sqrt=True,
        lr_in_momentum=True,
    )


@speaks(learning_rate="lr", weight_decay="wc")
def dqn2015(
    lr: optax.ScalarOrSchedule = 0.00025,
    wc: ArrayLike = 0.0,
    *,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The RMSprop of the DQN that was published in Nature, in its Lua code.

        g <- g + wc * p
        n <- 0.95 * n + 0.05 * g²
        m <- 0.95 * m + 0.05 * g
        p <- p - lr * g / √(n - m² + 0.01)

    Differs from torch's in:
      1. It is always centered, with alpha 0.95 for both averages. The paper calls them
         "squared gradient momentum" and "gradient momentum": there is no momentum.
      2. eps is under the root, and 0.01, its "min squared gradient".
      3. Default: lr 0.00025.

    Args:
      lr: a number in [0, ∞) or an optax schedule. The Lua code's falls linearly over
        lr_endt steps of the agent, of which update_freq (4) make one update; in the
        published run it is constant.
      wc: weight cost (L2), in [0, ∞).
      weight_decay_mask: True where weights decay. See `rmsprop`.

    Not run: held to a transcription of dqn/NeuralQLearner.lua, `qLearnMinibatch`.
    Mnih et al., Human-level control through deep reinforcement learning, 2015.
    """
    return rmsprop(
        lr,
        0.95,
        0.01,
        centered=True,
        weight_decay=wc,
        weight_decay_mask=weight_decay_mask,
        eps_in_sqrt=True,
    )
