"""8-bit codes for the numbers of an array, with one exponent for the whole array.

The magnitude of a number x is stored as an integer level k. Levels and numbers are
related by the transform of Box and Cox (1964), with an exponent e for the array:

    k(x) = ((1 + |x|/2ᵉ)^λ - 1)/λ
    x(k) = 2ᵉ((1 + λk)^(1/λ) - 1)

Levels near 0 are 2ᵉ apart. Further up, their distance grows with x, and grows less than
x itself: the larger a number is, the smaller is its relative rounding error. `encode`
rounds k(x), up or down at random, so that the mean of the result is k(x).

The power is not exact: it is computed from the bits of the float (`_power` below, after
Blinn 1997). This makes k(x) a straight line between neighbouring levels, so rounding
that is unbiased in k is unbiased in x too. With λ = 1/8 and e = 0 the first levels are

    k     0   1   2   3    4    5    6    7     8     9    10    11     12
    x(k)  0   1   3   7   15   31   63  127   255   383   511   767   1023

where exact powers would give x(2) = 4.96. The number 5 lies halfway between 3 and 7. So
k(5) = 2.5, and 5 is stored as 3 or as 7, each with probability 1/2. The mean is 5.

There are three kinds of codes. The kind and the exponent of each array are part of the
state, and change from step to step without a new compilation:

    kind           1/λ   code                     k            largest |x|/2ᵉ
    UNKNOWN        128   128 + k, or 128 - k      0 to 127      2¹²⁷
    NON_NEGATIVE     8   1 + k                    1 to 254      2⁴⁰
    SIGNED           8   128 + k, or 128 - k      0 to 127      2³²

128 - k is the code of a negative number, and code 0 is NaN. NON_NEGATIVE has k = 0 for
negative numbers alone: a second moment that was rounded to 0 would lengthen the step.

An array of zeros is UNKNOWN, because the size of its next numbers is not known. Levels
of this kind are a factor of 2 apart, and cover almost all sizes. From the smallest and
the largest code of a step, `next_format` finds the kind and the exponent for the next
step, with room for numbers to grow by a factor of 4 or more. The format is thus a step
late. To find the largest number first, and to encode in a second pass, would take twice
the time. A number beyond the range gets the last level.

The formulas have few operations because the TPU's compiler makes one loop of a step,
which reads and writes every array once, only if they are few
(`benchmarks/small_state_cost.py`).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from optax_rmsprop._numerics import cast
from optax_rmsprop.wrappers._rounding import (
    EXPONENT_BIAS,
    MANTISSA_BITS,
    ONE,
    bits_of,
    from_bits,
    random_bits,
)

UNKNOWN, NON_NEGATIVE, SIGNED = 0, 1, 2  # kinds
NAN = 0  # a code
LAST = 255  # the largest code

# UNKNOWN looks for numbers with these two exponents in turn. The first covers 2⁻⁶² to
# 2⁶⁵, the second 2⁻¹²⁶ to 2.
WINDOWS = -62, -126

# `encode` adds 2⁸ to k. All floats in [2⁸, 2⁹) have the same exponent, so that their
# mantissa is a fixed-point number: 8 bits for the integer k, 15 for its fraction.
LEVEL_BITS = 8
FRACTION_BITS = MANTISSA_BITS - LEVEL_BITS

# An exponent is chosen such that numbers may grow by this many octaves, and it is kept
# while between LEAST_SPARE and MOST_SPARE of them are left.
SPARE, LEAST_SPARE, MOST_SPARE = 5, 3, 7


class Format(NamedTuple):
    """The meaning of the codes of several arrays: vectors with an entry for each array.

    Attributes:
      kind: int32, UNKNOWN, NON_NEGATIVE or SIGNED.
      exponent: int32, e in the formulas above.
    """

    kind: jax.Array
    exponent: jax.Array


@functools.partial(jax.jit, static_argnums=2, inline=True)
def decode(codes: jax.Array, format: Format, dtype: DTypeLike) -> jax.Array:
    """Return the numbers that the codes of one array stand for.

    With NON_NEGATIVE and e = 0, code 4 is k = 3: `_power` gives 8 for k + 1/λ = 11, and
    the number is 8 - 2ᵉ = 7.
    """
    code = codes.astype(jnp.float32)
    signed_k = code - _code_of_0(format).astype(jnp.float32)
    power = _power(jnp.abs(signed_k) + _inverse_of_lambda(format), format)
    magnitude = power - _power_of_two(format.exponent)
    x = jnp.where(signed_k < 0, -magnitude, magnitude)
    return cast(jnp.where(code == NAN, jnp.nan, x), dtype)


@functools.partial(jax.jit, inline=True)
def encode(
    x: jax.Array, format: Format, axis_bits: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return codes for the numbers of one array, the smallest code and the largest.

    `axis_bits` is an entry of `random_axis_bits`. An example with NON_NEGATIVE, e = 0
    and x = 5: `_root(6)` is k + 1/λ = 10.5. With 2⁸ - 1/λ = 248 added it is 258.5,
    whose bits are 0x43814000. The upper 17 bits, 0x8702, are the exponent of 2⁸, which
    is 0x87, and 02 for k. The lower 15 bits, 0x4000, are half of 2¹⁵. A random number
    in [0, 2¹⁵) is added, and carries into the upper bits in half of all cases. So k is
    2 or 3, and the code 3 or 4.
    """
    x = cast(x, jnp.float32)
    # -1 where x is negative, else 0. (i ^ minus) - minus is then -i, or i.
    magnitude, minus = jnp.abs(x), -(x < 0).astype(jnp.int32)
    root = _root(1 + magnitude * _power_of_two(-format.exponent), format)
    shifted_k = root + (2.0**LEVEL_BITS - _inverse_of_lambda(format))
    bits = bits_of(shifted_k) + random_bits(x.shape, FRACTION_BITS, axis_bits)
    k = (bits >> FRACTION_BITS) - (EXPONENT_BIAS + LEVEL_BITS << LEVEL_BITS)
    code = (k ^ minus) - minus + _code_of_0(format)
    # At least 1, since 0 is NaN, and at least 2 where x is not negative. The latter
    # matters for NON_NEGATIVE, in which 1 is the code of 0.
    code = jnp.minimum(jnp.maximum(code, 2 + minus), LAST)
    codes = jnp.where(magnitude < jnp.inf, code, NAN).astype(jnp.uint8)
    lowest, highest = jax.lax.platform_dependent(
        codes,
        cpu=_extremes,
        tpu=_extremes_of_floats,
        default=_extremes_in_one_reduction,
    )
    return codes, lowest, highest


