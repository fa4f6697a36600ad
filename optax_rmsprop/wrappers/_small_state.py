"""Optimizer states in one or two bytes per number.

This differs from the 8-bit optimizers of bitsandbytes and flashoptim:

1. It wraps an optax transformation, all of whose options apply. It compresses the
   arrays of the state that have the shape of a parameter, and no others.
2. Codes have the parameter's shape, and one format for each row, so both are sharded as
   the parameter is. Blocks of 256 or 32 numbers would cross the shards, and a TPU would
   have to copy the array.
3. Rounding is at random. An average rounded to the nearest level stops moving as soon
   as its steps are shorter than half the distance between levels.
4. A second moment whose format is known becomes 0 only if it is 0, because that would
   lengthen steps.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, SequenceKey, tree_flatten_with_path
from jax.typing import DTypeLike

from optax_rmsprop import _errors
from optax_rmsprop._errors import at, kind_of, short, shown
from optax_rmsprop.wrappers import _codes
from optax_rmsprop.wrappers._codes import Format
from optax_rmsprop.wrappers._repeated import (
    has_large,
    is_compiled,
    repeated,
    slots_of,
)
from optax_rmsprop.wrappers._rounding import (
    GOLDEN_RATIO,
    axis_bits_of_step,
    stochastic_round,
)
from optax_rmsprop.wrappers._transformation import checked

# Of the TPU's compiler: how many operands a loop may have that others are joined into.
OPTION = "xla_tpu_multioutput_fusion_max_operands"
REMEDY = "make it with the init of this transformation"


class Formats(NamedTuple):
    """How the arrays of a `CompressedState` are encoded, now and at the next update.

    Both are a `Format` whose fields have the structure of the state, with None for what
    is not compressed.

    Attributes:
      current: the format of the codes in the state, with which they are decoded.
      next: the format with which the next update encodes its numbers.
    """

    current: Format
    next: Format


class CompressedState(NamedTuple):
    """State of `compress_state`. `decompress_state` converts it back to `tx`'s state.

    Attributes:
      count: int32 scalar, the number of updates made. With the seed, it determines all
        random bits.
      inner: the state of `tx`, in its own structure and shapes. The arrays that are
        compressed consist of uint8 codes or bfloat16 numbers.
      formats: for uint8 a tuple with the fields `current`, the format of the codes, and
        `next`, the format of the codes that the next update makes. Each has `levels`
        and `lowest`, trees in the structure of `inner`: for each compressed array an
        array with an entry for each row, and None for the other leaves. None for
        bfloat16, and if nothing is compressed.
      dtypes: for each leaf of `inner` a 0 in the dtype that it has without compression,
        or None if it is not compressed.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    inner: optax.OptState
    formats: Formats | None
    dtypes: tuple[jax.Array | None, ...]


