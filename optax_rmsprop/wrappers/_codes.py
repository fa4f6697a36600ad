"""Numbers as 8-bit codes with the shape of their array, and one exponent an array.

A magnitude |x| is rounded at random to one of the two integers next to

    k(x) = ((1 + |x|/2ᵉ)^λ - 1)/λ              so that k is the level
    x(k) = 2ᵉ((1 + λk)^(1/λ) - 1)

the transform of Box and Cox (1964): near 0 levels are 2ᵉ apart; further up, the larger
they are the finer they are, relative to themselves. A power is taken by shifting the
bits of the float (Blinn 1997), which makes k piecewise linear in x with corners at
levels only. So what is unbiased in k, between two levels, is unbiased in x.

An array is of one of three kinds, and which one is data, not program:

    kind           1/λ   code                     k            largest |x|/2ᵉ
    UNKNOWN        128   128 + k, or 128 - k      0 to 127      2¹²⁷
    NON_NEGATIVE     8   1 + k                    1 to 254      2⁴⁰
    SIGNED           8   128 + k, or 128 - k      0 to 127      2³²

A new array is UNKNOWN: its codes are little more than exponents, and hold numbers of
almost any size. The smallest and the largest code of a step tell the next one the kind
and e, with octaves to spare. So the scale comes a step late, and from one byte an
element: to read the new numbers twice would take twice the time. What is beyond the
range is held at its end. Code 0 is NaN. NON_NEGATIVE rounds only negative numbers to
0: a second moment that was rounded to it would lengthen the step.

The formulas have few operations, since the TPU's compiler makes one loop of a step, and
reads and writes every array once, only as long as they are few
(`benchmarks/small_state_cost.py`).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from optax_rmsprop._numerics import cast
from optax_rmsprop.wrappers._rounding import ONE, bits_of, from_bits, random_bits

UNKNOWN, NON_NEGATIVE, SIGNED = 0, 1, 2
NAN = 0
WINDOWS = -62, -126  # the exponents with which UNKNOWN looks for numbers, in turn


class Format(NamedTuple):
    """What the codes of arrays mean: vectors with an entry an array.

    Attributes:
      kind: int32, as in the table above, from 0 on.
      exponent: int32, e.
    """

    kind: jax.Array
    exponent: jax.Array


@functools.partial(jax.jit, static_argnums=2, inline=True)
def decode(codes: jax.Array, of: Format, dtype: DTypeLike) -> jax.Array:
    """The numbers that the codes of one array stand for."""
    code = codes.astype(jnp.float32)
    signed = code - _zero(of).astype(jnp.float32)
    x = _power(jnp.abs(signed) + _inverse(of), of) - _power_of_two(of.exponent)
    x = jnp.where(signed < 0, -x, x)
    return cast(jnp.where(code == NAN, jnp.nan, x), dtype)


@functools.partial(jax.jit, inline=True)
def encode(
    x: jax.Array, to: Format, words: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes for the numbers of one array, the smallest code and the largest."""
    x = cast(x, jnp.float32)
    magnitude, minus = jnp.abs(x), -(x < 0).astype(jnp.int32)
    # k + 2⁸, a float whose bits are those of k with 15 binary places.
    v = _root(1 + magnitude * _power_of_two(-to.exponent), to) + (2.0**8 - _inverse(to))
    k = ((bits_of(v) + random_bits(x.shape, 15, words)) >> 15) - (127 + 8 << 8)
    code = (k ^ minus) - minus + _zero(to)
    # At least 1, and 2 for what is not negative: so NON_NEGATIVE does not make it 0.
    code = jnp.minimum(jnp.maximum(code, 2 + minus), 255)
    codes = jnp.where(magnitude < jnp.inf, code, NAN).astype(jnp.uint8)
    # Of float32 numbers a TPU finds the extremes while it writes the codes, and a CPU
    # of bytes in a fifth of the time.
    lowest, highest = jax.lax.platform_dependent(
        codes, cpu=_extremes, default=lambda codes: _extremes(codes.astype(jnp.float32))
    )
    return codes, lowest, highest


