"""Numbers as 8-bit codes with the shape of their array, and one exponent an array.

A magnitude |x| is rounded at random to one of the two integers next to

    k(x) = ((1 + |x|/2ᵉ)^λ - 1)/λ              so that code k is the level
    x(k) = 2ᵉ((1 + λk)^(1/λ) - 1)

the transform of Box and Cox (1964): near 0 levels are 2ᵉ apart; further up, the larger
they are the finer they are, relative to themselves. A power is taken by shifting the
bits of the float (Blinn 1997), which makes k piecewise linear in x with corners at
levels only. So what is unbiased in k, between two levels, is unbiased in x.

An array is of one of four kinds, and which one is data, not program:

    kind           1/λ   k            code                     largest |x|/2ᵉ
    UNKNOWN        128   0 to 125     k, and bit 7 for a minus      2¹²⁵
    NON_NEGATIVE     8   1 to 253     k                             2⁴⁰
    SIGNED           8   0 to 125     2k, and bit 0 for a minus     2³²
    WIDE_SIGNED    128   0 to 125     2k, and bit 0 for a minus     2¹²⁵

A new array is UNKNOWN: its codes are little more than exponents, and hold numbers of
almost any size. If some are negative, the largest code is one of these: WIDE_SIGNED
finds out the size of the largest number of either sign. The largest code of a step
tells the next one the kind and e, with octaves to spare. So the scale comes a step
late, and from one byte an element: to read the new numbers twice would take twice the
time. What is beyond the range is held at its end.
NON_NEGATIVE has no 0: a second moment that was rounded to it would lengthen the step.

The formulas have few operations and few scalars, since a TPU's compiler makes one loop
of a step, at 14 bytes a parameter, only as long as they are few
(`benchmarks/small_state_cost.py`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_rmsprop._numerics import cast
from optax_rmsprop._rounding import ONE, bits_of, from_bits, random_bits

UNKNOWN, NON_NEGATIVE, SIGNED, WIDE_SIGNED = 0, 1, 2, 3
NAN, WAS_NEGATIVE = 254, 255  # codes for what NON_NEGATIVE, and what no kind, can hold
WINDOWS = -62, -126  # the exponents with which UNKNOWN looks for numbers, in turn


class Scale(NamedTuple):
    """What the codes of one array mean.

    Attributes:
      kind: int32, as in the table above, from 0 on. This and the others have one
        element and the array's rank, so that under `jax.shard_map` what partitions the
        array along its axes can partition them.
      exponent: int32, e.
      highest: the largest code, in the dtype to which the codes decode.
    """

    kind: jax.Array
    exponent: jax.Array
    highest: jax.Array


def decode(codes: jax.Array, scale: Scale) -> jax.Array:
    """The numbers that the codes stand for."""
    kind, code = scale.kind, codes.astype(jnp.int32)
    minus = code & _by_kind(kind, 128, 0, 1, 1)
    # Half of λ where codes are 2k.
    lambda_ = _by_kind(kind, 2.0**-7, 2.0**-3, 2.0**-4, 2.0**-8)
    t = 1 + (code - minus).astype(jnp.float32) * lambda_
    x = (_power(t, kind) - 1) * _power_of_two(scale.exponent)
    x = jnp.where(minus > 0, -x, x)
    x = jnp.where(code == NAN, jnp.nan, x)
    x = jnp.where(code == WAS_NEGATIVE, 0, x)
    return cast(x, scale.highest.dtype)


def encode(x: jax.Array, last: Scale, salt: jax.Array) -> tuple[jax.Array, Scale]:
    """Codes for new numbers, in the kind and scale that the last codes suggest."""
    return _encode(x, *_next_format(last), salt)


def encode_first(x: jax.Array, salt: jax.Array) -> tuple[jax.Array, Scale]:
    """Codes for numbers of which nothing is known: they are read twice."""
    wide = cast(x, jnp.float32)
    largest = jnp.max(jnp.abs(wide), keepdims=True)
    signed = jnp.min(wide, keepdims=True) < 0
    kind = jnp.where(signed, SIGNED, NON_NEGATIVE).astype(jnp.int32)
    exponent = _exponent(kind, _octave(largest))
    empty = ~(largest > 0)  # or NaN
    kind = jnp.where(empty, UNKNOWN, kind)
    return _encode(x, kind, jnp.where(empty, WINDOWS[1], exponent), salt)


def _encode(
    x: jax.Array, kind: jax.Array, exponent: jax.Array, salt: jax.Array
) -> tuple[jax.Array, Scale]:
    dtype, x = x.dtype, cast(x, jnp.float32)
    magnitude = jnp.abs(x)
    t = _root(1 + magnitude * _power_of_two(-exponent), kind)
    # k + 2⁸, a float whose bits are those of k with 15 binary places.
    v = (t - 1) * _by_kind(kind, 2.0**7, 2.0**3, 2.0**3, 2.0**7) + 2.0**8
    first = _by_kind(kind, 0.0, 1.0, 0.0, 0.0)
    last = _by_kind(kind, 125.0, 253.0, 125.0, 125.0)
    v = jnp.where(v < first + 2.0**8, first + 2.0**8, v)
    v = jnp.where(v > last + 2.0**8, last + 2.0**8, v)
    code = (bits_of(v) + random_bits(x.shape, 15, salt)) >> 15
    code = (code & 255) << _by_kind(kind, 0, 0, 1, 1)
    code |= (bits_of(x) >> 31) & _by_kind(kind, 128, WAS_NEGATIVE, 1, 1)
    codes = jnp.where(magnitude < jnp.inf, code, NAN).astype(jnp.uint8)
    # Of float32 numbers a TPU finds the largest while it writes the codes, and a CPU of
    # bytes in a fifth of the time.
    highest = jax.lax.platform_dependent(
        codes,
        cpu=lambda codes: jnp.max(codes, keepdims=True).astype(jnp.float32),
        default=lambda codes: jnp.max(codes.astype(jnp.float32), keepdims=True),
    )
    return codes, Scale(kind, exponent, highest.astype(dtype))


def _next_format(last: Scale) -> tuple[jax.Array, jax.Array]:
    """The kind and exponent for the numbers that come after these codes."""
    highest, old = last.highest.astype(jnp.int32), last.kind
    k = _by_kind(old, highest & 127, highest, highest >> 1, highest >> 1)
    seen = _by_kind(
        old,
        jnp.where(highest > 127, WIDE_SIGNED, NON_NEGATIVE),
        jnp.where(highest == WAS_NEGATIVE, SIGNED, NON_NEGATIVE),
        SIGNED,
        SIGNED,
    )
    above_low_window = (last.exponent == WINDOWS[1]) & (k == 125)
    wide = (old == UNKNOWN) | (old == WIDE_SIGNED)
    none = (highest <= _by_kind(old, 0, 1, 1, 1)) | (wide & above_low_window)
    kind = jnp.where(none, UNKNOWN, seen)
    lambda_ = _by_kind(old, 2.0**-7, 2.0**-3, 2.0**-3, 2.0**-7)
    octave = _octave(_power(1 + k.astype(jnp.float32) * lambda_, old)) + last.exponent
    spare = _octaves(kind) + last.exponent - octave
    keep = (kind == old) & (spare >= 3) & (spare <= 7)
    keep |= kind == WIDE_SIGNED  # of which the window stays
    exponent = jnp.where(keep, last.exponent, _exponent(kind, octave))
    window = jnp.where(last.exponent == WINDOWS[0], WINDOWS[1], WINDOWS[0])
    exponent = jnp.where(kind == UNKNOWN, window, exponent)
    is_nan = highest == NAN  # which tells nothing of the other numbers
    return jnp.where(is_nan, old, kind), jnp.where(is_nan, last.exponent, exponent)


def _exponent(kind: jax.Array, octave: jax.Array) -> jax.Array:
    """That which leaves five octaves above the largest number, where float32 can."""
    return jnp.clip(octave + 5 - _octaves(kind), -126, 127 - _octaves(kind))


def _octave(x: jax.Array) -> jax.Array:
    """⌊log₂ x⌋."""
    return (bits_of(x) >> 23) - 127


def _octaves(kind: jax.Array) -> jax.Array:
    return _by_kind(kind, 125, 40, 32, 125)


def _root(y: jax.Array, kind: jax.Array) -> jax.Array:
    """y^λ, piecewise linear."""
    return from_bits(((bits_of(y) - ONE) >> _by_kind(kind, 7, 3, 3, 7)) + ONE)


def _power(t: jax.Array, kind: jax.Array) -> jax.Array:
    """The inverse of `_root`."""
    return from_bits(((bits_of(t) - ONE) << _by_kind(kind, 7, 3, 3, 7)) + ONE)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return from_bits((exponent + 127) << 23)


def _by_kind(kind: jax.Array, *values: Any) -> jax.Array:
    dtype = jnp.float32 if isinstance(values[0], float) else jnp.int32
    chosen = jnp.asarray(values[0], dtype)
    for number, value in enumerate(values[1:], start=1):
        chosen = jnp.where(kind == number, jnp.asarray(value, dtype), chosen)
    return chosen