def compress_state(
    tx: optax.GradientTransformation,
    dtype: DTypeLike,
    *,
    seed: int = 0,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Keep the averages of an optimizer in one or two bytes per number.

        s      = decode(codes)
        u, s   = tx.update(g, s, p)
        codes <- encode(s)                  rounded up or down at random, to a level

    It compresses the arrays of a state s that have the shape of a parameter, whatever
    the transformation. All others stay as they are: `optax.lbfgs` hardly shrinks,
    because its memory has one axis more than the parameters.

    Updates are computed from the exact new state; only the stored state is rounded. The
    probabilities are such that the mean of the stored number is the exact number, in
    each update. So averages move however small their steps are. Rounded to the nearest,
    they would freeze.

    The levels of bfloat16 are 0.4 to 0.8 % of a number apart. Those of uint8 depend on
    the row, which is the last axis of an array, or as many of its last axes as have 64
    numbers. In a row without negative numbers, 244 levels are evenly spaced, in the
    logarithm, from the smallest positive number to the largest: 0.3 % apart if these
    are equal, 3 to 5 % if they differ by 12 octaves, and 17 to 33 % from 61 octaves on.
    Numbers below 2⁻⁸¹ of the largest become the smallest level, and 0 stays 0. In a row
    with both signs, levels are 4 to 8 % apart near the largest number, and 2⁻¹³ of it
    near 0.

    The format of a row comes from the codes of the update before. For numbers that grow
    beyond it there are 8 more levels, 6 times as far apart. Larger numbers are clipped,
    and the range follows by five octaves an update. Positive numbers that are smaller
    than all others of the row were become the smallest level, and the range follows by
    four octaves: a number that was 0, or one with a decay below 0.87 whose gradients
    vanish, is then too large, and its steps too short, until the average has forgotten
    it. The first negative numbers of a row that had none become 0 for an update. After
    a row was all 0, two ranges are tried in turn, [2⁻⁶², 2⁶⁴] and [2⁻¹²⁶, 1], with
    levels a factor of 2 apart. For that update, larger numbers are clipped, and smaller
    ones may become 0. NaN does not change the format.

    On a TPU, a step can be one loop that reads and writes each array once. With uint8
    and more than one average, XLA makes this loop only with an environment variable,
    set before JAX's first program:

        LIBTPU_INIT_ARGS=--xla_tpu_multioutput_fusion_max_operands=64

    Args:
      tx: any optax transformation. In a chain, wrap the part whose state is large. With
        float64 parameters, let it average in float32 (in rmsprop by
        accumulator_dtype=jnp.float32), because codes have the range of float32.
      dtype: jnp.bfloat16 or jnp.uint8.
      seed: a Python integer in [0, 2³²). The same seed gives the same bits, also in
        the shards of `jax.shard_map`, the runs of `jax.vmap`, and the parts of a chain.
      min_size: arrays with fewer elements than this are not compressed, in [0, ∞).

    Returns:
      A transformation that makes the updates of `tx`, and whose state is a
      `CompressedState`. It compresses the floating-point arrays of tx's state that have
      the shape of a parameter, at least `min_size` elements and one axis, and more
      bytes than in `dtype`. The rest is stored as it is. To each row of at least 64
      numbers uint8 adds 6 bytes, and both add 4 bytes to each array. Under
      `jax.shard_map`, where shapes and sizes are those of a shard, partition `formats`
      as the parameters.

    Raises:
      TypeError: a `tx` that is not an optax transformation; a seed or size that is not
        an integer; an array of the state that does not stay floating point.
      ValueError: another dtype; a number out of its range; a large array of the state
        in float64 or of integers; a state that is compressed already, that was made
        with another dtype, or that is not compressed.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rmsprop import rmsprop, wrappers
      >>> tx = wrappers.compress_state(rmsprop(), jnp.uint8)
      >>> params = jnp.zeros((64, 64))
      >>> state = tx.init(params)
      >>> state.inner[0].nu.dtype, state.inner[0].nu.nbytes
      (dtype('uint8'), 4096)

    Differs from bitsandbytes and flashoptim: see the head of this module.

    References:
      Weyl, Über die Gleichverteilung von Zahlen mod. Eins, 1916: the sequence that
      spreads random bits over the steps.
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
    """
    tx = checked(tx)
    dtype = _storage_dtype(dtype)
    seed = _errors.integer("seed", seed, high=2**32)
    min_size = _errors.integer("min_size", min_size)

    def init_fn(params: optax.Params) -> CompressedState:
        inner = tx.init(params)
        if _has_compressed(inner):
            raise ValueError(
                "`tx` must have a state that is not compressed, got one with a "
                "CompressedState; call compress_state once"
            )
        count = jnp.zeros([], jnp.int32)
        if not jax.tree.leaves(params):
            # No parameters, or placeholders with which optax.tree_map_params calls
            # init to find out where parameters are. It then maps over `inner` alone,
            # if each of the other fields is a single leaf.
            return CompressedState(count, inner, *jnp.zeros(2, jnp.int32))
        shapes = {np.shape(p) for p in jax.tree.leaves(params)}

        def own_dtype(path: Any, x: Any) -> jax.Array | None:
            """Return 0 in the dtype of a leaf that is to be compressed, else None."""
            shape, size = np.shape(x), np.size(x)
            of_parameter = shape in shapes and shape != ()
            if not of_parameter or size == 0 or size < min_size:
                return None
            _check_compressible(x, path)
            floating = jnp.issubdtype(x.dtype, jnp.floating)
            saves = x.dtype.itemsize > dtype.itemsize
            return jnp.zeros([], x.dtype) if floating and saves else None

        dtypes = tuple(own_dtype(*leaf) for leaf in tree_flatten_with_path(inner)[0])
        formats = None
        if dtype == jnp.uint8 and (arrays := _compressed_arrays(inner, dtypes)):
            formats = [_codes.first_format(x) for _, x in arrays]
        return _compress(count, inner, formats, dtypes, seed)

    def update_fn(
        updates: optax.Updates,
        state: CompressedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CompressedState]:
        _check_state(state, dtype)

        def update(updates: Any, state: Any, params: Any, extra_args: Any) -> Any:
            return tx.update(updates, _decompress(state), params, **extra_args)

        arguments = updates, state, params, extra_args
        if has_large(arguments) and _joins_loops(dtype) and is_compiled():
            # True, and distinct. For a TPU, XLA removes barriers before it looks for
            # equal computations.
            masks = ((state.count | n) != 0 for n in itertools.count(1))
            updates, inner = repeated(update, arguments, _sources, masks)
        else:
            updates, inner = update(*arguments)
        dtypes = _dtypes(state)
        arrays = _compressed_arrays(inner, dtypes)
        for path, x in arrays:
            remedy = "as it was in init"
            _errors.inexact("state", x, path, remedy=remedy, real=True)
        count = optax.safe_increment(state.count)
        if not arrays:
            return updates, state._replace(count=count, inner=inner)
        formats = None if state.formats is None else _formats_of(state)[1]
        return updates, _compress(count, inner, formats, dtypes, seed)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def decompress_state(state: optax.OptState) -> optax.OptState:
    """Replace every `CompressedState` in a state by the state of its transformation.

    Use it to read averages, to continue without compression, or before `to_torch`.

    Args:
      state: the state of `compress_state`, or of a chain or another transformation that
        contains it.

    Returns:
      The state that the same transformations have without `compress_state`, in its
      structure, shapes and dtypes, with the numbers that the codes stand for.

    Raises:
      ValueError: a state without a `CompressedState`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_rmsprop import wrappers
      >>> tx = wrappers.compress_state(optax.adam(0.1), jnp.bfloat16, min_size=1)
      >>> state = tx.init(jnp.ones(2))
      >>> optax.tree.get(wrappers.decompress_state(state), "nu")
      Array([0., 0.], dtype=float32)

    References:
      `compress_state`.
    """
    if not _has_compressed(state):
        raise ValueError(
            "`state` must have a CompressedState in it, got "
            f"{short(str(jax.tree.structure(state)))}; it is not compressed: "
            "use it as it is"
        )

    def part(x: Any) -> Any:
        if not _is_compressed(x):
            return x
        _check_formats(x)
        return _decompress(x)

    return jax.tree.map(part, state, is_leaf=_is_compressed)


def _storage_dtype(dtype: Any) -> np.dtype:
    """Return the dtype that a state is to be compressed to: bfloat16 or uint8."""
    given = _errors.as_dtype(dtype)
    if given is None:
        raise ValueError(
            f"`dtype` must be bfloat16 or uint8, got {shown(dtype)}; pass jnp.uint8"
        )
    if given not in (jnp.bfloat16, jnp.uint8):
        why = "it saves nothing: leave compress_state out"
        if given.itemsize == 1:
            why = "uint8 has a scale and more range in the same byte"
        elif given.itemsize == 2:
            why = "bfloat16 has the range of float32 in the same bytes"
        raise ValueError(
            f"`dtype` must be bfloat16 or uint8, got {short(str(given))}; {why}"
        )
    return given


def _check_compressible(leaf: Any, path: Any) -> None:
    """Check that a large array of a state is floating point, and not in float64."""
    dtype = jnp.result_type(leaf)
    why = ""
    if jnp.issubdtype(dtype, jnp.integer):
        why = (
            "leave integer parameters out with optax.masked, and wrap compress_state "
            "in master_weights, not the reverse"
        )
    elif dtype == jnp.float64:
        why = (
            "codes have the range of float32: keep averages in float32, in rmsprop by "
            "accumulator_dtype=jnp.float32"
        )
    if why:
        raise ValueError(
            "`tx` must keep floating-point numbers of at most 32 bits in a "
            f"parameter's shape, got {dtype} at {at(path)}; {why}"
        )


def _check_state(state: Any, dtype: np.dtype) -> None:
    """Check that a state is compressed to this dtype, and complete."""
    _errors.same_state(state, CompressedState)
    _errors.count("state", state.count)
    _check_formats(state)
    dtypes = _dtypes(state)
    for path, x in _compressed_arrays(state.inner, dtypes):
        given = _errors.dtype_of(x)
        if given != dtype:
            raise ValueError(
                f"`state` must be compressed to {dtype}, got {given or kind_of(x)} at "
                f"{at(path)}; use the dtype with which it was made, or call init again"
            )
    for i, own in enumerate(dtypes):
        if own is not None:
            path = GetAttrKey("dtypes"), SequenceKey(i)
            _errors.inexact("state", own, path, remedy=REMEDY, real=True)


def _check_formats(state: CompressedState) -> None:
    """Check that a state has dtypes for all leaves, and formats for all codes."""
    dtypes = _dtypes(state)
    size = len(jax.tree.leaves(state.inner))
    rows = []
    if len(dtypes) == size:
        arrays = [x for _, x in _compressed_arrays(state.inner, dtypes)]
        codes = [x for x in arrays if _errors.dtype_of(x) == jnp.uint8]
        rows = [_codes.rows_of(np.shape(x)) for x in codes]
    fields = [(shape, name) for name in ("uint8", "int16") for shape in rows]
    expected = fields * len(Formats._fields)
    has_dtypes = any(own is not None for own in dtypes)
    formats = jax.tree.leaves(state.formats if has_dtypes else ())
    found = [(np.shape(x), str(_errors.dtype_of(x))) for x in formats]
    if len(dtypes) != size or found != expected:
        raise ValueError(
            f"`state` must have `dtypes` for {size} leaves and `formats` "
            f"{short(str(expected))}, got {len(dtypes)} and {short(str(found))}; "
            f"{REMEDY}"
        )


def _compress(
    count: jax.Array,
    inner: optax.OptState,
    formats: Sequence[Format] | None,
    dtypes: tuple[jax.Array | None, ...],
    seed: int,
) -> CompressedState:
    """Compress an inner state: to codes in these formats, or to bfloat16 if None."""
    arrays = [x for _, x in _compressed_arrays(inner, dtypes)]
    shapes = tuple(x.shape for x in arrays)
    axis_bits = axis_bits_of_step(np.uint32(seed ^ GOLDEN_RATIO), count, shapes)
    if formats is None:
        pairs = zip(arrays, axis_bits, strict=True)
        new = [stochastic_round(x, jnp.bfloat16, bits) for x, bits in pairs]
        return CompressedState(count, _replaced(inner, dtypes, new), None, dtypes)
    encoded = [
        _codes.encode(*row) for row in zip(arrays, formats, axis_bits, strict=True)
    ]
    following = [
        _codes.next_format(format, *extremes)
        for format, (_, *extremes) in zip(formats, encoded, strict=True)
    ]

    def in_structure(formats: Sequence[Format]) -> Format:
        fields = zip(*formats, strict=True)
        return Format(*(_replaced(inner, dtypes, field, only=True) for field in fields))

    inner = _replaced(inner, dtypes, [codes for codes, *_ in encoded])
    both = Formats(in_structure(formats), in_structure(following))
    return CompressedState(count, inner, both, dtypes)


def _joins_loops(dtype: np.dtype) -> bool:
    """Whether XLA makes one loop of those that compute the slots and the parameters.

    It does so for TPUs. Codes have too many operands for its default limit, mostly the
    formats of rows: their loops would stay, and each read its arrays again.
    """
    if jax.default_backend() != "tpu":
        return False
    return dtype != jnp.uint8 or OPTION in os.environ.get("LIBTPU_INIT_ARGS", "")


def _sources(updates: optax.Updates, inner: optax.OptState) -> list[int]:
    """The computation from which each leaf of the results is taken on a TPU.

    Each slot of a parameter comes from one of its own, and what is added to the
    parameter from another. From a single one, XLA would store in float32 what is costly
    and needed for several of them, such as the momentum.
    """
    names, slots = slots_of(updates, inner)
    of_updates = [len(slots.get(name, ())) for name in names]
    of_state = [0] * len(jax.tree.leaves(inner))
    for numbers in slots.values():
        for source, number in enumerate(numbers):
            of_state[number] = source
    return [*of_updates, *of_state]


def _decompress(state: CompressedState) -> optax.OptState:
    dtypes = _dtypes(state)
    arrays = [x for _, x in _compressed_arrays(state.inner, dtypes)]
    if not arrays:
        return state.inner
    own_dtypes = [_errors.dtype_of(own) for own in dtypes if own is not None]
    if state.formats is None:
        new = [x.astype(dtype) for x, dtype in zip(arrays, own_dtypes, strict=True)]
    else:
        rows = zip(arrays, _formats_of(state)[0], own_dtypes, strict=True)
        new = [_codes.decode(*row) for row in rows]
    return _replaced(state.inner, dtypes, new)


def _dtypes(state: CompressedState) -> tuple[jax.Array | None, ...]:
    """Return the entry of `dtypes` for each leaf of `inner`.

    A state without parameters has a placeholder there: nothing is compressed.
    """
    if isinstance(state.dtypes, tuple | list):
        return tuple(state.dtypes)
    return (None,) * len(jax.tree.leaves(state.inner))


def _compressed_arrays(
    inner: optax.OptState, dtypes: tuple[jax.Array | None, ...]
) -> list[tuple[Any, jax.Array]]:
    """Return path and value of each array that is or will be compressed."""
    leaves, _ = tree_flatten_with_path(inner)
    pairs = zip(leaves, dtypes, strict=True)
    return [leaf for leaf, own in pairs if own is not None]


def _replaced(
    inner: optax.OptState,
    dtypes: tuple[jax.Array | None, ...],
    new: Sequence[jax.Array],
    *,
    only: bool = False,
) -> optax.OptState:
    """Replace the arrays that are or will be compressed by the arrays of `new`.

    `only`: replace all others by None.
    """
    replacements = iter(new)
    others = itertools.repeat(None) if only else jax.tree.leaves(inner)
    pairs = zip(others, dtypes, strict=not only)
    leaves = [x if own is None else next(replacements) for x, own in pairs]
    return jax.tree.unflatten(jax.tree.structure(inner), leaves)


def _formats_of(state: CompressedState) -> tuple[list[Format], list[Format]]:
    """Return the current and the next format of each compressed array.

    They are taken from the leaves, because a restored checkpoint may have lists or
    dicts in place of the named tuples.
    """
    leaves = jax.tree.leaves(state.formats)
    size = len(leaves) // len(Formats._fields) // len(Format._fields)
    levels, lowest, next_levels, next_lowest = (
        leaves[i * size : (i + 1) * size] for i in range(4)
    )
    current = list(map(Format, levels, lowest))
    return current, list(map(Format, next_levels, next_lowest))


def _is_compressed(x: Any) -> bool:
    return isinstance(x, CompressedState)


def _has_compressed(state: optax.OptState) -> bool:
    leaves = jax.tree.leaves(state, is_leaf=_is_compressed)
    return any(map(_is_compressed, leaves))
