"""Optimizer states of one or two bytes per number, and 16-bit parameters that learn.

Where this differs from the 8-bit optimizers of bitsandbytes:

1. It wraps any optax transformation, on any backend, and all of its options apply.
2. Codes have the parameter's shape and one scale an array, so they are sharded as the
   parameter is. Blocks of 256 would cut across, and cost a TPU copies of the array.
3. Rounding is at random. To the nearest, an average of steady numbers comes to rest.
4. A second moment does not become 0 where its scale is known: it would lengthen steps.
"""

import functools
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
from optax_rmsprop._numerics import cast
from optax_rmsprop.wrappers import _codes
from optax_rmsprop.wrappers._codes import Format
from optax_rmsprop.wrappers._rounding import random_words, stochastic_round


class CompressedState(NamedTuple):
    """State of `compress_state`; `decompress_state` makes that of `tx` of it.

    Attributes:
      count: int32 scalar, the number of updates made. With the seed, all randomness
        comes from it.
      inner: the state of `tx`, in its own structure and shapes, with uint8 codes or
        bfloat16 numbers in place of those of the arrays that are compressed.
      formats: for uint8, how the arrays are decoded, and how the next numbers will be
        encoded: vectors with an entry for each array. For bfloat16, or if nothing is
        compressed, None.
      dtypes: for each leaf of `inner` a 0 in its own dtype, None if it is not
        compressed.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    inner: optax.OptState
    formats: tuple[Format, Format] | None
    dtypes: tuple[jax.Array | None, ...]


def compress_state(
    tx: optax.GradientTransformation,
    dtype: DTypeLike,
    *,
    seed: int = 0,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Keep the state of any optax transformation in one or two bytes per number.

        s      = decode(codes)
        u, s   = tx.update(g, s, p)
        codes <- encode(s)                  up or down at random, to a level next to s

    Updates are made of the exact new state; only what is kept is rounded. The odds are
    those that make its mean the exact number, so that averages move however small
    their steps are: rounding to the nearest would freeze them.

    bfloat16 has levels 0.4 to 0.8 % of a number apart. uint8 has, in a non-negative
    array, levels some 5 % apart near its largest number, 12 % at 2⁻¹⁰ of it, and the
    last at about 2⁻³⁵: smaller numbers become that one, not 0. In an array with both
    signs they are 10 % apart, 23 % at 2⁻¹⁰, and the last before 0 at about 2⁻²⁷.

    After an array was all 0, numbers are looked for in [2⁻⁶², 2⁶⁵] and [2⁻¹²⁶, 2] in
    turn, with levels a factor of 2 apart. For that update, larger ones are held at the
    end and smaller ones may become 0. So are, for an update or more, numbers over 4
    times the largest before, and the first negative ones of an array that had none
    become 0. While an array has a NaN, its scale stays.

    Args:
      tx: any optax transformation. Chained, wrap the part whose state is large. With
        float64 parameters keep its averages in float32 (in rmsprop by
        accumulator_dtype=jnp.float32): what is kept has the range of float32.
      dtype: jnp.bfloat16 or jnp.uint8.
      seed: a Python integer in [0, 2³²). The same seed gives the same bits, also in
        the shards of `jax.shard_map`, the runs of `jax.vmap`, and the parts of a chain.
      min_size: the least number of elements, in [0, ∞), of an array that is compressed.

    Returns:
      A transformation with the updates of `tx`, and with `CompressedState`. Compressed
      are tx's floating-point arrays that have a parameter's shape, at least `min_size`
      elements and one axis, and more bytes than `dtype`; all else is kept as it is. For
      each, uint8 adds 20 bytes and bfloat16 4. Under `jax.shard_map`, where
      shapes and sizes are a shard's, partition `formats` over all axes of the mesh that
      partition an array: every shard has its own. Else they are replicated, as
      `jax.jit(tx.init)` makes them.

    Raises:
      TypeError: a `tx` that is no optax transformation; a seed or size that is no
        integer; an array of the state that does not stay floating point.
      ValueError: another dtype; a number out of its range; a large array of the state
        in float64 or of integers; a state that is compressed already, or made with
        another dtype or without compression.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rmsprop import rmsprop, wrappers
      >>> tx = wrappers.compress_state(rmsprop(), jnp.uint8)
      >>> params = jnp.zeros((64, 64))
      >>> state = tx.init(params)
      >>> state.inner[0].nu.dtype, state.inner[0].nu.nbytes
      (dtype('uint8'), 4096)

    Differs from bitsandbytes: see the head of this module.

    References:
      Box, Cox, An Analysis of Transformations, 1964: the levels of uint8.
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"`tx` must be an optax.GradientTransformation, got {shown(tx)}; "
            "of optax.MultiSteps pass its gradient_transformation()"
        )
    dtype = _storage_dtype(dtype)
    seed = _errors.integer("seed", seed, high=2**32)
    min_size = _errors.integer("min_size", min_size)
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> CompressedState:
        inner = tx.init(params)
        if _has_compressed(inner):
            raise ValueError(
                "`tx` must have a state that is not compressed, got one with a "
                "CompressedState; call compress_state once"
            )
        count = jnp.zeros([], jnp.int32)
        if not jax.tree.leaves(params):
            # None, or those for which optax.tree_map_params has a placeholder: it maps
            # over `inner` alone if the other fields are one leaf each.
            return CompressedState(count, inner, *jnp.zeros(2, jnp.int32))
        shapes = {np.shape(p) for p in jax.tree.leaves(params)}

        def dtype_of(path: Any, x: Any) -> jax.Array | None:
            shape, size = np.shape(x), np.size(x)
            of_parameter = shape in shapes and shape != ()
            if not of_parameter or size == 0 or size < min_size:
                return None
            _check_compressible(x, path)
            floating = jnp.issubdtype(x.dtype, jnp.floating)
            saves = x.dtype.itemsize > dtype.itemsize
            return jnp.zeros([], x.dtype) if floating and saves else None

        dtypes = tuple(dtype_of(*leaf) for leaf in tree_flatten_with_path(inner)[0])
        format = None
        if dtype == jnp.uint8 and (arrays := _selected(inner, dtypes)):
            wide = [cast(x, jnp.float32) for _, x in arrays]
            lowest, highest = ([f(x) for x in wide] for f in (jnp.min, jnp.max))
            format = _codes.first_format(jnp.stack(lowest), jnp.stack(highest))
        return _compress(count, inner, format, dtypes, seed)

    def update_fn(
        updates: optax.Updates,
        state: CompressedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CompressedState]:
        _errors.same_state(state, CompressedState)
        _errors.count("state", state.count)
        dtypes = _dtypes(state)
        leaves, compressed = jax.tree.leaves(state.inner), len(jax.tree.leaves(dtypes))
        whole = len(dtypes) == len(leaves)
        for path, x in _selected(state.inner, dtypes) if whole else ():
            _check_stored(x, dtype, path)
        formats = state.formats if compressed and state.formats is not None else ()
        is_vector = lambda x: not isinstance(x, tuple | list)  # noqa: E731
        given = [np.shape(x) for x in jax.tree.leaves(formats, is_leaf=is_vector)]
        has_formats = compressed and dtype == jnp.uint8
        expected = [(compressed,)] * 2 * len(Format._fields) if has_formats else []
        remedy = "make it with the init of this transformation"
        if not whole or given != expected:
            raise ValueError(
                f"`state` must have `dtypes` for {len(leaves)} leaves and `formats` of "
                f"shapes {expected}, got {len(dtypes)} and "
                f"{short(str(given))}; {remedy}"
            )
        for i, own in enumerate(dtypes):
            if own is not None:
                path = GetAttrKey("dtypes"), SequenceKey(i)
                _errors.inexact("state", own, path, remedy=remedy, real=True)
        old = decompress_state(state)
        updates, inner = tx.update(updates, old, params, **extra_args)
        for path, x in _selected(inner, dtypes):
            remedy = "as it was in init"
            _errors.inexact("state", x, path, remedy=remedy, real=True)
        count = optax.safe_increment(state.count)
        if not compressed:
            return updates, state._replace(count=count, inner=inner)
        format = state.formats and state.formats[1]
        return updates, _compress(count, inner, format, dtypes, seed)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def decompress_state(state: optax.OptState) -> optax.OptState:
    """Turn every `CompressedState` in a state into that of the wrapped transformation.

    To read averages, to continue without compression, or for `to_torch`.

    Args:
      state: the state of `compress_state`, or of a chain or another transformation
        around it.

    Returns:
      The state that the same transformations have without `compress_state`, in the
      shapes and dtypes it had there. It holds what the codes stand for.

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
        return _decompress(x) if _is_compressed(x) else x

    return jax.tree.map(part, state, is_leaf=_is_compressed)


