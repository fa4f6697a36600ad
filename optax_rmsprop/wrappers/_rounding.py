"""Stochastic rounding, and the random bits that it takes.

A number between two neighbours is rounded to one of them at random. The probability of
each is such that the mean of the result is the number itself.

The random bits of an element are the sum of one random number for its row and one for
its column. XLA fuses this sum into the loop that computes the elements. A separate
random number for every element would be written to memory first, and read from there.

A state is rounded in every step, and the errors add up. So 256 steps share one draw,
and each step adds the golden ratio to its numbers once more (modulo 1, a sequence of
Weyl). The bits of a single step are as random as those of a new draw. Those of
successive steps are spread evenly: a number a quarter of the way up to its neighbour is
rounded up in one of four steps, rather than in none or in two. The errors thus cancel
in part. But an average that is rounded in this way depends on the bits of the steps
before, and is then off by up to a tenth of the distance of its neighbours, upwards for
most numbers if the golden ratio is added, and downwards if it is subtracted. So it is
added in one half of the rows, and subtracted in the other, which leaves half of that.
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

# A float32 has a sign bit, 8 bits for its exponent plus 127, and 23 bits of mantissa.
# Read as an integer, the bits of a positive number grow with the number: those of 1.0
# are 127 << 23 = 0x3F800000, and those of 2.0 are larger by 1 << 23.
MANTISSA_BITS = 23
EXPONENT_BIAS = 127
EXPONENT_FIELD = 0xFF << MANTISSA_BITS
ONE = EXPONENT_BIAS << MANTISSA_BITS

# A bfloat16 is the upper half of a float32.
LOWER_HALF_BITS = 16
UPPER_HALF = ~0xFFFF

# Indices of a longer axis are hashed with one random number. A random number for each
# of them would make the draw large.
LONG = 2**16

GOLDEN_RATIO = 0x9E3779B9  # its fraction, 0.618, times 2³²

# Random numbers are drawn anew after so many steps.
STEPS_OF_A_DRAW = 256


def bits_of(x: jax.Array) -> jax.Array:
    """Return the bits of float32 or uint32 numbers as int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def from_bits(bits: jax.Array) -> jax.Array:
    """Return the float32 numbers that have these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


# Compiled, so that a step that is not compiled makes one call, not one for each slice.
@functools.partial(jax.jit, static_argnames="shapes", inline=True)
def random_axis_bits(
    key: jax.Array,
    shapes: tuple[tuple[int, ...], ...],
    step: jax.Array | None = None,
) -> list[list[jax.Array]]:
    """Draw random uint32 numbers for the rows, columns and further axes of arrays.

    Returns for each shape a list with a vector per axis: one number for each index of
    the axis, or a single number where the axis is longer than `LONG`. A scalar has one
    axis of length 1. So the shapes (64, 48) and () give vectors of 64, 48 and 1. Each
    list ends with a scalar, the multiple of the golden ratio for this step.

    One call draws them all, so that XLA stores them, and the loops over elements read
    them. It would otherwise repeat a draw for every element.
    """
    sizes = [[n if n <= LONG else 1 for n in shape or (1,)] for shape in shapes]
    pool = jax.random.bits(key, (sum(map(sum, sizes)),), jnp.uint32)
    ends = itertools.accumulate(itertools.chain.from_iterable(sizes))
    offset = jnp.uint32(0)
    if step is not None:
        offset = step.astype(jnp.uint32) * jnp.uint32(GOLDEN_RATIO)
    return [
        [
            *(jax.lax.slice_in_dim(pool, (end := next(ends)) - n, end) for n in row),
            offset,
        ]
        for row in sizes
    ]


# The number is not static: every seed would compile a program of its own.
@functools.partial(jax.jit, static_argnames="shapes", inline=True)
def axis_bits_of_step(
    number: np.uint32, count: jax.Array, shapes: tuple[tuple[int, ...], ...]
) -> list[list[jax.Array]]:
    """Return `random_axis_bits` for a step, from a number and a count of updates.

    The two are the words of the key. `jax.random.key(n)` is (0, n), so the number must
    not be small: a user's key could have the same bits. `jax.random.fold_in` takes a
    draw more.
    """
    draw = (count // STEPS_OF_A_DRAW).astype(jnp.uint32)
    words = jnp.stack([number, draw])
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    return random_axis_bits(key, shapes, count)


def random_bits(
    shape: tuple[int, ...], bits: int, axis_bits: Sequence[jax.Array]
) -> jax.Array:
    """Return a random integer in [0, 2 ** bits), as int32, for every element.

    It is the upper `bits` bits of a sum modulo 2³²: the element at (i, j) has
    rows[i] + columns[j] + offset, where `axis_bits` is [rows, columns, offset]. A
    matrix of 64 times 48 elements takes 112 random numbers, and one addition for each
    element.

    Any two elements are independent, and any three. Four at the corners of a rectangle
    are not: the sum of two opposite corners equals that of the other two. The variance
    of a sum of rounding errors depends on pairs alone, so it is as if all elements were
    independent.
    """
    axes = shape or (1,)
    *vectors, offset = axis_bits
    parts = []
    for axis, (size, numbers) in enumerate(zip(axes, vectors, strict=True)):
        if size > LONG:
            numbers = _hash(jax.lax.iota(jnp.uint32, size) ^ numbers)
        if axis == 0:  # the last bit is as good as a coin
            numbers = numbers + jnp.where(numbers & 1 == 1, offset, -offset)
        others = [i for i in range(len(axes)) if i != axis]
        parts.append(jnp.expand_dims(numbers, others))
    total = functools.reduce(jnp.add, parts)
    return (total >> (32 - bits)).astype(jnp.int32).reshape(shape)


def _hash(x: jax.Array) -> jax.Array:
    """Hash integers so that similar ones get unrelated results.

    The hash is Wellons' "lowbias32", https://github.com/skeeto/hash-prospector: if one
    bit of the input is flipped, each bit of the result flips with probability 1/2.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def stochastic_round(
    x: ArrayLike, dtype: DTypeLike, axis_bits: Sequence[jax.Array]
) -> jax.Array:
    """Round to bfloat16 or float16, up or down at random, so that the mean is x.

    `axis_bits` is an entry of `random_axis_bits`. The mean is exact to the last bit of
    x in float32. Finite numbers stay finite, NaN stays NaN, and infinity becomes NaN.

    To bfloat16: 1.001 is 0x3F8020C5 in float32. It lies between 0x3F80, which is 1, and
    0x3F81, which is 1.0078125. The dropped half 0x20C5 is 8389/65536 = 0.128 of the
    distance. A random number in [0, 65536) is added to the bits before they are cut
    off. In 8389 of 65536 cases this carries into the upper half, and the result is
    1.0078125; otherwise it is 1. The mean is 1 + 0.128 * 0.0078125 = 1.001.

    To float16: 1.001 has neighbours that are a multiple of 2⁻¹⁰, namely 1025 and 1026
    times 2⁻¹⁰. It is 1025.024 times 2⁻¹⁰, so it is rounded up with probability 0.024.
    """
    x = cast(x, jnp.float32)
    info = jnp.finfo(dtype)
    x = clip(x, float(info.max)) + 0 * x  # NaN if x is infinite
    if dtype == jnp.bfloat16:
        total = bits_of(x) + random_bits(x.shape, LOWER_HALF_BITS, axis_bits)
        bits = total & UPPER_HALF
        # A NaN is left out, because a carry could make its bits those of a number.
        return jnp.where(x == x, from_bits(bits), x).astype(dtype)
    # The spacing is 2 ** (exponent of x - bits of the mantissa). Below the smallest
    # normal number it stays the same.
    exponent = bits_of(x) & EXPONENT_FIELD
    least = info.minexp + EXPONENT_BIAS << MANTISSA_BITS
    exponent = jnp.where(exponent > least, exponent, least)
    spacing = from_bits(exponent - (info.nmant << MANTISSA_BITS))
    below = jnp.floor(x / spacing)
    # Random bits as the mantissa of a number in [1, 2), and so a number in [0, 1).
    uniform = from_bits(random_bits(x.shape, MANTISSA_BITS, axis_bits) | ONE) - 1
    up = uniform < x / spacing - below
    return ((below + up.astype(jnp.float32)) * spacing).astype(dtype)