def _extremes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(x).astype(jnp.int32), jnp.max(x).astype(jnp.int32)


def _extremes_of_floats(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A TPU finds these while it writes the codes. A CPU would take 5 times as long."""
    return _extremes(codes.astype(jnp.float32))


def _extremes_in_one_reduction(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """On a GPU two reductions end with a kernel each. A CPU would not vectorize one."""

    def both(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])

    code, axes = codes.astype(jnp.int32), tuple(range(codes.ndim))
    start = jnp.int32(255), jnp.int32(0)
    lowest, highest = jax.lax.reduce((code, code), start, both, axes)
    return lowest, highest


def first_format(lowest: jax.Array, highest: jax.Array) -> Format:
    """Return the format for arrays whose smallest and largest numbers are known.

    An array from 0 to 3 is NON_NEGATIVE. The octave of 3 is 1, since 3 lies in [2, 4).
    The exponent -34 puts the end of the range at 2⁻³⁴ * 2⁴⁰ = 2⁶, five octaves above 2.
    """
    largest = jnp.maximum(-lowest, highest)
    kind = jnp.where(lowest < 0, SIGNED, NON_NEGATIVE).astype(jnp.int32)
    exponent = _exponent_for(kind, _octave(largest))
    unknown = ~(largest > 0)  # all numbers are 0, or there is a NaN
    kind = jnp.where(unknown, UNKNOWN, kind)
    return Format(kind, jnp.where(unknown, WINDOWS[1], exponent))


def next_format(last: Format, lowest: jax.Array, highest: jax.Array) -> Format:
    """Return the format for the step after one whose extreme codes are given.

    An example: an array of 0 and 3 was encoded as UNKNOWN with e = -62. Its codes are
    128, for 0, and 192, for k = 64. `_power` gives 2² for that level: octave 2. No code
    is below 128, so the next kind is NON_NEGATIVE, and its exponent 2 + 5 - 40 = -33.
    With this format the codes are 2, since 0 becomes the smallest level, and 161, for
    k = 160. That level is in octave 1. The end of the range, 2⁻³³ * 2⁴⁰ = 2⁷, is six
    octaves further up, so the format stays.
    """
    above, below = highest - _code_of_0(last), _code_of_0(last) - lowest
    # The largest level. NON_NEGATIVE has no negative ones, so `below` is none there.
    k = jnp.maximum(above, _by_kind(last.kind, below, 0, below))
    # NON_NEGATIVE has encoded negative numbers as 0. SIGNED stays as it is.
    negative = _by_kind(last.kind, below > 0, below == 0, True) > 0
    # The last level of the window up to 2 stands for all larger numbers too.
    beyond = (last.kind == UNKNOWN) & (last.exponent == WINDOWS[1]) & (k == 127)
    # No number was above the smallest level, which is 1 for NON_NEGATIVE.
    unknown = (k <= _by_kind(last.kind, 0, 1, 0)) | beyond
    kind = jnp.where(negative, SIGNED, NON_NEGATIVE).astype(jnp.int32)
    kind = jnp.where(unknown, UNKNOWN, kind)
    octave = _octave(_power(k.astype(jnp.float32) + _inverse_of_lambda(last), last))
    spare = _octaves(kind) + last.exponent - octave
    keep = (spare >= LEAST_SPARE) & (spare <= MOST_SPARE)
    exponent = jnp.where(keep, last.exponent, _exponent_for(kind, octave))
    # A NaN is the smallest code, and hides the smallest of the other numbers.
    is_nan = lowest == NAN
    kind = jnp.where(is_nan, last.kind, kind)
    exponent = jnp.where(is_nan, last.exponent, exponent)
    window = jnp.where(last.exponent == WINDOWS[0], WINDOWS[1], WINDOWS[0])
    return Format(kind, jnp.where(kind == UNKNOWN, window, exponent))


def _exponent_for(kind: jax.Array, octave: jax.Array) -> jax.Array:
    """Return the e with which numbers of this octave may grow by SPARE octaves.

    It is clipped, so that 2ᵉ is a normal float32 and the end of the range is finite.
    """
    exponent = octave + SPARE - _octaves(kind)
    return jnp.clip(exponent, 1 - EXPONENT_BIAS, EXPONENT_BIAS - _octaves(kind))


def _octave(x: jax.Array) -> jax.Array:
    """⌊log₂ x⌋, the exponent of a positive float."""
    return (bits_of(x) >> MANTISSA_BITS) - EXPONENT_BIAS


def _octaves(kind: jax.Array) -> jax.Array:
    """Return how many octaves above 2ᵉ the range ends, as in the table above."""
    return _by_kind(kind, 127, 40, 32)


def _code_of_0(format: Format) -> jax.Array:
    return _by_kind(format.kind, 128, 1, 128)


def _shift(format: Format) -> jax.Array:
    """Return log₂(1/λ)."""
    return _by_kind(format.kind, 7, 3, 3)


def _inverse_of_lambda(format: Format) -> jax.Array:
    return _power_of_two(_shift(format))


# The bits of a positive float, read as an integer, are nearly a logarithm. For
# y = 2ⁿ(1 + m), with m in [0, 1),
#
#     (bits(y) - bits(1)) / 2²³ = n + m
#
# which equals log₂ y where m is 0, and is a line between these corners. A power of y is
# this integer times the power's exponent, and a product with 2ⁿ is n << 23 added to it.
#
# An example with λ = 1/8: 6 = 2²(1 + 0.5) has the logarithm 2.5, which divided by 8 is
# 0.3125, the logarithm of 1.3125. So `_root(6)` is 8 * 1.3125 = 10.5, and `_power` of
# 10.5 is 6 again. With exact powers `_root(6)` would be 10.008.


def _root(y: jax.Array, format: Format) -> jax.Array:
    """Return y^λ/λ, with the power of the comment above.

    bits = bits(1) + ((bits(y) - bits(1)) >> shift) + (shift << 23)
    """
    shift = _shift(format)
    shifted = bits_of(y) >> shift
    return from_bits(shifted + (ONE - (ONE >> shift) + (shift << MANTISSA_BITS)))


def _power(v: jax.Array, format: Format) -> jax.Array:
    """Return 2ᵉ(λv)^(1/λ), so that `_power(_root(y))` is 2ᵉy.

    bits = bits(1) + ((bits(v) - bits(1/λ)) << shift) + (e << 23)

    The shifts by themselves overflow. Their difference does not, and integers are added
    and subtracted modulo 2³².
    """
    shift = _shift(format)
    bits_of_inverse = ONE + (shift << MANTISSA_BITS)
    offset = ONE - (bits_of_inverse << shift) + (format.exponent << MANTISSA_BITS)
    return from_bits((bits_of(v) << shift) + offset)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return from_bits(ONE + (exponent << MANTISSA_BITS))


def _by_kind(kind: jax.Array, *values: ArrayLike) -> jax.Array:
    """Select one of three values: for UNKNOWN, NON_NEGATIVE and SIGNED."""
    unknown, non_negative, signed = (jnp.asarray(x, jnp.int32) for x in values)
    known = jnp.where(kind == NON_NEGATIVE, non_negative, signed)
    return jnp.where(kind == UNKNOWN, unknown, known)
