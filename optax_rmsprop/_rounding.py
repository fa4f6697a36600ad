"""Stochastic rounding: to a neighbour at random, so that the mean is the number itself.

The randomness of an element is the sum of a random number for its row and one for its
column. That is an operation which fuses with what computes the numbers; a random number
for each would be written to memory first.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from optax_rmsprop._numerics import cast, clip

ONE = int(np.float32(1).view(np.int32))
LONG = 2**16  # axes for whose indices a hash is made, not a random number


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of float32 or uint32 numbers, as int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def from_bits(bits: jax.Array) -> jax.Array:
    """The float32 numbers of these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def random_words(
    key: jax.Array, shapes: Sequence[tuple[int, ...]]
) -> list[list[jax.Array]]:
    """For each array a random uint32 number for each row, each column and so on.

    All are made in one call, to be read, and not made again, for every element.
    """
    sizes = [[n if n <= LONG else 1 for n in shape or (1,)] for shape in shapes]
    pool = jax.random.bits(key, (sum(map(sum, sizes)),), jnp.uint32)
    ends = itertools.accumulate(itertools.chain.from_iterable(sizes))
    return [
        [jax.lax.slice_in_dim(pool, (end := next(ends)) - n, end) for n in row]
        for row in sizes
    ]


def random_bits(
    shape: tuple[int, ...], bits: int, words: Sequence[jax.Array]
) -> jax.Array:
    """An integer in [0, 2 ** bits), as int32, for every element.

    The sum of the words of its row, column and so on: so any two or three elements are
    independent, and an element costs an addition for every axis but one.
    """
    axes = shape or (1,)
    parts = []
    for axis, (size, word) in enumerate(zip(axes, words, strict=True)):
        if size > LONG:
            word = _mix(jax.lax.iota(jnp.uint32, size) ^ word)
        others = [i for i in range(len(axes)) if i != axis]
        parts.append(jnp.expand_dims(word, others))
    total = functools.reduce(jnp.add, parts)
    return (total >> (32 - bits)).astype(jnp.int32).reshape(shape)


def _mix(x: jax.Array) -> jax.Array:
    """Wellons' integer hash "lowbias32": a flipped bit flips every other half the time.

    https://github.com/skeeto/hash-prospector
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def stochastic_round(
    x: ArrayLike, dtype: DTypeLike, words: Sequence[jax.Array]
) -> jax.Array:
    """Round to bfloat16 or float16, up or down with the odds that make the mean x.

    Exact to the last bit of x in float32. Finite numbers stay finite, NaN stays NaN,
    and infinity becomes NaN.
    """
    x = cast(x, jnp.float32)
    info = jnp.finfo(dtype)
    x = clip(x, float(info.max)) + 0 * x
    if dtype == jnp.bfloat16:  # the upper half of a float32
        bits = (bits_of(x) + random_bits(x.shape, 16, words)) & ~0xFFFF
        return jnp.where(x == x, from_bits(bits), x).astype(dtype)
    # The neighbours of x are a power of two apart, which its exponent tells.
    exponent = bits_of(x) & 0x7F800000
    least = info.minexp + 127 << 23
    exponent = jnp.where(exponent > least, exponent, least)
    spacing = from_bits(exponent - (info.nmant << 23))
    below = jnp.floor(x / spacing)
    uniform = from_bits(random_bits(x.shape, 23, words) | ONE) - 1
    up = uniform < x / spacing - below
    return ((below + up.astype(jnp.float32)) * spacing).astype(dtype)
