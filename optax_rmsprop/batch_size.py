"""Settings of RMSprop for another batch size."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from optax_rmsprop import _errors


@_errors.knows_foreign_names
def scaled_to_batch(
    factor: ArrayLike,
    *,
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    decay: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    eps_in_sqrt: bool = False,
) -> dict[str, Any]:
    """Return settings with which batches `factor` times as large train alike.

        learning_rate <- √factor learning_rate
        decay         <- 1 - factor (1 - decay)
        eps           <- eps / √factor             eps_in_sqrt: eps / factor

    This is the square root scaling rule. The noise of a gradient, its difference from
    the gradient of all data, falls with the root of the batch size. Where noise is most
    of the gradient, the root of the average falls with it: the same mean gradient is
    multiplied by √factor more, and the learning rate by √factor again. So one step here
    goes as far as `factor` steps before, with as many examples: train for 1 / factor as
    many steps, and compare runs at the same number of examples.

    The rule does not hold for batches so large that noise is not most of the gradient.

    Args:
      factor: new batch size / old batch size, in (0, ∞) and below 1 / (1 - decay).
      learning_rate: the old run's, as for `rmsprop`. If it is a schedule, so is the
        result: it takes the rate of the old run at as many examples, that is at its
        step factor * count, rounded down, as long as that is below 2²⁴.
      decay: the old run's.
      eps: the old run's.
      eps_in_sqrt: whether eps is under the root, in the square of the gradient's unit.

    Returns:
      A dict with the arguments learning_rate, decay, eps and eps_in_sqrt of `rmsprop`.
      The theory is that of RMSprop without momentum and weight decay. An
      `initial_scale` is in the square of the gradient's unit: divide it by `factor`.

    Raises:
      TypeError: a number or option of the wrong kind.
      ValueError: a number out of its range; a factor with which decay would not be
        above 0, unless one of the two is traced.

    Example:
      >>> from optax_rmsprop import rmsprop, scaled_to_batch
      >>> settings = scaled_to_batch(4, learning_rate=1e-3, decay=0.99, eps=1e-6)
      >>> settings["learning_rate"], settings["decay"], settings["eps"]
      (0.002, 0.96, 5e-07)
      >>> tx = rmsprop(**settings)

    References:
      Malladi et al., arXiv:2205.10287: the rule, and how large its error may be.
    """
    kappa: Any = _errors.number("factor", factor, zero=False)
    rate = _errors.schedule("learning_rate", learning_rate)
    decay = _errors.number("decay", decay, high=1)
    eps = _errors.number("eps", eps)
    _errors.flags(eps_in_sqrt=eps_in_sqrt)
    if not isinstance(kappa, Tracer) and not isinstance(decay, Tracer):
        _check_decay(kappa, decay)
    root = jnp.sqrt(kappa) if isinstance(kappa, jax.Array) else math.sqrt(kappa)
    return {
        "learning_rate": _faster(rate, kappa, root) if callable(rate) else root * rate,
        "decay": 1 - kappa * (1 - decay),
        "eps": eps / (kappa if eps_in_sqrt else root),
        "eps_in_sqrt": eps_in_sqrt,
    }


def _check_decay(factor: Any, decay: Any) -> None:
    factor, decay = float(factor), float(decay)
    if factor * (1 - decay) >= 1:
        raise ValueError(
            f"`factor` must be below 1 / (1 - decay) = {1 / (1 - decay):g}, got "
            f"{factor:g}, with which decay would not be above 0; take smaller batches, "
            "or begin with a decay closer to 1"
        )


def _faster(schedule: Any, factor: ArrayLike, root: ArrayLike) -> optax.Schedule:
    """Return a schedule that runs `factor` times as fast, times a root."""

    def scaled(count: Any) -> Any:
        # Whole numbers, because a schedule may look its rates up in a table.
        old = jnp.floor(factor * jnp.asarray(count).astype(jnp.float32))
        return root * schedule(old.astype(jnp.int32))

    return scaled
