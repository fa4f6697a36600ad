"""RMSprop: the averaging transforms, momentum and weight decay in one chain."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import tree_flatten_with_path
from jax.typing import ArrayLike, DTypeLike

from optax_rmsprop import _errors
from optax_rmsprop._chain import checked, each_leaf, full_like
from optax_rmsprop._errors import at, shown, trees
from optax_rmsprop._numerics import (
    accumulator_dtype_of,
    by_parts,
    cast,
    clip,
    product,
)
from optax_rmsprop.transforms import rms, stddev


class ScaledTraceState(optax.TraceState):
    """State of momentum with lr_in_momentum: the learning rate is inside the buffer.

    Its type tells it from an `optax.TraceState`, in which the learning rate is not; the
    arrays of one cannot be converted into those of the other.
    """

    __slots__ = ()


@_errors.knows_foreign_names
def rmsprop(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    decay: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    *,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    centered: bool = False,
    weight_decay: optax.ScalarOrSchedule | None = None,
    decoupled_weight_decay: bool = False,
    weight_decay_mask: Any = None,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = False,
    lr_in_momentum: bool = False,
    bias_correction: bool = False,
    maximize: bool = False,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RMSprop with torch's numbers and defaults.

        g <- -g                                 if maximize
        g <- g + weight_decay * p               if weight_decay
        u  = g / (√nu + eps)                    scale_by_rms (scale_by_stddev: centered)
        b <- momentum * b + u                   if momentum; nesterov: u + momentum * b
        p <- p - learning_rate * b

    with lr_in_momentum (TensorFlow, Keras, optax)

        b <- momentum * b + learning_rate * u
        p <- p - b

    and with decoupled_weight_decay, learning_rate * weight_decay * p is subtracted from
    p instead, and enters neither nu nor b.

    Every number may also be a traced 0-d array: a grid of settings runs under one
    `jax.vmap`, and `optax.inject_hyperparams(rmsprop)` schedules any of them. Without
    momentum and weight_decay (None, or 0 in Python) there is no slot and no operation
    for them; with a JAX array of 0 there is.

    Args:
      learning_rate: step length in the parameter's unit, in [0, ∞), or an optax
        schedule from the number of updates made to one. torch: `lr`.
      decay: weight of the old average, in [0, 1), in (0, 1) if centered; it remembers
        about 1/(1 - decay) updates. torch: `alpha`; Keras: `rho`.
      eps: added to the root, in [0, ∞), in the gradient's unit. Keras: `epsilon`.
      momentum: weight of the old step, in [0, 1). None is 0.
      nesterov: whether to look ahead: u + momentum * b in place of b. Not in torch.
      centered: whether to divide by the standard deviation, not the root mean square.
        Wants a large eps: see `scale_by_stddev`.
      weight_decay: factor of the parameter added to the gradient (L2), in [0, ∞), or an
        optax schedule of it. None is 0.
      decoupled_weight_decay: whether to apply it to the parameter, as AdamW and Keras
        do.
      weight_decay_mask: a tree of booleans with the parameters' structure or a prefix
        of it, or a function from the parameters to one; weights decay where it is True.
        The function gets the parameters that have a gradient, as they are, and None for
        the others.
        With `optax.inject_hyperparams`, name it (and accumulator_dtype) in static_args.
      initial_scale: average before the first update, in [0, ∞); 1 in TensorFlow 1 and
        timm's RMSpropTF.
      eps_in_sqrt: whether eps goes under the root, in the square of the gradient's
        unit; True in TensorFlow, Keras and timm's RMSpropTF.
      lr_in_momentum: whether the momentum buffer contains scaled steps. It makes no
        difference while the learning rate is constant.
      bias_correction: whether to correct the averages for their start at 0, as Adam
        does.
      maximize: whether to ascend.
      accumulator_dtype: dtype of the state, float32 or (in 64-bit mode) float64. By
        default that of the parameter, but at least float32.

    Returns:
      A transformation whose updates are for `optax.apply_updates`. They have the
      gradient's shape. Their dtype is the gradient's; where update is given parameters
      of another dtype, it is float32, or the wider of the two; that of a complex
      parameter is complex. Parameters must be given to update where weight_decay is
      used. Where a gradient is None, so is the update, the state stays as it is, and
      the parameter is not read: it may be anything.
      The state is that of an `optax.chain`; read it with `optax.tree.get(state, "nu")`,
      or "mu", "var", "trace".

    Raises:
      TypeError: a number or option of the wrong kind; a schedule that returns no
        number; parameters that are not floating point or complex; a state in less than
        float32.
      ValueError: a number out of its range; options that exclude each other; updates,
        parameters, a mask or a state that do not belong together; a negative count.

    Example:
      >>> import jax.numpy as jnp, optax, optax_rmsprop
      >>> tx = optax_rmsprop.rmsprop(learning_rate=0.1, decay=0.75)
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> updates, state = tx.update({"w": jnp.array([3.0, -3.0])}, tx.init(params))
      >>> optax.apply_updates(params, updates)["w"]
      Array([0.8, 2.2], dtype=float32)

    Differs from `torch.optim.RMSprop`:

      1. Names: lr is `learning_rate`, alpha is `decay`. Execution options (foreach,
         capturable, differentiable) have no counterpart: jit and grad always apply.
      2. The centered state has the variance `var` in place of square_avg, and never
         becomes NaN; for this and the rest, see the head of `transforms.py`.
      3. Momentum is refused at 1 and above, decay too; torch accepts both.

    Differs from `optax.rmsprop`: torch's defaults, eps outside the root, learning rate
    outside the momentum buffer, and weight decay.

    References:
      torch/optim/rmsprop.py (2.13.0), `_single_tensor_rmsprop`.
      Hinton, Neural Networks for Machine Learning, lecture 6e, 2012.
    """
    _errors.flags(
        nesterov=nesterov,
        centered=centered,
        decoupled_weight_decay=decoupled_weight_decay,
        lr_in_momentum=lr_in_momentum,
        maximize=maximize,
    )
    learning_rate = _errors.schedule(
        "learning_rate", learning_rate, below_0="" if maximize else _errors.ASCEND
    )
    momentum = _errors.number("momentum", 0.0 if momentum is None else momentum, high=1)
    weight_decay = _errors.schedule(
        "weight_decay", 0.0 if weight_decay is None else weight_decay
    )
    mask = _checked_mask(weight_decay_mask)
    has_momentum = not _errors.is_off(momentum)
    if nesterov and not has_momentum:
        raise ValueError("`nesterov` must be False without momentum, got True")
    average = stddev if centered else rms
    rescale = average(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction, accumulator_dtype
    )
    decays = not _errors.is_off(weight_decay)
    decay_weights = functools.partial(
        _decay_weights, mask=mask, accumulator_dtype=accumulator_dtype
    )
    # Not optax.scale(-1.0): its constant is an operand of a loop, and XLA joins only
    # loops of few operands (`single_pass`).
    negate = optax.stateless_with_tree_map(lambda update, _: -update)
    parts = []
    if maximize:
        parts.append(negate)
    if decays and not decoupled_weight_decay:
        parts.append(decay_weights(weight_decay))
    parts.append(rescale)
    if lr_in_momentum:
        parts.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if has_momentum:
        state_type = ScaledTraceState if lr_in_momentum else optax.TraceState
        parts.append(_momentum(momentum, nesterov, state_type, accumulator_dtype))
    if decays and decoupled_weight_decay:
        # With lr_in_momentum, the learning rate has been applied already.
        rate = product(weight_decay, learning_rate) if lr_in_momentum else weight_decay
        parts.append(decay_weights(rate))
    if lr_in_momentum:
        parts.append(negate)
    else:
        parts.append(optax.scale_by_learning_rate(learning_rate))
    tx = checked(optax.chain(*parts), needs_params="weight_decay" if decays else None)
    return optax.with_extra_args_support(tx)


