"""Stochastic rounding: to a neighbour at random, so that the mean is the number itself.

The randomness is a hash of each element's place in its array. It costs a few operations
that fuse with what computes the numbers; random bits would be written to memory first.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from optax_rmsprop._numerics import cast, clip

ONE = int(np.float32(1).view(np.int32))


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of float32 or uint32 numbers, as int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def from_bits(bits: jax.Array) -> jax.Array:
    """The float32 numbers of these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def salt(*numbers: ArrayLike) -> jax.Array:
    """One random uint32 made of several integers; another order makes another."""
    mixed = jnp.uint32(0)
    for number in numbers:
        mixed = _mix(mixed * jnp.uint32(0x9E3779B1) + jnp.asarray(number, jnp.uint32))
    return mixed


def random_bits(shape: tuple[int, ...], bits: int, salt: jax.Array) -> jax.Array:
    """An integer in [0, 2 ** bits), as int32, for every element."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    # As `_mix`, but for steps of which the upper bits of the product have no need.
    x = (place ^ salt) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return (x >> (32 - bits)).astype(jnp.int32)


def _mix(x: jax.Array) -> jax.Array:
    """Wellons' integer hash "lowbias32": a flipped bit flips every other half the time.

    https://github.com/skeeto/hash-prospector
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def stochastic_round(x: ArrayLike, dtype: DTypeLike, salt: jax.Array) -> jax.Array:
    """Round to bfloat16 or float16, up or down with the odds that make the mean x.

    Exact to the last bit of x in float32. Finite numbers stay finite, NaN stays NaN,
    and infinity becomes NaN.
    """
    x = cast(x, jnp.float32)
    info = jnp.finfo(dtype)
    x = clip(x, float(info.max)) + 0 * x
    # The neighbours of x are a power of two apart, which its exponent tells.
    exponent = bits_of(x) & 0x7F800000
    least = max(info.minexp, info.nmant - 126) + 127 << 23
    exponent = jnp.where(exponent > least, exponent, least)
    spacing = from_bits(exponent - (info.nmant << 23))
    below = jnp.floor(x / spacing)
    uniform = from_bits(random_bits(x.shape, 23, salt) | ONE) - 1
    up = uniform < x / spacing - below
    return ((below + up.astype(jnp.float32)) * spacing).astype(dtype)
