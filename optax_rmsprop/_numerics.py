"""Real arithmetic that stays finite, and keeps finite derivatives, in every dtype.

How XLA's CPU backend compiles these formulas decided their form (`benchmarks/step.py`
measures it): `jnp.minimum`, `jnp.clip` and `lax.clamp` cost three times the whole step
where a select is free; and a held gradient shared by the state and the update is
written out to memory, which doubles the step. So each use holds large values for
itself: `cap` after squaring, `clip` before dividing.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike


def largest(dtype: DTypeLike) -> float:
    """Half the root of the largest finite number: four such squares do not overflow."""
    return math.sqrt(float(jnp.finfo(dtype).max)) / 2


def clip(x: jax.Array, limit: float) -> jax.Array:
    """Hold |x| at `limit`."""
    return jnp.where(x > limit, limit, jnp.where(x < -limit, -limit, x))


def cap(square: jax.Array, fraction: ArrayLike = 1) -> jax.Array:
    """Hold a square at a fraction of the square of `largest`, even if it overflowed."""
    limit = largest(square.dtype) ** 2 * fraction
    return jnp.where(square > limit, limit, square)


def divide(
    g: jax.Array, moment: jax.Array, eps: ArrayLike, eps_in_sqrt: bool
) -> jax.Array:
    """g / (√moment + eps), or g / √(moment + eps); 0/0 is 0.

    A second epsilon (1e-35 in float32) keeps the root's derivative and the quotient
    finite at 0. It is lost in the rounding of every moment above 1e-27.
    """
    tiny = float(jnp.finfo(moment.dtype).tiny) * 2**10
    eps = jnp.asarray(eps, moment.dtype)
    above_0 = tiny + 0 * g  # NaN where g is infinite, which `clip` would hide
    if eps_in_sqrt:
        denominator = jnp.sqrt(moment + (eps + above_0))
    else:
        denominator = jnp.sqrt(moment + above_0) + eps
    return _quotient(clip(g, largest(g.dtype)), denominator)


@jax.custom_jvp
def _quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    return a / b


@_quotient.defjvp
def _quotient_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The rule of `/` but for its order: a * db overflows where a and b are huge."""
    (a, b), (da, db) = primals, tangents
    quotient = _quotient(a, b)
    return quotient, da / b - quotient * (db / b)


def accumulator_dtype_of(leaf: ArrayLike, real: DTypeLike | None = None) -> np.dtype:
    """The dtype in which to average a leaf: its own but at least float32, or `real`.

    A complex leaf has a complex average, its two parts in `real`.
    """
    dtype = jnp.result_type(leaf)
    if real is None:
        info = jnp.finfo(dtype)
        real = info.dtype if info.bits >= 32 else jnp.float32
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return np.result_type(real, np.complex64) if is_complex else np.dtype(real)


def update_dtype_of(g: ArrayLike, p: ArrayLike | None = None) -> np.dtype:
    """The dtype of an update: the gradient's, or one that holds the parameter's too."""
    dtype = jnp.result_type(g)
    if p is None or jnp.result_type(p) == dtype:
        return dtype
    return np.result_type(accumulator_dtype_of(g), accumulator_dtype_of(p))


def cast(x: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Convert to `dtype`, holding finite values within its range; infinity is NaN."""
    x = jnp.asarray(x)
    if x.dtype == dtype:
        return x
    limit = float(jnp.finfo(dtype).max)
    if limit < float(jnp.finfo(x.dtype).max):
        x = by_parts(lambda part: clip(part, limit) + 0 * part, x)
    return x.astype(dtype)


def product(*factors: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    """Of numbers and schedules, which makes it a schedule."""
    if any(map(callable, factors)):
        return lambda count: math.prod(f(count) if callable(f) else f for f in factors)
    return math.prod(factors)


def by_parts(formula: Callable[..., jax.Array], *leaves: Any) -> jax.Array:
    """Apply a formula for real numbers; if complex, to either part by itself."""
    if not jnp.iscomplexobj(leaves[0]):
        return formula(*leaves)
    real = formula(*(leaf.real for leaf in leaves))
    imag = formula(*(leaf.imag for leaf in leaves))
    return jax.lax.complex(real, imag)
