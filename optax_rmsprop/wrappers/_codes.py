"""8-bit codes for the numbers of an array, with a format for each of its rows.

Levels are evenly spaced, in the logarithm, between the smallest and the largest number
of a row. There are n of them to an octave, and they divide it evenly:

    level(i) = 2ᵒ (1 + r/n)             o = ⌊i/n⌋, r = i - n o

The code of a number has k, by how many levels it lies above the lowest level of its
row. The row's format has n and the index i of the lowest level. With n = 4 and i = 0,

    k         0   1     2    3     4   5    6   7    8
    level(k)  1   1.25  1.5  1.75  2   2.5  3   3.5  4

`encode` rounds a number up or down to a level, with probabilities that make the mean
exact: 2.125 becomes 2 with probability 3/4, and 2.5 with 1/4. The narrower the range of
a row is, the larger its n, up to 254, and the finer its levels.

There are three kinds of rows:

    kind           number                      n           k           code
    NON_NEGATIVE   level(i + k)                3 to 254    0 to 252    1 + k
    SIGNED         ±(level(i + k) - level(i))  12          0 to 126    127 ± k
    UNKNOWN        the same                    1           0 to 126    127 ± k

Code 255 is NaN. In a NON_NEGATIVE row code 0 is the number 0, which has no logarithm,
and code 254 is a negative number, which counts as 0. Positive numbers do not become 0
there: a second moment that was rounded to 0 would lengthen the step. In a SIGNED row,
where level(i) is subtracted, levels near 0 are evenly spaced. A row of zeros is
UNKNOWN, because the size of its next numbers is not known. Its levels are a factor of 2
apart, and cover almost all sizes.

The last 8 levels of a row are 6 times as far apart as the others, for numbers that grow
beyond the range (UNKNOWN rows have none of these). Between them the mean is not quite
exact: too large by up to 2 % where n is 20, and 8 % where it is 6.

From the smallest and the largest code of a row, `next_format` finds its format for the
next step, which is thus a step late. If the extremes were found first, and the numbers
encoded in a second pass, a step would take twice the time. A format is kept while it
fits, because a number that lies on a level stays there, and other levels would round it
anew.

The formulas have few operations because the TPU's compiler makes one loop of a step,
which reads and writes every array once, only if they are few
(`benchmarks/small_state_cost.py`).
"""

import functools
import math
from collections.abc import Callable, Sequence
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

Shape = tuple[int, ...]

# A row has at least as many numbers, if the array has, so that formats take less than
# 0.1 bytes a number.
LEAST_ROW = 64

ZERO, FIRST, CENTER, LAST, NEGATIVE, NAN = 0, 1, 127, 253, 254, 255  # codes

# Values of `Format.levels` that stand for a kind. NON_NEGATIVE rows have n there.
UNKNOWN, SIGNED = 0, 1
FEWEST, MOST = 3, 254
LEVELS_OF_SIGNED = 12

COARSE, COARSENESS = 8, 6  # how many levels, and how far apart they are

# UNKNOWN looks for numbers with these lowest levels in turn. The first covers 2⁻⁶² to
# 2⁶⁴, the second 2⁻¹²⁶ to 1.
WINDOWS = -62, -126

# A format has so many octaves to spare below its numbers and above them, and is kept
# while it has the lesser numbers. Averages fall by 0.15 octaves a step at decay 0.9.
# They may grow faster; the coarse levels are for that.
BELOW, LEAST_BELOW = 0.2, 0.15
ABOVE, LEAST_ABOVE = 0.15, 0.1
# The same for SIGNED, which is kept while it has no more than the last number.
ABOVE_SIGNED, LEAST_ABOVE_SIGNED, MOST_ABOVE_SIGNED = 0.5, 0.25, 1.0
# A number beyond an end of the range is taken to be so many octaves away from it.
BEYOND = 4.0

# `encode` adds 2⁸ to k. All floats in [2⁸, 2⁹) have the same exponent, so that their
# mantissa is a fixed-point number: 8 bits for the integer k, 15 for its fraction.
LEVEL_BITS = 8
FRACTION_BITS = MANTISSA_BITS - LEVEL_BITS


class Format(NamedTuple):
    """The meaning of the codes of one array, with an entry for each row.

    Both arrays have the shape that `rows_of` returns.

    Attributes:
      levels: uint8, n of a NON_NEGATIVE row, or UNKNOWN, or SIGNED.
      lowest: int16, the index i of the lowest level.
    """

    levels: jax.Array
    lowest: jax.Array