def stochastic_apply_updates(
    params: optax.Params, updates: optax.Updates, key: jax.Array
) -> optax.Params:
    """Add updates to parameters, rounding bfloat16 and float16 ones at random.

        p <- p + u                          rounded up or down at random

    The probabilities are such that the mean of the new parameter is the exact sum. A
    bfloat16 parameter of 1 has neighbours 0.004 below and 0.008 above. An update of
    0.001, rounded to the nearest, never changes it. Rounded at random, one in four such
    updates downwards moves it to the neighbour, and one in eight upwards. Sums are
    computed in float32, or in float64 if the parameter or the update is in float64.
    Parameters in other dtypes are rounded to the nearest.

    Args:
      params: the parameters.
      updates: what the update of a transformation returned, in any floating-point
        dtype, with the structure and shapes of the parameters. None leaves a parameter
        as it is, and the parameter may then be anything.
      key: a JAX PRNG key. Every step needs a new one, because the same key rounds the
        same way: `jax.random.fold_in(key, step)` makes one.

    Returns:
      The new parameters, in the structure, shapes and dtypes of the old. A sum of
      finite numbers is clipped to the range of the dtype. If a parameter or its update
      is infinite, the new parameter is NaN. Rounding at random passes no derivatives.

    Raises:
      TypeError: a key that is not a PRNG key.
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
    key = _typed_key(key)
    _errors.same_tree("updates", updates, "`params`", params)
    structure: Any
    leaves, structure = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    shapes = tuple((0,) if u is None else np.shape(u) for u in leaves)

    def leaf(p: Any, u: Any, axis_bits: list[jax.Array]) -> Any:
        if u is None:
            return p
        sum_dtype = np.result_type(accumulator_dtype_of(p), accumulator_dtype_of(u))
        terms = cast(p, sum_dtype), cast(u, sum_dtype)
        total = within_range(jnp.add(*terms), sum_dtype, *terms)
        if jnp.result_type(p) not in (jnp.bfloat16, jnp.float16):
            return cast(total, jnp.result_type(p))
        return stochastic_round(total, p.dtype, axis_bits)

    rows = zip(
        structure.flatten_up_to(params),
        leaves,
        random_axis_bits(key, shapes),
        strict=True,
    )
    return structure.unflatten(leaf(*row) for row in rows)


def _typed_key(key: Any) -> jax.Array:
    """Check that a value is one PRNG key, typed or (as before) an array of uint32."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if np.shape(key) == ():
            return key
    else:
        raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        if dtype == raw.dtype and np.shape(key) == raw.shape:
            return jax.random.wrap_key_data(key)
    raise TypeError(
        f"`key` must be one PRNG key, got {shown(key)}; jax.random.key(0) makes one"
    )
