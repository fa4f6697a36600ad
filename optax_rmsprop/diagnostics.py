"""What an optimizer's state says of the steps it makes."""

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
    """What `diagnose` reads off a state.

    Attributes:
      step_size: learning_rate / (root + eps), with the structure and shapes of the
        parameters: what each coordinate's gradient was multiplied with.
      saturation: eps / (root + eps), in [0, 1], likewise: the step size as a fraction
        of the largest that eps allows. At 1 eps alone decides, and the coordinate moves
        as in gradient descent with rate learning_rate / eps (under the root, √eps); at
        0 its gradient is normalized in full.
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
    """Read effective step sizes, and how far eps decides them, off a state of RMSprop.

        root       = √nu                            √var if centered
        step_size  = learning_rate / (root + eps)   eps_in_sqrt: … / √(root² + eps)
        saturation = eps / (root + eps)             eps_in_sqrt: √eps / √(root² + eps)

    Nothing is changed, and it may be called within `jax.jit`. A log wants few numbers,
    as the median of each array; where they are all that is used, XLA stores no others.
    Momentum adds up to 1/(1 - momentum) such steps; nesterov and weight decay are left
    out.

    Args:
      opt_state: the state of `rmsprop`, `scale_by_rms`, `scale_by_stddev` or a dialect,
        also inside of `optax.chain`, `masked`, `inject_hyperparams` and others, and of
        `compress_state`. Of `optax.partition` pass one group's,
        `opt_state.inner_states[label]`.
      learning_rate: that of the optimizer, in [0, ∞), or its schedule, which is read at
        the update made last. Of `inject_hyperparams`,
        `opt_state.hyperparams["learning_rate"]`.
      eps: that of the optimizer, in [0, ∞).
      eps_in_sqrt: whether eps is under the root, as in the optimizer.

    Returns:
      A `Diagnosis`: two trees with the structure and shapes of the parameters, in the
      dtype of the averages. Complex leaves have the step sizes of their two parts as
      real and imaginary part.

    Raises:
      TypeError: a number or option of the wrong kind; averages in less than float32.
      ValueError: a number out of its range; an `opt_state` with no state of these, with
        more than one, or of many runs; a negative average of squares.

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
    *_, moments = _errors.held("opt_state", state)
    _errors.not_negative("opt_state", moments)
    if callable(learning_rate):
        learning_rate = learning_rate(jnp.maximum(state.count - 1, 0))
    largest = jnp.sqrt(eps) if eps_in_sqrt else eps

    def over_root(numerator: ArrayLike, moment: jax.Array) -> jax.Array:
        def leaf(moment: jax.Array) -> jax.Array:
            zero, one, top = (jnp.asarray(x, moment.dtype) for x in (0, 1, numerator))
            steady = Moment(one, moment, zero, zero, zero)
            return divide(top, steady, eps, eps_in_sqrt)

        return by_parts(leaf, moment)

    return Diagnosis(
        jax.tree.map(functools.partial(over_root, learning_rate), moments),
        jax.tree.map(functools.partial(over_root, largest), moments),
    )


def _state_of_averages(opt_state: Any) -> ScaleByRmsState | ScaleByStddevState:
    kinds = ScaleByRmsState, ScaleByStddevState
    is_one = lambda x: isinstance(x, (*kinds, CompressedState))  # noqa: E731
    found = []
    for node in jax.tree.leaves(opt_state, is_leaf=is_one):
        if isinstance(node, CompressedState):
            found.append(_state_of_averages(decompress_state(node)))
        elif isinstance(node, kinds):
            found.append(node)
    if len(found) != 1:
        raise ValueError(
            "`opt_state` must have one ScaleByRmsState or ScaleByStddevState, got "
            f"{len(found)}; pass the state of rmsprop, and of optax.partition the part "
            "opt_state.inner_states[label]"
        )
    return found[0]
