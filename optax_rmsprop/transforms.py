"""The two denominators of RMSprop: root mean square, and standard deviation.

Where these differ from torch, optax, Keras and TensorFlow:

1. The centered variance is averaged itself. They average g² and subtract the squared
   mean: the same number in exact arithmetic, but it rounds below zero, and its root to
   NaN, once the gradient hardly changes.
2. Averages are kept in at least float32, for float16 and bfloat16 parameters too.
3. A gradient is clipped at half the root of the largest finite number (9e18 in
   float32), so that its square is finite and its step keeps its bound.
4. 0/0 is 0, also with eps=0. Its derivatives are finite, and the same in both modes.
5. Bias correction is a schedule of the decay, not a division of the state.
6. Real and imaginary parts are separate numbers (as in torch; optax averages |g|²).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from optax_rmsprop import _errors
from optax_rmsprop._chain import checked, each_leaf, full_like
from optax_rmsprop._errors import shown
from optax_rmsprop._numerics import Moment, by_parts, cast, clip, divide, largest


class ScaleByRmsState(NamedTuple):
    """State of `scale_by_rms`.

    Attributes:
      count: int32 scalar, the number of updates made (torch's `step`).
      nu: average of g², with the structure and shapes of the parameters (torch's
        `square_avg`). A complex leaf is the average of its real part's square and,
        as imaginary part, that of its imaginary part's square.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    nu: optax.Updates


class ScaleByStddevState(NamedTuple):
    """State of `scale_by_stddev`.

    Attributes:
      count: int32 scalar, the number of updates made (torch's `step`).
      mu: average of g, with the structure and shapes of the parameters (torch's
        `grad_avg`).
      var: variance of g about `mu`, likewise (torch's `square_avg - grad_avg²`).
        Complex leaves as in `ScaleByRmsState.nu`.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    mu: optax.Updates
    var: optax.Updates


@_errors.knows_foreign_names
def scale_by_rms(
    decay: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    *,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = False,
    bias_correction: bool = False,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Divide gradients by the root of their averaged square.

        nu <- decay * nu + (1 - decay) * g²
        u   = g / (√nu + eps)               with eps_in_sqrt: g / √(nu + eps)

    A coordinate with gradients of constant size comes out with magnitude 1, whatever
    that size; one that spikes, at most 1/√(1 - decay). With bias_correction, step t
    uses (1 - decay)/(1 - decayᵗ) in place of 1 - decay: the first update is then ±1.

    Args:
      decay: weight of the old average, in [0, 1); it remembers about 1/(1 - decay)
        updates. torch: `alpha`; Keras: `rho`.
      eps: added to the root, in [0, ∞), in the unit of the gradient. With eps_in_sqrt
        it is added to the square, in the square of that unit. torch: `eps`; Keras:
        `epsilon`.
      initial_scale: `nu` before the first update, in [0, ∞). torch and Keras start at
        0, TensorFlow 1 and timm's RMSpropTF at 1.
      eps_in_sqrt: whether eps goes under the root, as in TensorFlow, Keras and timm's
        RMSpropTF.
      bias_correction: whether to correct the average for its start at 0, as Adam does.
      accumulator_dtype: dtype of `nu`, float32 or (in 64-bit mode) float64. By default
        that of the parameter, but at least float32.

    Returns:
      A transformation whose state is `ScaleByRmsState`. Updates have the gradient's
      shape. Their dtype is the gradient's; where update is given parameters of another
      dtype, it is float32, or the wider of the two; that of a complex parameter is
      complex. A gradient that is None leaves its part of the state as it is, and its
      parameter unread.

    Raises:
      TypeError: a number or option of the wrong kind; parameters that are not floating
        point or complex; a state in less than float32.
      ValueError: a number out of its range; initial_scale with bias_correction; an
        unsupported accumulator_dtype; updates or a state that do not belong together; a
        negative count.

    Example:
      >>> import jax.numpy as jnp, optax_rmsprop
      >>> tx = optax_rmsprop.scale_by_rms(decay=0.75)
      >>> g = jnp.array([1e-3, 1e3])
      >>> updates, state = tx.update(g, tx.init(g))
      >>> updates  # 1/√(1 - decay), but for eps
      Array([1.99996, 2.     ], dtype=float32)

    Differs from `optax.scale_by_rms`: torch's defaults (optax has decay=0.9 and eps
    under the root); the state always has `count`; and see the head of this module.

    References:
      Hinton, Neural Networks for Machine Learning, lecture 6e, 2012.
      torch/optim/rmsprop.py (2.13.0), `_single_tensor_rmsprop`.
    """
    inner = rms(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction, accumulator_dtype
    )
    return checked(inner)


@_errors.knows_foreign_names
def scale_by_stddev(
    decay: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    *,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = False,
    bias_correction: bool = False,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Divide gradients by their averaged standard deviation ("centered" RMSprop).

        mu  <- decay * mu + (1 - decay) * g
        var <- decay * var + (1 - decay)/decay * (g - mu)²      mu is the new mean
        u    = g / (√var + eps)             with eps_in_sqrt: g / √(var + eps)

    `var` equals torch's `square_avg - grad_avg²` in exact arithmetic, and cannot become
    negative. A steady gradient has no variance: its denominator tends to eps and its
    step grows towards g/eps. Choose eps large: DQN had 0.01 under the root, which is
    0.1 outside. In float32 the mean comes to rest at about |g| * 6e-8/(1 - decay) from
    the gradient, and so does √var. With bias_correction the first update is g/eps, for
    the same reason.

    Args:
      decay: weight of the old averages, in (0, 1); they remember about 1/(1 - decay)
        updates. torch: `alpha`; Keras: `rho`; in the DQN paper "gradient momentum" and
        "squared gradient momentum".
      eps: added to the root, in [0, ∞), in the unit of the gradient. With eps_in_sqrt
        it is added to the variance, in the square of that unit.
      initial_scale: `var` before the first update, in [0, ∞). `mu` starts at 0.
      eps_in_sqrt: whether eps goes under the root, as in TensorFlow, Keras, DQN and
        timm's RMSpropTF.
      bias_correction: whether to correct both averages for their start at 0.
      accumulator_dtype: dtype of `mu` and `var`, float32 or (in 64-bit mode) float64.
        By default that of the parameter, but at least float32.

    Returns:
      A transformation whose state is `ScaleByStddevState`. Its updates are as those of
      `scale_by_rms`, also where a gradient is None.

    Raises:
      TypeError, ValueError: as `scale_by_rms`.

    Example:
      >>> import jax.numpy as jnp, optax_rmsprop
      >>> tx = optax_rmsprop.scale_by_stddev(decay=0.5, eps=0)
      >>> g = jnp.array([1e-3, 1e3])
      >>> updates, state = tx.update(g, tx.init(g))
      >>> updates  # 1/√(decay * (1 - decay))
      Array([2., 2.], dtype=float32)

    Differs from `optax.scale_by_stddev`: torch's defaults (optax has decay=0.9 and eps
    under the root); the state has `count` and `var` in place of `nu`; and see the head
    of this module.

    References:
      Graves, Generating Sequences With Recurrent Neural Networks, eq. 38-45,
      arXiv:1308.0850.
      torch/optim/rmsprop.py (2.13.0), `_single_tensor_rmsprop`.
    """
    inner = stddev(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction, accumulator_dtype
    )
    return checked(inner)


def rms(
    decay: ArrayLike,
    eps: ArrayLike,
    initial_scale: ArrayLike,
    eps_in_sqrt: bool,
    bias_correction: bool,
    accumulator_dtype: DTypeLike | None,
) -> optax.GradientTransformation:
    """`scale_by_rms` as a part of a chain, for `checked`."""
    decay = _errors.number("decay", decay, high=1, hint=" (torch calls it alpha)")
    eps, initial_scale = _check_shared(
        eps, initial_scale, eps_in_sqrt, bias_correction, accumulator_dtype
    )

    def init_fn(params: optax.Params) -> ScaleByRmsState:
        nu = full_like(params, initial_scale, accumulator_dtype)
        return ScaleByRmsState(jnp.zeros([], jnp.int32), nu)

    def update_fn(
        updates: optax.Updates, state: ScaleByRmsState, params: Any = None
    ) -> tuple[optax.Updates, ScaleByRmsState]:
        count = optax.safe_increment(state.count)
        d, a = _averaging_weights(decay, count, bias_correction)
        leaf = functools.partial(_rms_leaf, eps_in_sqrt, d, a, eps)
        updates, nu = each_leaf(leaf, updates, state.nu)
        return updates, ScaleByRmsState(count, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def stddev(
    decay: ArrayLike,
    eps: ArrayLike,
    initial_scale: ArrayLike,
    eps_in_sqrt: bool,
    bias_correction: bool,
    accumulator_dtype: DTypeLike | None,
) -> optax.GradientTransformation:
    """`scale_by_stddev` as a part of a chain, for `checked`."""
    why = " (torch calls it alpha); at 0 the mean is the gradient and the variance 0"
    decay = _errors.number("decay", decay, high=1, zero=False, hint=why)
    eps, initial_scale = _check_shared(
        eps, initial_scale, eps_in_sqrt, bias_correction, accumulator_dtype
    )

    def init_fn(params: optax.Params) -> ScaleByStddevState:
        mu = full_like(params, 0.0, accumulator_dtype)
        var = full_like(params, initial_scale, accumulator_dtype)
        return ScaleByStddevState(jnp.zeros([], jnp.int32), mu, var)

    def update_fn(
        updates: optax.Updates, state: ScaleByStddevState, params: Any = None
    ) -> tuple[optax.Updates, ScaleByStddevState]:
        count = optax.safe_increment(state.count)
        d, a = _averaging_weights(decay, count, bias_correction)
        leaf = functools.partial(_stddev_leaf, eps_in_sqrt, d, a, eps)
        updates, mu, var = each_leaf(leaf, updates, state.mu, state.var)
        return updates, ScaleByStddevState(count, mu, var)

    return optax.GradientTransformation(init_fn, update_fn)


# The update of a leaf is one compiled function. Where the whole update is not compiled,
# it is one call in place of a dozen. Where it is, all leaves of a shape share a trace,
# and XLA inlines it. d and a are the weights of the old average and of the new value.
#
# A new average is made of its own old value and of the NEW values of other slots only.
# With g - mu_old in both mean and variance, as textbooks have it, XLA on CPU copies
# whole arrays, and the step takes 2.2 times as long.


@functools.partial(jax.jit, static_argnums=0)
def _rms_leaf(
    eps_in_sqrt: bool,
    d: ArrayLike,
    a: ArrayLike,
    eps: ArrayLike,
    g: jax.Array,
    nu: jax.Array,
) -> tuple[jax.Array, ...]:
    def update(g: jax.Array, nu: jax.Array) -> tuple[jax.Array, ...]:
        decay, weight = jnp.asarray(d, g.dtype), jnp.asarray(a, g.dtype)
        new_nu = Moment.of(decay, nu, weight, g, weight * largest(g.dtype) ** 2)
        return divide(g, new_nu, eps, eps_in_sqrt), new_nu.value

    return by_parts(update, cast(g, nu.dtype), nu)


@functools.partial(jax.jit, static_argnums=0)
def _stddev_leaf(
    eps_in_sqrt: bool,
    d: ArrayLike,
    a: ArrayLike,
    eps: ArrayLike,
    g: jax.Array,
    mu: jax.Array,
    var: jax.Array,
) -> tuple[jax.Array, ...]:
    def update(g: jax.Array, mu: jax.Array, var: jax.Array) -> tuple[jax.Array, ...]:
        decay, weight = jnp.asarray(d, g.dtype), jnp.asarray(a, g.dtype)
        # Clipping g itself would share an expression with `divide`: see _numerics.
        mu = decay * mu + clip(weight * g, largest(g.dtype))
        # decay is 0 in the first bias-corrected update: then mu = g, and var is 0.
        above_0 = jnp.where(decay > jnp.finfo(g.dtype).tiny, decay, 1)
        most = weight * largest(g.dtype) ** 2
        new_var = Moment.of(decay, var, weight / above_0, g - mu, most)
        return divide(g, new_var, eps, eps_in_sqrt), mu, new_var.value

    return by_parts(update, cast(g, mu.dtype), mu, var)


def _check_shared(
    eps: ArrayLike,
    initial_scale: ArrayLike,
    eps_in_sqrt: bool,
    bias_correction: bool,
    accumulator_dtype: DTypeLike | None,
) -> tuple[ArrayLike, ArrayLike]:
    eps = _errors.number("eps", eps)
    initial_scale = _errors.number("initial_scale", initial_scale)
    _errors.flags(eps_in_sqrt=eps_in_sqrt, bias_correction=bias_correction)
    _check_accumulator_dtype(accumulator_dtype)
    traced = isinstance(initial_scale, Tracer)
    if bias_correction and not traced and np.any(initial_scale):
        raise ValueError(
            f"`initial_scale` must be 0 with bias_correction, got {initial_scale}; "
            "the correction takes the initial value out again: choose one of them"
        )
    return eps, initial_scale


def _check_accumulator_dtype(dtype: Any) -> None:
    """Check that a dtype is None, float32, or float64 in 64-bit mode."""
    if isinstance(dtype, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"`accumulator_dtype` must be a dtype, got {shown(dtype)}"
            + _errors.STATIC_ARGS.format("accumulator_dtype")
        )
    if dtype is None:
        return
    allowed = sorted({"float32", jax.dtypes.canonicalize_dtype(jnp.float64).name})
    known = _errors.as_dtype(dtype)
    given = shown(dtype) if known is None else known.name
    if given not in allowed:
        why = "an average in fewer bits stops moving"
        if given == "float64":
            why = "jax.config.update('jax_enable_x64', True) allows it"
        raise ValueError(
            f"`accumulator_dtype` must be None or {' or '.join(allowed)}, got {given}; "
            + why
        )


def _averaging_weights(
    decay: ArrayLike, count: jax.Array, bias_correction: bool
) -> tuple[ArrayLike, ArrayLike]:
    """The weights (d, a) of the old average and of the new value at update `count`.

    They are decay and 1 - decay. The latter is formed before it is rounded to the
    state's dtype: 1 - float32(0.999) is off by 1e-5. With bias correction they are
    a = (1 - decay)/(1 - decayᵗ) and d = 1 - a at update t, and expm1 avoids the
    cancellation in 1 - decayᵗ.
    """
    a = 1 - decay
    if not bias_correction:
        return decay, a
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
    a, t = jnp.asarray(a, dtype), jnp.asarray(count, dtype)
    below_1 = 1 - float(jnp.finfo(dtype).eps)  # log(decay) is finite at decay = 0 too
    log_decay = jnp.log1p(-jnp.where(a < below_1, a, below_1))
    # Exactly 1 - decay at first, so that the first mean is the gradient.
    total = jnp.where(t == 1, a, -jnp.expm1(t * log_decay))
    a = a / total
    return 1 - a, a