def _checked_mask(value: Any) -> Callable[[Any], Any] | None:
    """Check a mask: None, a function, or a tree of booleans, but not one alone.

    It comes back as a plain function, or None. A tree in the form of an Equinox model
    is callable, but is not a function; a `jax.tree_util.Partial` is a tree without
    leaves, but is a function.
    """
    if value is None:
        return None
    leaves = tree_flatten_with_path(value)[0]
    is_function = callable(value) and all(path == () for path, _ in leaves)
    is_function &= not isinstance(value, type)
    if not is_function:
        remedy = _errors.STATIC_ARGS.format("weight_decay_mask")
        _check_booleans(value, alone=False, remedy=remedy)

    def mask_of(params: Any) -> Any:
        tree = value(params) if is_function else value
        _check_booleans(tree)
        structure = jax.tree.structure(tree)
        if not _errors.fits(structure, params):
            given, expected = (
                dict(tree_flatten_with_path(t)[0]) for t in (tree, params)
            )
            # True or False for a whole tree stands for everything in it.
            starts = ([path[:i] for i in range(len(path) + 1)] for path in expected)
            of_each = [next(filter(given.__contains__, s), s[-1]) for s in starts]
            problems = _errors.other_paths(given, dict.fromkeys(of_each))
            raise ValueError(
                "`weight_decay_mask` must have the structure of the parameters or a "
                "prefix of it: "
                + "; ".join(problems or [trees(structure, jax.tree.structure(params))])
            )
        return tree

    return mask_of


