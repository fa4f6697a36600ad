"""Optimizer states of one or two bytes a number, and 16-bit parameters that learn.

Where this differs from the 8-bit optimizers of bitsandbytes:

1. It wraps any optax transformation, on any backend, and all of its options apply.
2. Codes have the parameter's shape and one scale an array, so they are sharded as the
   parameter is. Blocks of 256 would cut across, and cost a TPU copies of the array.
3. Rounding is at random. To the nearest, an average of steady numbers comes to rest.
4. A second moment does not become 0 where its scale is known: it would lengthen steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_flatten_with_path
from jax.typing import DTypeLike

from optax_rmsprop import _checks
from optax_rmsprop._codes import Scale, decode, encode, encode_first
from optax_rmsprop._rounding import salt, stochastic_round


class CompressedState(NamedTuple):
    """State of `compress_state`; `decompress_state` makes that of `tx` of it.

    Attributes:
      count: int32 scalar, the number of updates made. With the seed, all randomness
        comes from it.
      inner: the state of `tx`, in its own structure and shapes, with uint8 codes or
        bfloat16 numbers in place of those of the arrays that are compressed.
      scales: for each leaf of `inner`, how it is decoded: (kind, exponent, highest) for
        uint8, a 0 of the original dtype for bfloat16, None if it is not compressed.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    inner: optax.OptState
    scales: tuple[Any, ...]


