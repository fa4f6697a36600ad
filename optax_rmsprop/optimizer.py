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
from optax_rmsprop._errors import at, shown, trees
from optax_rmsprop._numerics import (
    accumulator_dtype_of,
    by_parts,
    cast,
    clip,
    product,
    update_dtype_of,
)
from optax_rmsprop.transforms import scale_by_rms, scale_by_stddev


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
      lr_in_momentum: whether the momentum buffer holds scaled steps. It makes no
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
      2. The centered state holds the variance `var` in place of square_avg, and never
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
    has_momentum, decays = (
        not _errors.is_off(momentum),
        not _errors.is_off(weight_decay),
    )
    if nesterov and not has_momentum:
        raise ValueError("`nesterov` must be False without momentum, got True")
    scale_by = scale_by_stddev if centered else scale_by_rms
    rescale = scale_by(
        decay,
        eps,
        initial_scale=initial_scale,
        eps_in_sqrt=eps_in_sqrt,
        bias_correction=bias_correction,
        accumulator_dtype=accumulator_dtype,
    )

    def chain(
        mask: Callable[[optax.Params], Any] | None,
    ) -> optax.GradientTransformationExtraArgs:
        transforms = []
        if maximize:
            transforms.append(optax.scale(-1.0))
        if decays and not decoupled_weight_decay:
            transforms.append(_add_decayed_weights(weight_decay, mask))
        transforms.append(rescale)
        if lr_in_momentum:
            transforms.append(
                optax.scale_by_learning_rate(learning_rate, flip_sign=False)
            )
        if has_momentum:
            trace = _trace_of_steps if lr_in_momentum else optax.trace
            transforms.append(trace(momentum, nesterov))
        if decays and decoupled_weight_decay:
            rate = weight_decay
            if lr_in_momentum:  # the learning rate has been applied already
                rate = product(weight_decay, learning_rate)
            transforms.append(_add_decayed_weights(rate, mask))
        if lr_in_momentum:
            transforms.append(optax.scale(-1.0))
        else:
            transforms.append(optax.scale_by_learning_rate(learning_rate))
        return optax.chain(*transforms)

    state_types: Any = None

    def check(updates: optax.Updates, state: Any, params: optax.Params | None) -> None:
        nonlocal state_types
        if state_types is None:  # no array is made before the first update
            any_mask = mask and (lambda tree: tree)
            example = jax.eval_shape(chain(any_mask).init, ())
            state_types = _errors.state_types(example)
        _errors.same_state(state, state_types)
        if decays and params is None:
            raise ValueError(
                "`params` must be given to update for weight_decay, got None; call "
                "update(grads, state, params)"
            )
        _errors.belong(updates, params, state)

    def wide(leaf: Any) -> jax.Array:
        return cast(leaf, accumulator_dtype_of(leaf, accumulator_dtype))

    def wide_slot(slot: jax.Array) -> jax.Array:
        return wide(slot) if jnp.issubdtype(slot.dtype, jnp.inexact) else slot

    def init_fn(params: optax.Params) -> optax.OptState:
        return jax.tree.map(wide_slot, chain(mask).init(params))

    # The chain runs in the dtype of its accumulators, between gradients of any dtype.
    # The state keeps its structure and dtypes, whatever the gradients' dtypes are and
    # where a gradient is None. By itself optax.trace would keep neither.
    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check(updates, state, params)
        if params is not None:
            # What has no gradient may be anything, and is not looked at.
            params = _map(lambda g, p: None if g is None else p, updates, params)
        # optax would call the mask with the gradients, in the accumulators' dtype.
        tx = chain(mask and (lambda _: mask(params)))
        wide_updates, new_state = tx.update(
            jax.tree.map(wide, updates), state, jax.tree.map(wide, params), **extra_args
        )
        new_state = _map(
            lambda new, old: old if new is None else cast(new, jnp.result_type(old)),
            new_state,
            state,
        )
        trees = (updates,) if params is None else (updates, params)
        new_updates = jax.tree.map(
            lambda u, *leaves: cast(u, update_dtype_of(*leaves)), wide_updates, *trees
        )
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked_mask(value: Any) -> Callable[[Any], Any] | None:
    """Check a mask: None, a function, or a tree of booleans, but not one alone.

    It comes back as a plain function, or None. optax would call a tree of booleans in
    the form of an Equinox model, which is callable, and would take a
    `jax.tree_util.Partial`, which is a tree without leaves, for a tree.
    """
    if value is None:
        return None
    leaves = tree_flatten_with_path(value)[0]
    is_function = callable(value) and all(path == () for path, _ in leaves)
    is_function &= not isinstance(value, type)
    if not is_function:
        remedy = _errors.STATIC_ARGS.format("weight_decay_mask")
        _check_booleans(value, alone=False, remedy=remedy)

    def checked(params: Any) -> Any:
        tree = value(params) if is_function else value
        _check_booleans(tree)
        structure = jax.tree.structure(tree)
        if not _errors.fits(structure, params):
            given, expected = (
                dict(tree_flatten_with_path(t)[0]) for t in (tree, params)
            )
            # What is True or False for a whole tree stands for all that is in it.
            starts = ([path[:i] for i in range(len(path) + 1)] for path in expected)
            of_each = [next(filter(given.__contains__, s), s[-1]) for s in starts]
            problems = _errors.other_paths(given, dict.fromkeys(of_each))
            raise ValueError(
                "`weight_decay_mask` must have the structure of the parameters or a "
                "prefix of it: "
                + "; ".join(problems or [trees(structure, jax.tree.structure(params))])
            )
        return tree

    return checked


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


def _trace_of_steps(
    decay: ArrayLike, nesterov: bool
) -> optax.GradientTransformationExtraArgs:
    """`optax.trace` of updates that the learning rate has scaled."""
    tx = optax.trace(decay, nesterov)

    def init_fn(params: optax.Params) -> ScaledTraceState:
        return ScaledTraceState(*tx.init(params))

    def update_fn(
        updates: optax.Updates, state: optax.TraceState, params: Any = None, **_: Any
    ) -> tuple[optax.Updates, ScaledTraceState]:
        updates, new = tx.update(updates, state, params)
        return updates, ScaledTraceState(*new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _add_decayed_weights(
    rate: optax.ScalarOrSchedule, mask: Callable[[optax.Params], Any] | None
) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` whose sums of finite numbers are finite."""
    tx = optax.add_decayed_weights(rate)

    def held(total: jax.Array, g: jax.Array, p: jax.Array) -> jax.Array:
        within = clip(total, float(jnp.finfo(total.dtype).max))
        return jnp.where(jnp.isfinite(g) & jnp.isfinite(p), within, total)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params
    ) -> tuple[optax.Updates, optax.OptState]:
        sums, state = tx.update(updates, state, params)
        return jax.tree.map(
            functools.partial(by_parts, held), sums, updates, params
        ), state

    tx_held = optax.GradientTransformation(tx.init, update_fn)
    return tx_held if mask is None else optax.masked(tx_held, mask)


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    """`jax.tree.map`, where the first tree may have None for any leaf or tree."""
    return jax.tree.map(function, *trees, is_leaf=lambda x: x is None)
