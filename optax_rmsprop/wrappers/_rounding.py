"""Stochastic rounding: to a neighbour at random, so that the mean is the number itself.

The randomness of an element is the sum of a random number for its row and one for its
column. That is an operation which fuses with what computes the numbers; a random number
for each would be written to memory first.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_rmsprop import _errors
from optax_rmsprop._errors import shown
from optax_rmsprop._numerics import accumulator_dtype_of, cast, clip, within_range

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


def stochastic_apply_updates(
    params: optax.Params, updates: optax.Updates, key: jax.Array
) -> optax.Params:
    """Add updates to parameters, rounding bfloat16 and float16 ones at random.

        p <- p + u                          up or down at random, to a level next to it

    The odds are those that make the mean of the new parameter the exact sum. A bfloat16
    parameter of 1 has neighbours 0.004 and 0.008 away: rounded to the nearest, an
    update of 0.001 leaves it where it is, for ever; rounded at random, every fourth or
    eighth such update moves it by a whole level. Sums are made in float32 or, if either
    is in float64, in that. Parameters in other dtypes are rounded to the nearest.

    Args:
      params: the parameters.
      updates: what a transformation's update returned for them, in any floating dtype:
        the same structure and shapes, or None where a parameter, which may then be
        anything, stays as it is.
      key: a JAX PRNG key, a new one for every step: the same key rounds every step the
        same way. `jax.random.fold_in(key, step)` makes one.

    Returns:
      The new parameters, in the structure, shapes and dtypes of the old. A sum of
      finite numbers is held within the range of the dtype; where either is infinite, it
      is NaN. Rounding at random passes no derivatives.

    Raises:
      TypeError: a key that is none.
      ValueError: updates that do not have the parameters' structure and shapes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_rmsprop import wrappers
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> updates = jnp.full(10_000, 1e-3)
      >>> key = jax.random.key(0)
      >>> new = wrappers.stochastic_apply_updates(params, updates, key)
      >>> round(float(new.astype(jnp.float32).mean()), 4)
      1.001

    References:
      Gupta et al., Deep Learning with Limited Numerical Precision, arXiv:1502.02551.
    """
    _check_key(key)
    _errors.same_tree("updates", updates, "`params`", params)
    structure: Any
    leaves, structure = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    words = random_words(key, [(0,) if u is None else np.shape(u) for u in leaves])

    def leaf(p: Any, u: Any, its_words: list[jax.Array]) -> Any:
        if u is None:
            return p
        wide = np.result_type(accumulator_dtype_of(p), accumulator_dtype_of(u))
        terms = cast(p, wide), cast(u, wide)
        exact = within_range(jnp.add(*terms), wide, *terms)
        if jnp.result_type(p) not in (jnp.bfloat16, jnp.float16):
            return cast(exact, jnp.result_type(p))
        return stochastic_round(exact, p.dtype, its_words)

    rows = zip(structure.flatten_up_to(params), leaves, words, strict=True)
    return structure.unflatten(leaf(*row) for row in rows)


def _check_key(key: Any) -> None:
    """Check that a value is one of JAX's keys, old or new."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        is_key = np.shape(key) == ()
    else:
        raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        is_key = dtype == raw.dtype and np.shape(key) == raw.shape
    if not is_key:
        raise TypeError(
            f"`key` must be one PRNG key, got {shown(key)}; jax.random.key(0) makes one"
        )