def _storage_dtype(dtype: Any) -> np.dtype:
    """Check the dtype in which to keep a state: bfloat16 or uint8."""
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


def _check_stored(leaf: Any, dtype: np.dtype, path: Any) -> None:
    """Check the dtype in which an array of a state has been kept."""
    given = _errors.dtype_of(leaf)
    if given != dtype:
        raise ValueError(
            f"`state` must be compressed to {dtype}, got {given or kind_of(leaf)} at "
            f"{at(path)}; use the dtype with which it was made, or call init again"
        )


def _check_compressible(leaf: Any, path: Any) -> None:
    """Check that a large array of a state has numbers in the range of float32."""
    dtype = jnp.result_type(leaf)
    why = ""
    if jnp.issubdtype(dtype, jnp.integer):
        why = "leave integer parameters out with optax.masked"
    elif dtype == jnp.float64:
        why = (
            "what is kept has the range of float32: keep averages in float32, in "
            "rmsprop by accumulator_dtype=jnp.float32"
        )
    if why:
        raise ValueError(
            "`tx` must keep floating-point numbers of at most 32 bits in a "
            f"parameter's shape, got {dtype} at {at(path)}; {why}"
        )


def _compress(
    count: jax.Array,
    inner: optax.OptState,
    format: Format | None,
    dtypes: tuple[jax.Array | None, ...],
    seed: int,
) -> CompressedState:
    """The state of this count and inner state: in bfloat16 if there is no format."""
    arrays = [x for _, x in _selected(inner, dtypes)]
    key = jax.random.key(np.uint32(seed), impl="threefry2x32")
    key = jax.random.fold_in(key, count)
    words = random_words(key, [x.shape for x in arrays])
    if format is None:
        pairs = zip(arrays, words, strict=True)
        new = [stochastic_round(x, jnp.bfloat16, its_words) for x, its_words in pairs]
        return CompressedState(count, _replaced(inner, dtypes, new), None, dtypes)
    rows = zip(arrays, _entries(format), words, strict=True)
    codes, lowest, highest = zip(*(_codes.encode(*row) for row in rows), strict=True)
    following = _codes.next_format(format, jnp.stack(lowest), jnp.stack(highest))
    inner = _replaced(inner, dtypes, codes)
    return CompressedState(count, inner, (format, following), dtypes)


