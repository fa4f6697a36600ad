"""Real arithmetic that stays finite, and keeps finite derivatives, in every dtype.

How XLA's CPU backend compiles these formulas decided their form (`benchmarks/step.py
--check` shows whether a change slows the step). `jnp.minimum`, `jnp.clip` and
`lax.clamp` took three times as long as the whole step, where a select is free. A
clipped gradient that the state and the update share is written out to memory, which
doubles the step. So each use clips for itself: `Moment` after squaring, `divide` before
dividing.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike


def largest(dtype: DTypeLike) -> float:
    """Half the root of the largest finite number: four such squares do not overflow."""
    return math.sqrt(float(jnp.finfo(dtype).max)) / 2


def where(mask: jax.Array, number: ArrayLike, x: jax.Array) -> jax.Array:
    """`jnp.where` for a number and an array, without a function of its own to trace."""
    return jax.lax.select(mask, jax.lax.full_like(x, number), x)


def clip(x: jax.Array, limit: float) -> jax.Array:
    """Clip x to [-limit, limit]. NaN stays."""
    return jax.lax.select(abs(x) > limit, limit * jax.lax.sign(x), x)


class Moment(NamedTuple):
    """A second moment and its parts: decay * old + min(weight * x², most).

    `divide` needs the parts for its derivatives.
    """

    decay: jax.Array
    old: jax.Array
    weight: jax.Array
    x: jax.Array
    most: ArrayLike
    value: jax.Array

    @classmethod
    def of(
        cls,
        decay: jax.Array,
        old: jax.Array,
        weight: jax.Array,
        x: jax.Array,
        most: ArrayLike,
    ) -> "Moment":
        # As weight * (x * x), it could have an infinite derivative by the weight.
        increment = weight * x * x
        increment = where(increment > most, most, increment)
        return cls(decay, old, weight, x, most, decay * old + increment)

    @property
    def is_clipped(self) -> jax.Array:
        return self.weight * self.x * self.x > self.most

    @property
    def free_x(self) -> jax.Array:
        """x where the moment depends on it, else 0."""
        return where(self.is_clipped, 0, self.x)


def divide(
    g: jax.Array, moment: Moment, eps: ArrayLike, eps_in_sqrt: bool
) -> jax.Array:
    """g / (√moment + eps), or g / √(moment + eps); 0/0 is 0.

    A second epsilon (1e-35 in float32) keeps the root's derivative and the quotient
    finite at 0. It is lost in the rounding of every moment above 1e-27. And 2⁻¹⁰⁰ |g|
    in the denominator keeps the quotient below 2¹⁰⁰ (1e30): momentum can add 2²⁵ of
    them without an overflow. It is lost in the rounding of every quotient below 1e22.
    """
    g = clip(g, largest(g.dtype)) + (g - g)  # NaN where g is infinite
    return _quotient(eps_in_sqrt, g, moment, jnp.asarray(eps, g.dtype))


# Differentiated by the usual rules, the quotient passes the moment a cotangent of
# -g / (2 * root * denominator²), which overflows where the root is small and g is not.
# A deviation x of 0 has no influence on the moment, but infinity times 0 is NaN. So the
# derivatives are formed as products that are finite, in which x stands beside the root:
# |x| / root is at most 1/√weight. Reverse mode multiplies by the same numbers as
# forward mode.
#
# All such products are terms of one kind, and so are the derivatives of terms. With
#
#     term(i, j, m, n) = gⁱ (x/root)ʲ / (denominatorᵐ rootⁿ)
#     d root = (weight * x * dx + (old * d decay + ...) / 2) / root
#
# `_tangent` is the rule of powers. It keeps the derivatives of any order finite.

Powers = tuple[int, int, int, int]
Arguments = tuple[jax.Array, Moment, jax.Array]  # g, moment, eps


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _quotient(
    eps_in_sqrt: bool, g: jax.Array, moment: Moment, eps: jax.Array
) -> jax.Array:
    return _value((1, 0, 1, 0), eps_in_sqrt, (g, moment, eps))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _term(
    powers: Powers, eps_in_sqrt: bool, g: jax.Array, moment: Moment, eps: jax.Array
) -> jax.Array:
    """A clipped term, whose derivatives are clipped too.

    `lax.scan` forgets the rule below when it is differentiated in reverse mode, and
    then differentiates this body for second derivatives. So the body has the same
    first derivatives by itself: those of a linear function of differences that are 0.
    """
    arguments = g, moment, eps
    constants = jax.lax.stop_gradient(arguments)
    differences = jax.tree.map(jnp.subtract, arguments, constants)

    def clipped(i: int, j: int, m: int, n: int) -> jax.Array:
        value = _value((i, j, m, n), eps_in_sqrt, constants)
        return clip(value, _room(value.dtype))

    linear = _tangent(clipped, powers, eps_in_sqrt, constants, differences)
    return clipped(*powers) + linear


@_quotient.defjvp
def _quotient_jvp(
    eps_in_sqrt: bool, arguments: Arguments, tangents: Arguments
) -> tuple[jax.Array, jax.Array]:
    term = lambda *powers: _term(powers, eps_in_sqrt, *arguments)  # noqa: E731
    tangent = _tangent(term, (1, 0, 1, 0), eps_in_sqrt, arguments, tangents)
    return _quotient(eps_in_sqrt, *arguments), tangent


@_term.defjvp
def _term_jvp(
    powers: Powers, eps_in_sqrt: bool, arguments: Arguments, tangents: Arguments
) -> tuple[jax.Array, jax.Array]:
    term = lambda *powers: _term(powers, eps_in_sqrt, *arguments)  # noqa: E731
    tangent = _tangent(term, powers, eps_in_sqrt, arguments, tangents)
    return term(*powers), tangent


def _value(powers: Powers, eps_in_sqrt: bool, arguments: Arguments) -> jax.Array:
    (i, j, m, n), (g, moment, eps) = powers, arguments
    above_0 = float(jnp.finfo(g.dtype).tiny) * 2**10
    least = abs(g) * (1 / _room(g.dtype))
    if eps_in_sqrt:
        root = jnp.sqrt(moment.value + (eps + above_0))
        denominator = root + least
    else:
        root = jnp.sqrt(moment.value + above_0)
        denominator = root + (eps + least)
    value = (g if i else 1) / denominator
    # Factor by factor: powers of 1 / root may be infinite where the product is not. No
    # quotient is divided again: XLA would multiply the divisors, which may give 0.
    for _ in range(j):
        value *= moment.free_x / root
    for _ in range(m - 1):
        value *= 1 / denominator
    for _ in range(n):
        value *= 1 / root
    return value


def _tangent(
    term: Callable[..., jax.Array],
    powers: Powers,
    eps_in_sqrt: bool,
    arguments: Arguments,
    tangents: Arguments,
) -> jax.Array:
    (i, j, m, n), (_, moment, _), (dg, d, deps) = powers, arguments, tangents
    clipped, free_x = moment.is_clipped, moment.free_x
    d_increment = d.weight * (free_x * free_x)
    d_moment = d.decay * moment.old + moment.decay * d.old
    d_moment += jnp.where(clipped, d.most, d_increment)
    dx = jnp.where(clipped, 0, d.x)
    by_root_x = (j + n) * term(i, j + 1, m, n + 1) + m * term(i, j + 1, m + 1, n)
    by_moment = (j + n) * term(i, j, m, n + 2) + m * term(i, j, m + 1, n + 1)
    tangent = -by_root_x * moment.weight * dx - by_moment * (d_moment / 2)
    if i:
        tangent += term(i - 1, j, m, n) * dg
    if j:
        tangent += j * term(i, j - 1, m, n + 1) * dx
    if eps_in_sqrt:
        tangent -= by_moment * (deps / 2)
    else:
        tangent -= m * term(i, j, m + 1, n) * deps
    return tangent


def _room(dtype: DTypeLike) -> float:
    """A limit that leaves 28 bits for sums and for factors: 2¹⁰⁰ in float32."""
    return 2.0 ** (jnp.finfo(dtype).maxexp - 28)


def accumulator_dtype_of(leaf: ArrayLike, real: DTypeLike | None = None) -> np.dtype:
    """The dtype in which to average a leaf: its own but at least float32, or `real`.

    A complex leaf has a complex average, its two parts in `real`.
    """
    dtype = _dtype_of(leaf)
    if real is None:
        info = jnp.finfo(dtype)
        real = info.dtype if info.bits >= 32 else jnp.float32
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return np.result_type(real, np.complex64) if is_complex else np.dtype(real)


def update_dtype_of(g: ArrayLike, p: ArrayLike | None = None) -> np.dtype:
    """The dtype of an update: the gradient's, or with the parameter's precision too."""
    dtype = _dtype_of(g)
    if p is None or _dtype_of(p) == dtype:
        return dtype
    return np.result_type(accumulator_dtype_of(g), accumulator_dtype_of(p))


def _dtype_of(x: ArrayLike) -> np.dtype:
    return x.dtype if isinstance(x, jax.Array) else jnp.result_type(x)


def cast(x: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Convert to `dtype`, to a complex one if x is complex.

    Finite values are clipped to its range; infinity becomes NaN if it has less range.
    """
    if isinstance(x, jax.Array) and x.dtype == dtype:
        return x
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        dtype = np.result_type(dtype, np.complex64)
    if x.dtype == dtype:
        return x
    if float(jnp.finfo(dtype).max) < float(jnp.finfo(x.dtype).max):
        x = within_range(x, dtype, x)
    return x.astype(dtype)


def within_range(total: jax.Array, dtype: DTypeLike, *terms: jax.Array) -> jax.Array:
    """Clip a sum to the range of `dtype`; it is NaN where a term is infinite."""
    limit = float(jnp.finfo(dtype).max)

    def clipped(total: jax.Array, *terms: jax.Array) -> jax.Array:
        return clip(total, limit) + sum(0 * term.astype(total.dtype) for term in terms)

    return by_parts(clipped, total, *terms)


def product(*factors: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    """Multiply numbers and schedules; the product with a schedule is a schedule."""
    if any(map(callable, factors)):
        return lambda count: math.prod(f(count) if callable(f) else f for f in factors)
    return math.prod(factors)


def by_parts(formula: Callable[..., Any], *leaves: Any) -> Any:
    """Apply a formula for real numbers; if complex, to either part by itself.

    It returns an array, or a tuple of them.
    """
    if not jnp.iscomplexobj(leaves[0]):
        return formula(*leaves)
    real = formula(*(leaf.real for leaf in leaves))
    imag = formula(*(leaf.imag for leaf in leaves))
    return jax.tree.map(jax.lax.complex, real, imag)