def _check_booleans(tree: Any, *, alone: bool = True, remedy: str = "") -> None:
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if (
            _errors.dtype_of(leaf) != np.bool_
            or np.shape(leaf) != ()
            or isinstance(leaf, Tracer)
            or (path == () and not alone)
        ):
            raise TypeError(
                "`weight_decay_mask` must be a tree of True and False or a function "
                f"that returns one, got {shown(leaf)} at {at(path)}{remedy}"
            )


def _momentum(
    decay: ArrayLike,
    nesterov: bool,
    state_type: type[optax.TraceState],
    accumulator_dtype: DTypeLike | None,
) -> optax.GradientTransformation:
    """`optax.trace`, as a part of a chain."""

    def init_fn(params: optax.Params) -> optax.TraceState:
        return state_type(full_like(params, 0.0, accumulator_dtype))

    def update_fn(
        updates: optax.Updates, state: optax.TraceState, params: Any = None
    ) -> tuple[optax.Updates, optax.TraceState]:
        leaf = functools.partial(_momentum_leaf, nesterov, decay)
        updates, trace = each_leaf(leaf, updates, state.trace)
        return updates, state_type(trace)

    return optax.GradientTransformation(init_fn, update_fn)


@functools.partial(jax.jit, static_argnums=0)
def _momentum_leaf(
    nesterov: bool, decay: ArrayLike, u: jax.Array, b: jax.Array
) -> tuple[jax.Array, ...]:
    def update(u: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
        momentum = jnp.asarray(decay, b.dtype)
        # In optax's order, in which XLA rounds as it does for optax.trace.
        b = u + momentum * b
        return u + momentum * b if nesterov else b, b

    return by_parts(update, cast(u, b.dtype), b)


def _decay_weights(
    rate: optax.ScalarOrSchedule,
    mask: Callable[[optax.Params], Any] | None,
    accumulator_dtype: DTypeLike | None,
) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, as a part of a chain, whose sums are finite."""
    tx = optax.add_decayed_weights(rate)

    def to_accumulator(x: jax.Array, p: jax.Array) -> jax.Array:
        return cast(x, accumulator_dtype_of(p, accumulator_dtype))

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, params = (
            jax.tree.map(to_accumulator, tree, params) for tree in (updates, params)
        )
        sums, state = tx.update(updates, state, params)
        return jax.tree.map(_clip_sum, sums, updates, params), state

    unmasked = optax.GradientTransformation(tx.init, update_fn)
    if mask is None:
        return unmasked

    # optax.masked would call the mask with gradients. Here it gets the parameters.

    def masked_init_fn(params: optax.Params) -> optax.OptState:
        # `checked` calls this with () to learn the state's types, which fits no mask.
        for_types = type(params) is tuple and not params
        return optax.masked(unmasked, True if for_types else mask).init(params)

    def masked_update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params
    ) -> tuple[optax.Updates, optax.OptState]:
        return optax.masked(unmasked, mask(params)).update(updates, state, params)

    return optax.GradientTransformation(masked_init_fn, masked_update_fn)


@jax.jit
def _clip_sum(total: jax.Array, g: jax.Array, p: jax.Array) -> jax.Array:
    """Clip a sum of finite numbers within the range of its dtype."""

    def clipped(total: jax.Array, g: jax.Array, p: jax.Array) -> jax.Array:
        within = clip(total, float(jnp.finfo(total.dtype).max))
        return jnp.where(jnp.isfinite(g) & jnp.isfinite(p), within, total)

    return by_parts(clipped, total, g, p)