def _decompress(state: CompressedState) -> optax.OptState:
    dtypes = _dtypes(state)
    arrays = [x for _, x in _selected(state.inner, dtypes)]
    owns = [_errors.dtype_of(own) for own in dtypes if own is not None]
    if not state.formats:
        new = [x.astype(own) for x, own in zip(arrays, owns, strict=True)]
    else:
        rows = zip(arrays, _entries(state.formats[0]), owns, strict=True)
        new = [_codes.decode(*row) for row in rows]
    return _replaced(state.inner, dtypes, new)


def _dtypes(state: CompressedState) -> tuple[jax.Array | None, ...]:
    """For each leaf of the inner state; of no parameters there are none."""
    if isinstance(state.dtypes, tuple | list):
        return tuple(state.dtypes)
    return (None,) * len(jax.tree.leaves(state.inner))


def _selected(
    inner: optax.OptState, dtypes: tuple[jax.Array | None, ...]
) -> list[tuple[Any, jax.Array]]:
    """Path and value of each array that is compressed."""
    leaves, _ = tree_flatten_with_path(inner)
    pairs = zip(leaves, dtypes, strict=True)
    return [leaf for leaf, own in pairs if own is not None]


def _replaced(
    inner: optax.OptState,
    dtypes: tuple[jax.Array | None, ...],
    new: Sequence[jax.Array],
) -> optax.OptState:
    """The state with others in place of the arrays that are compressed."""
    following = iter(new)
    pairs = zip(jax.tree.leaves(inner), dtypes, strict=True)
    leaves = [x if own is None else next(following) for x, own in pairs]
    return jax.tree.unflatten(jax.tree.structure(inner), leaves)


def _entries(vectors: Any) -> list[Any]:
    """A tree of vectors as a list of trees of scalars."""
    size = len(jax.tree.leaves(vectors)[0])
    entry = functools.partial(jax.lax.index_in_dim, keepdims=False)
    return [
        jax.tree.map(functools.partial(entry, index=i), vectors) for i in range(size)
    ]


def _is_compressed(x: Any) -> bool:
    return isinstance(x, CompressedState)


def _has_compressed(state: optax.OptState) -> bool:
    leaves = jax.tree.leaves(state, is_leaf=_is_compressed)
    return any(map(_is_compressed, leaves))