class _Scale(NamedTuple):
    """The numbers of the formulas for each row, made from its format."""

    signed: jax.Array  # SIGNED or UNKNOWN
    center: jax.Array  # the code of k = 0
    last: jax.Array  # the largest k
    fine: jax.Array  # the k where the coarse levels begin
    levels: jax.Array  # n
    bits: jax.Array  # of level(i)
    offset: jax.Array  # level(i), or 0 if NON_NEGATIVE


def rows_of(shape: Shape) -> Shape:
    """Return the shape of the format of an array: 1 for the axes that form a row.

    A row has the last axis, or as many of the last ones as have LEAST_ROW numbers. The
    shapes (512, 256), (3, 3, 64, 64) and (512, 16, 3, 3) give (512, 1), (3, 3, 64, 1)
    and (512, 1, 1, 1).
    """
    first = len(shape) - 1
    while first > 0 and math.prod(shape[first:]) < LEAST_ROW:
        first -= 1
    return shape[:first] + (1,) * (len(shape) - first)


# The bits of a positive float, read as an integer, are nearly a logarithm. For
# y = 2ᵒ (1 + m), with m in [0, 1),
#
#     (bits(y) - bits(1)) / 2²³ = o + m
#
# which is i/n for level(i). So levels are evenly spaced in their bits, and because the
# bits of y are a straight line within an octave, and so between two levels that are not
# coarse, rounding that is unbiased in the bits is unbiased in y too.


def _scale(format: Format) -> _Scale:
    levels = format.levels.astype(jnp.int32)
    signed = levels < FEWEST
    n_of_signed = jnp.where(levels == SIGNED, LEVELS_OF_SIGNED, 1)
    n = jnp.where(signed, n_of_signed, levels).astype(jnp.float32)
    octaves = format.lowest.astype(jnp.float32) / n
    bits = ONE + jnp.round(octaves * 2.0**MANTISSA_BITS).astype(jnp.int32)
    last = jnp.where(signed, LAST - CENTER, LAST - FIRST)
    fine = jnp.where(levels == UNKNOWN, last, last - COARSE)
    return _Scale(
        signed=signed,
        center=jnp.where(signed, CENTER, FIRST),
        last=last,
        fine=fine.astype(jnp.float32),
        levels=n,
        bits=bits,
        offset=jnp.where(signed, from_bits(bits), 0.0),
    )


def _magnitude(k: jax.Array, scale: _Scale) -> jax.Array:
    """Return the magnitude that k stands for."""
    step = 2.0**MANTISSA_BITS / scale.levels
    bits = scale.bits + (_fine_levels(k, scale) * step + 0.5).astype(jnp.int32)
    return from_bits(bits) - scale.offset


def _fine_levels(k: jax.Array, scale: _Scale) -> jax.Array:
    """Return how many levels k would be if none were coarse."""
    return jnp.maximum(k, COARSENESS * k - (COARSENESS - 1) * scale.fine)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def decode(codes: jax.Array, format: Format, dtype: DTypeLike) -> jax.Array:
    """Return the numbers that the codes of one array stand for.

    In a NON_NEGATIVE row with n = 4 and i = 0, code 6 is k = 5. Its bits are those of 1
    plus 5/4 · 2²³, and the number is 2¹ (1 + 1/4) = 2.5.
    """
    scale = _scale(format)
    code = codes.astype(jnp.int32)
    signed_k = code - scale.center
    magnitude = _magnitude(jnp.abs(signed_k).astype(jnp.float32), scale)
    x = jnp.where(signed_k < 0, -magnitude, magnitude)
    x = jnp.where((code == ZERO) | (code == NEGATIVE), 0, x)
    return cast(jnp.where(code == NAN, jnp.nan, x), dtype)


