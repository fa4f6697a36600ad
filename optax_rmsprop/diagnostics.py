"""Effective step sizes, computed from the state of an optimizer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_rmsprop import _errors
from optax_rmsprop._numerics import Moment, by_parts, divide
from optax_rmsprop.transforms import ScaleByRmsState, ScaleByStddevState
from optax_rmsprop.wrappers import CompressedState, decompress_state


class Diagnosis(NamedTuple):
    """The result of `diagnose`.

    Attributes:
      step_size: learning_rate / (root + eps), with the structure and shapes of the
        parameters: the factor of each coordinate's gradient in the last update.
      saturation: eps / (root + eps), in [0, 1], in the same structure: the step size
        as a fraction of the largest that eps allows. At 0 the gradient is fully
        normalized. At 1 eps alone determines the step, and the coordinate moves as in
        gradient descent with rate learning_rate / eps (with eps_in_sqrt,
        learning_rate / √eps).
    """

    step_size: optax.Updates
    saturation: optax.Updates


@_errors.knows_foreign_names
def diagnose(
    opt_state: optax.OptState,
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    eps: ArrayLike = 1e-8,
    *,
    eps_in_sqrt: bool = False,
) -> Diagnosis:
    """Compute the effective step sizes of a state of RMSprop, and the share of eps.

        root       = √nu                            √var if centered
        step_size  = learning_rate / (root + eps)   eps_in_sqrt: … / √(root² + eps)
        saturation = eps / (root + eps)             eps_in_sqrt: √eps / √(root² + eps)

    The state is not changed. `diagnose` may be called within `jax.jit`: if only a few
    numbers of the result are used, such as the median of each array for a log, XLA does
    not store the others. Momentum adds up to 1/(1 - momentum) such steps. Nesterov and
    weight decay are left out.

    Args:
      opt_state: the state of `rmsprop`, `scale_by_rms`, `scale_by_stddev` or a dialect,
        also inside `optax.chain`, `masked`, `inject_hyperparams`, `compress_state` and
        others. With `optax.partition` pass the state of one group,
        `opt_state.inner_states[label]`.
      learning_rate: the optimizer's, in [0, ∞), or its schedule, which is evaluated at
        the last update. With `inject_hyperparams` pass
        `opt_state.hyperparams["learning_rate"]`.
      eps: the optimizer's, in [0, ∞).
      eps_in_sqrt: whether eps is under the root, as in the optimizer.

    Returns:
      A `Diagnosis`: two trees with the structure and shapes of the parameters, in the
      dtype of the averages. In a complex leaf, the real and the imaginary part are the
      step sizes of the two parts.

    Raises:
      TypeError: a number or option of the wrong kind; averages in less than float32.
      ValueError: a number out of its range; an `opt_state` without a state of RMSprop,
        with more than one, or of many runs; a negative average of squares.

    Example:
      >>> import jax.numpy as jnp, optax_rmsprop
      >>> tx = optax_rmsprop.rmsprop(learning_rate=0.1, decay=0.75, eps=1.0)
      >>> g = jnp.array([0.0, 6.0])
      >>> _, state = tx.update(g, tx.init(g))
      >>> optax_rmsprop.diagnose(state, 0.1, 1.0).step_size  # roots of 0 and 3
      Array([0.1  , 0.025], dtype=float32)

    References:
      `scale_by_rms`, `scale_by_stddev`: the same roots.
    """
    learning_rate = _errors.schedule("learning_rate", learning_rate)
    eps = _errors.number("eps", eps)
    _errors.flags(eps_in_sqrt=eps_in_sqrt)
    state = _state_of_averages(opt_state)
    *_, moments = _errors.checked_slots("opt_state", state)  # nu, or mu and var
    _errors.not_negative("opt_state", moments)
    if callable(learning_rate):
        learning_rate = learning_rate(jnp.maximum(state.count - 1, 0))
    largest = jnp.sqrt(eps) if eps_in_sqrt else eps

    def over_root(numerator: ArrayLike, moment: jax.Array) -> jax.Array:
        def leaf(moment: jax.Array) -> jax.Array:
            zero, one, top = (jnp.asarray(x, moment.dtype) for x in (0, 1, numerator))
            # 1 * moment + 0 * 0²: `divide` takes a moment by its parts.
            unchanged = Moment.of(one, moment, zero, zero, zero)
            return divide(top, unchanged, eps, eps_in_sqrt)

        return by_parts(leaf, moment)

    return Diagnosis(
        jax.tree.map(functools.partial(over_root, learning_rate), moments),
        jax.tree.map(functools.partial(over_root, largest), moments),
    )


def _state_of_averages(opt_state: Any) -> ScaleByRmsState | ScaleByStddevState:
    """Find the one state with averages in the state of an optimizer."""
    types = ScaleByRmsState, ScaleByStddevState
    is_leaf = lambda x: isinstance(x, (*types, CompressedState))  # noqa: E731
    found = []
    for node in jax.tree.leaves(opt_state, is_leaf=is_leaf):
        if isinstance(node, CompressedState):
            found.append(_state_of_averages(decompress_state(node)))
        elif isinstance(node, types):
            found.append(node)
    if len(found) != 1:
        raise ValueError(
            "`opt_state` must have one ScaleByRmsState or ScaleByStddevState, got "
            f"{len(found)}; pass the state of rmsprop, and with optax.partition the "
            "state of one group, opt_state.inner_states[label]"
        )
    return found[0]