def _extremes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(x).astype(jnp.int32), jnp.max(x).astype(jnp.int32)


def first_format(lowest: jax.Array, highest: jax.Array) -> Format:
    """For arrays whose extreme numbers are known."""
    largest = jnp.maximum(-lowest, highest)
    kind = jnp.where(lowest < 0, SIGNED, NON_NEGATIVE).astype(jnp.int32)
    exponent = _exponent(kind, _octave(largest))
    empty = ~(largest > 0)  # or NaN
    kind = jnp.where(empty, UNKNOWN, kind)
    return Format(kind, jnp.where(empty, WINDOWS[1], exponent))


def next_format(last: Format, lowest: jax.Array, highest: jax.Array) -> Format:
    """For the numbers that come after those with these extreme codes."""
    above, below = highest - _zero(last), _zero(last) - lowest
    k = jnp.maximum(above, _by_kind(last.kind, below, 0, below))
    # NON_NEGATIVE has its zero where a number was negative.
    negative = _by_kind(last.kind, below > 0, below == 0, True) > 0
    missed = (last.kind == UNKNOWN) & (last.exponent == WINDOWS[1]) & (k == 127)
    nothing = (k <= _by_kind(last.kind, 0, 1, 0)) | missed
    kind = jnp.where(negative, SIGNED, NON_NEGATIVE).astype(jnp.int32)
    kind = jnp.where(nothing, UNKNOWN, kind)
    octave = _octave(_power(k.astype(jnp.float32) + _inverse(last), last))
    spare = _octaves(kind) + last.exponent - octave
    keep = (spare >= 3) & (spare <= 7)
    exponent = jnp.where(keep, last.exponent, _exponent(kind, octave))
    is_nan = lowest == NAN  # which tells nothing of the other numbers
    kind = jnp.where(is_nan, last.kind, kind)
    exponent = jnp.where(is_nan, last.exponent, exponent)
    window = jnp.where(last.exponent == WINDOWS[0], WINDOWS[1], WINDOWS[0])
    return Format(kind, jnp.where(kind == UNKNOWN, window, exponent))


def _exponent(kind: jax.Array, octave: jax.Array) -> jax.Array:
    """That which leaves five octaves above the largest number, where float32 can."""
    return jnp.clip(octave + 5 - _octaves(kind), -126, 127 - _octaves(kind))


def _octave(x: jax.Array) -> jax.Array:
    """⌊log₂ x⌋."""
    return (bits_of(x) >> 23) - 127


def _octaves(kind: jax.Array) -> jax.Array:
    return _by_kind(kind, 127, 40, 32)


def _zero(format: Format) -> jax.Array:
    """The code of 0."""
    return _by_kind(format.kind, 128, 1, 128)


def _shift(format: Format) -> jax.Array:
    return _by_kind(format.kind, 7, 3, 3)


def _inverse(format: Format) -> jax.Array:
    """1/λ."""
    return _power_of_two(_shift(format))


def _root(y: jax.Array, format: Format) -> jax.Array:
    """y^λ/λ, piecewise linear."""
    shift = _shift(format)
    return from_bits((bits_of(y) >> shift) + (ONE - (ONE >> shift) + (shift << 23)))


def _power(v: jax.Array, format: Format) -> jax.Array:
    """2ᵉ(λv)^(1/λ), the inverse of `_root` in units of 2ᵉ."""
    shift = _shift(format)
    inverse = ONE + (shift << 23)  # its bits
    offset = ONE - (inverse << shift) + (format.exponent << 23)
    return from_bits((bits_of(v) << shift) + offset)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return from_bits(ONE + (exponent << 23))


def _by_kind(kind: jax.Array, *values: ArrayLike) -> jax.Array:
    unknown, non_negative, signed = (jnp.asarray(x, jnp.int32) for x in values)
    known = jnp.where(kind == NON_NEGATIVE, non_negative, signed)
    return jnp.where(kind == UNKNOWN, unknown, known)