@functools.partial(jax.jit, inline=True)
def encode(
    x: jax.Array, format: Format, axis_bits: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return codes for the numbers of one array, and their extremes in each row.

    The extremes are the smallest code but ZERO, or 256 if there is no other, and the
    largest but NAN, or -1.

    `axis_bits` is an entry of `random_axis_bits`. An example in a NON_NEGATIVE row with
    n = 4 and i = 0: the bits of 2.125 are those of 1 plus 1.0625 · 2²³, so k is 4.25.
    With 2⁸ added it is 260.25, whose bits are 0x43822000. The upper 17 bits, 0x8704,
    are the exponent of 2⁸, which is 0x87, and 04 for k. The lower 15 bits, 0x2000, are
    a quarter of 2¹⁵. A random number in [0, 2¹⁵) is added, and carries into the upper
    bits in a quarter of all cases. So k is 4 or 5, and the code 5 or 6.
    """
    scale = _scale(format)
    x = cast(x, jnp.float32)
    # -1 where x is negative, else 0. (k ^ minus) - minus is then -k, or k.
    magnitude, minus = jnp.abs(x), -(x < 0).astype(jnp.int32)
    distance = (bits_of(magnitude + scale.offset) - scale.bits).astype(jnp.float32)
    k = distance * (scale.levels * 2.0**-MANTISSA_BITS)
    k = jnp.minimum(k, (k + (COARSENESS - 1) * scale.fine) * (1 / COARSENESS))
    shifted_k = jnp.maximum(k, 0) + 2.0**LEVEL_BITS
    bits = bits_of(shifted_k) + random_bits(x.shape, FRACTION_BITS, axis_bits)
    k = (bits >> FRACTION_BITS) - (EXPONENT_BIAS + LEVEL_BITS << LEVEL_BITS)
    code = jnp.clip((k ^ minus) - minus + scale.center, FIRST, LAST)
    not_positive = jnp.where(x < 0, NEGATIVE, ZERO)
    # NON_NEGATIVE rows have offset 0.
    code = jnp.where(jnp.maximum(x, scale.offset) > 0, code, not_positive)
    codes = jnp.where(magnitude < jnp.inf, code, NAN).astype(jnp.uint8)
    rows = format.levels.shape
    find = functools.partial(jax.lax.platform_dependent, codes)
    highest, lowest = find(
        cpu=functools.partial(_extremes_on_cpu, rows),
        tpu=functools.partial(_extremes_on_tpu, rows),
        default=functools.partial(_extremes_in_one_reduction, rows),
    )
    return codes, lowest, highest


def _extremes(
    rows: Shape, codes: jax.Array, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Return the largest code of each row but NAN, and the smallest but ZERO.

    If there is no other, they are -1 and 256. They are found in this dtype.
    """
    highest, lowest = (_rotated(codes, by).astype(dtype) for by in (1, -1))
    return _in_rows(jnp.max, rows, highest) - 1, _in_rows(jnp.min, rows, lowest) + 1


def _extremes_on_cpu(rows: Shape, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A CPU vectorizes the reductions only if they read the codes as they are."""
    highest, lowest = (_in_rows(f, rows, codes) for f in (jnp.max, jnp.min))
    hidden = jnp.any((highest == NAN) | (lowest == ZERO))
    return jax.lax.cond(
        hidden, lambda: _extremes(rows, codes, jnp.uint8), lambda: (highest, lowest)
    )


def _rotated(codes: jax.Array, by: int) -> jax.Array:
    """Return codes + by, modulo 256: with 1 NAN is the first, with -1 ZERO the last.

    The difference of uint8 arrays is not reduced correctly by XLA's CPU backend in
    jaxlib 0.10 and 0.12.
    """
    return (codes.astype(jnp.int32) + by).astype(jnp.uint8)


def _extremes_on_tpu(rows: Shape, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A TPU finds these while it writes the codes. A CPU would take 5 times as long."""
    return _extremes(rows, codes, jnp.float32)


def _extremes_in_one_reduction(
    rows: Shape, codes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """On a GPU two reductions end with a kernel each. A CPU would not vectorize one."""

    def both(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1])

    operands = [_rotated(codes, by).astype(jnp.int32) for by in (1, -1)]
    start = jnp.int32(0), jnp.int32(255)
    highest, lowest = jax.lax.reduce(tuple(operands), start, both, _axes(rows))
    return highest.reshape(rows) - 1, lowest.reshape(rows) + 1


def _in_rows(f: Callable[..., jax.Array], rows: Shape, x: jax.Array) -> jax.Array:
    return f(x, axis=_axes(rows), keepdims=True).astype(jnp.int32)


def _axes(rows: Shape) -> tuple[int, ...]:
    return tuple(i for i, size in enumerate(rows) if size == 1)


@jax.jit
def first_format(x: jax.Array) -> Format:
    """Return the format for an array whose numbers are known."""
    x, axes = cast(x, jnp.float32), _axes(rows_of(x.shape))
    magnitude = jnp.abs(x)
    positive = jnp.where(magnitude > 0, magnitude, jnp.inf)
    smallest = jnp.min(positive, axis=axes, keepdims=True)
    largest = jnp.max(magnitude, axis=axes, keepdims=True)
    signed = jnp.any(x < 0, axis=axes, keepdims=True)
    found = _format_for(signed, _octaves(smallest), _octaves(largest))
    known = (largest > 0) & (largest < jnp.inf)
    return _select(known, found, _unknown(WINDOWS[1]))


@jax.jit
def next_format(last: Format, lowest: jax.Array, highest: jax.Array) -> Format:
    """Return the format for the step after one whose extreme codes are given.

    An example: a row with numbers from 1 to 4 was encoded as UNKNOWN with i = -62. Its
    codes are 189 for 1, and 191 for 4. Where levels are a factor of 2 apart, these may
    have been rounded from up to 1/2 and 8. So the next row has 4 octaves, and 0.35 to
    spare: n is ⌊244/4.35⌋ = 56. One step later the codes show a range of 2 octaves, and
    n becomes ⌊244/2.35⌋ = 103.
    """
    scale = _scale(last)
    was_unknown, was_signed = last.levels == UNKNOWN, last.levels == SIGNED
    # The smallest and the largest k. SIGNED rows do not need the former.
    smallest = jnp.maximum(lowest - scale.center, 0).astype(jnp.float32)
    largest = jnp.maximum(highest, 2 * CENTER - lowest) - CENTER
    largest = jnp.where(scale.signed, largest, highest - FIRST).astype(jnp.float32)
    # A negative number hides the largest one, which may be as large as the fine levels.
    negative = ~scale.signed & (highest == NEGATIVE)
    largest = jnp.where(negative, scale.fine, largest)
    low, high = (_octaves(_magnitude(k, scale)) for k in (smallest, largest))
    at_end = largest >= scale.last.astype(jnp.float32)
    uncertain = jnp.where(was_unknown, 1.0, 0.0)
    low -= jnp.where(~scale.signed & (smallest == 0), BEYOND, uncertain)
    high += jnp.where(at_end, BEYOND, uncertain)
    signed = was_signed | negative | (was_unknown & (lowest < CENTER))
    found = _format_for(signed, low, high)

    above = (scale.fine - _fine_levels(largest, scale)) / scale.levels
    fits_signed = (above >= LEAST_ABOVE_SIGNED) & (above <= MOST_ABOVE_SIGNED)
    fits = (above >= LEAST_ABOVE) & (smallest >= LEAST_BELOW * scale.levels)
    fits &= (last.levels >= found.levels) & (found.levels >= FEWEST) & ~scale.signed
    found = _select(fits | (was_signed & fits_signed), last, found)

    # No number had a level. Or all had, and the largest may lie beyond the last one of
    # the second window, so that its size is not known.
    none = jnp.where(scale.signed, largest <= 0, lowest > LAST)
    second = last.lowest == WINDOWS[1]
    none |= was_unknown & second & at_end
    window = jnp.where(was_unknown & ~second, WINDOWS[1], WINDOWS[0])
    return _select(none, _unknown(window), found)


def _format_for(signed: jax.Array, low: jax.Array, high: jax.Array) -> Format:
    """Return the format for magnitudes from 2ˡᵒʷ to 2ʰⁱᵍʰ."""
    fine = float(LAST - FIRST - COARSE)
    n = jnp.floor(fine / (high - low + (BELOW + ABOVE)))
    n = jnp.clip(n, FEWEST, MOST)
    # With the fewest levels, the range may be too narrow for the smallest numbers.
    top = jnp.ceil((high + ABOVE) * n) - fine
    lowest = jnp.maximum(jnp.floor((low - BELOW) * n), top)
    fine_of_signed = float(LAST - CENTER - COARSE)
    top = jnp.ceil((high + ABOVE_SIGNED) * LEVELS_OF_SIGNED) - fine_of_signed
    lowest = jnp.where(signed, top, lowest)
    # All levels are normal and finite float32 numbers.
    width = jnp.where(signed, fine_of_signed, fine) + COARSE * COARSENESS
    n_of_row = jnp.where(signed, LEVELS_OF_SIGNED, n)
    most = (EXPONENT_BIAS + 1) * n_of_row - 1 - width
    lowest = jnp.clip(lowest, (1 - EXPONENT_BIAS) * n_of_row, most)
    levels = jnp.where(signed, SIGNED, n)
    return Format(levels.astype(jnp.uint8), lowest.astype(jnp.int16))


def _unknown(window: ArrayLike) -> Format:
    return Format(jnp.uint8(UNKNOWN), jnp.asarray(window, jnp.int16))


def _select(mask: jax.Array, a: Format, b: Format) -> Format:
    return Format(*(jnp.where(mask, x, y) for x, y in zip(a, b, strict=True)))


def _octaves(x: jax.Array) -> jax.Array:
    """Return the o + m of the comment above: nearly log₂ x, and -127 for 0."""
    return (bits_of(x) - ONE).astype(jnp.float32) * 2.0**-MANTISSA_BITS