def compress_state(
    tx: optax.GradientTransformation,
    dtype: DTypeLike,
    *,
    seed: int = 0,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Keep the state of any optax transformation in one or two bytes a number.

        s      = decode(codes)
        u, s   = tx.update(g, s, p)
        codes <- encode(s)                  up or down at random, to a level next to s

    Updates are made of the exact new state; only what is kept is rounded. The odds are
    those that make its mean the exact number, so that averages move however small
    their steps are: rounding to the nearest would freeze them.

    bfloat16 has levels 0.4 to 0.8 % of a number apart. uint8 has, in a non-negative
    array, levels some 5 % apart near its largest number, 12 % at 2⁻¹⁰ of it, and the
    last at 2⁻³⁵: smaller numbers become that one, not 0. In an array with both signs
    they are 10 % apart, 23 % at 2⁻¹⁰, and the last before 0 at 2⁻²⁷. For one or two
    updates after an array was all 0 they are a factor of 2 apart, over 126 octaves.
    For a step or more, a number over 4 times the largest before may be held at such a
    multiple, and the first negative ones of an array that had none become 0. While an
    array has a NaN, its scale stays.

    Args:
      tx: any optax transformation. Chained, wrap the part whose state is large.
      dtype: jnp.bfloat16 or jnp.uint8.
      seed: a Python integer in [0, 2³²). The same seed gives the same bits, also in
        the shards of `jax.shard_map`, the runs of `jax.vmap`, and the parts of a chain.
      min_size: the least number of elements, in [0, ∞), of an array that is compressed.

    Returns:
      A transformation with the updates of `tx`, and with `CompressedState`. Compressed
      are tx's floating-point arrays that have a parameter's shape, at least `min_size`
      elements and one axis, and more bytes than `dtype`; all else is kept as it is. For
      each, uint8 adds three numbers and bfloat16 one, all of the array's rank: under
      `jax.shard_map`, where shapes and sizes are a shard's, the array's partition
      serves them too; else they are replicated, as `jax.jit(tx.init)` makes them.

    Raises:
      TypeError: a `tx` that is no optax transformation; a seed or size that is no
        integer; an array of the state that does not stay floating point.
      ValueError: another dtype; a number out of its range; a state that is compressed
        already, or made with another dtype or without compression.

    Example:
      >>> import jax.numpy as jnp, optax_rmsprop
      >>> tx = optax_rmsprop.compress_state(optax_rmsprop.rmsprop(), jnp.uint8)
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
            f"`tx` must be an optax.GradientTransformation, got {tx!r}; of "
            "optax.MultiSteps pass its gradient_transformation()"
        )
    dtype = _checks.storage_dtype("dtype", dtype)
    seed = _checks.integer("seed", seed, high=2**32)
    min_size = _checks.integer("min_size", min_size)
    tx = optax.with_extra_args_support(tx)
    first, following = _ENCODERS[dtype.name]

    def init_fn(params: optax.Params) -> CompressedState:
        inner = tx.init(params)
        if _has_compressed(inner):
            raise ValueError(
                "`tx` must have a state that is not compressed, got one with a "
                "CompressedState; call compress_state once"
            )
        shapes = {np.shape(p) for p in jax.tree.leaves(params)}
        count = jnp.zeros([], jnp.int32)

        def leaf(i: int, path: Any, x: Any) -> tuple[Any, Any]:
            shape, size = np.shape(x), np.size(x)
            of_parameter = shape in shapes and shape != ()
            if not of_parameter or size == 0 or size < min_size:
                return x, None
            _checks.not_integer("tx", x, path)
            floating = jnp.issubdtype(x.dtype, jnp.floating)
            saves = x.dtype.itemsize > dtype.itemsize
            return first(x, salt(seed, count, i)) if floating and saves else (x, None)

        return CompressedState(count, *_rebuild(leaf, inner))

    def update_fn(
        updates: optax.Updates,
        state: CompressedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CompressedState]:
        _checks.same_state(state, CompressedState)
        leaves, _ = tree_flatten_with_path(state.inner)
        for (path, x), scale in zip(leaves, state.scales, strict=True):
            if scale is not None:
                _checks.stored_as("state", x, dtype, path)
        old = decompress_state(state)
        updates, inner = tx.update(updates, old, params, **extra_args)
        count = optax.safe_increment(state.count)

        def leaf(i: int, path: Any, x: Any) -> tuple[Any, Any]:
            scale = state.scales[i]
            if scale is None:
                return x, None
            remedy = "as it was in init"
            _checks.inexact("state", x, path, remedy=remedy, real=True)
            return following(x, scale, salt(seed, count, i))

        return updates, CompressedState(count, *_rebuild(leaf, inner))

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
      >>> import jax.numpy as jnp, optax, optax_rmsprop
      >>> tx = optax_rmsprop.compress_state(optax.adam(0.1), jnp.bfloat16, min_size=1)
      >>> state = tx.init(jnp.ones(2))
      >>> optax.tree.get(optax_rmsprop.decompress_state(state), "nu")
      Array([0., 0.], dtype=float32)

    References:
      `compress_state`.
    """
    if not _has_compressed(state):
        raise ValueError(
            "`state` must have a CompressedState in it, got "
            f"{jax.tree.structure(state)}; it is not compressed: use it as it is"
        )

    def part(x: Any) -> Any:
        if not _is_compressed(x):
            return x
        leaves = map(_decode, jax.tree.leaves(x.inner), x.scales)
        return jax.tree.unflatten(jax.tree.structure(x.inner), leaves)

    return jax.tree.map(part, state, is_leaf=_is_compressed)


def stochastic_apply_updates(
    params: optax.Params, updates: optax.Updates, key: jax.Array
) -> optax.Params:
    """Add updates to parameters, rounding bfloat16 and float16 ones at random.

        p <- p + u                          up or down at random, to a level next to it

    The odds are those that make the mean of the new parameter the exact sum. A bfloat16
    parameter of 1 has neighbours 0.004 and 0.008 away: rounded to the nearest, an
    update of 0.001 leaves it where it is, for ever; rounded at random, every fourth or
    eighth such update moves it by a whole level. Sums are made in float32. Parameters
    in other dtypes get `optax.apply_updates`.

    Args:
      params: the parameters.
      updates: what a transformation's update returned for them, in any floating dtype:
        the same structure and shapes, or None where a parameter stays as it is.
      key: a JAX PRNG key, a new one for every step: the same key rounds every step the
        same way. `jax.random.fold_in(key, step)` makes one.

    Returns:
      The new parameters, in the structure, shapes and dtypes of the old. What is finite
      stays finite; infinity becomes NaN in bfloat16 and float16. Rounding passes no
      derivatives.

    Raises:
      TypeError: a key that is none.
      ValueError: updates that do not have the parameters' structure and shapes.

    Example:
      >>> import jax, jax.numpy as jnp, optax_rmsprop
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> updates = jnp.full(10_000, 1e-3)
      >>> key = jax.random.key(0)
      >>> new = optax_rmsprop.stochastic_apply_updates(params, updates, key)
      >>> round(float(new.astype(jnp.float32).mean()), 4)
      1.001

    References:
      Gupta et al., Deep Learning with Limited Numerical Precision, arXiv:1502.02551.
    """
    _checks.prng_key("key", key)
    _checks.same_tree("updates", updates, "`params`", params)
    leaves = jax.tree.leaves(params)
    treedef: Any = jax.tree.structure(params)
    salts = jax.random.bits(key, (len(leaves),), jnp.uint32)

    def leaf(p: Any, u: Any, salt: jax.Array) -> Any:
        if u is None or jnp.result_type(p) not in (jnp.bfloat16, jnp.float16):
            return optax.apply_updates(p, jnp.zeros_like(p) if u is None else u)
        exact = jnp.asarray(p, jnp.float32) + jnp.asarray(u, jnp.float32)
        return stochastic_round(exact, p.dtype, salt)

    rows = zip(leaves, treedef.flatten_up_to(updates), salts, strict=True)
    return treedef.unflatten(leaf(*row) for row in rows)


def _round(x: jax.Array, salt: jax.Array) -> tuple[jax.Array, jax.Array]:
    zero = jnp.zeros((1,) * x.ndim, x.dtype)
    return stochastic_round(x, jnp.bfloat16, salt), zero


# For each dtype, what encodes the first numbers of an array, and those after a scale.
_ENCODERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "bfloat16": (_round, lambda x, last, salt: _round(x, salt)),
    "uint8": (encode_first, encode),
}


def _decode(x: jax.Array, scale: Any) -> jax.Array:
    if isinstance(scale, Scale):
        return decode(x, scale)
    return x if scale is None else x.astype(scale.dtype)


def _is_compressed(x: Any) -> bool:
    return isinstance(x, CompressedState)


def _has_compressed(state: optax.OptState) -> bool:
    leaves = jax.tree.leaves(state, is_leaf=_is_compressed)
    return any(map(_is_compressed, leaves))


def _rebuild(
    f: Callable[[int, Any, Any], tuple[Any, Any]], state: optax.OptState
) -> tuple[optax.OptState, tuple[Any, ...]]:
    """Apply f to the number, path and value of each leaf: new leaves, and scales."""
    leaves, _ = tree_flatten_with_path(state)
    rows = [f(i, *leaf) for i, leaf in enumerate(leaves)]
    new = jax.tree.unflatten(jax.tree.structure(state), [x for x, _ in rows])
    return new, tuple(scale for _, scale in rows)
