"""Parameters in bfloat16 that are accurate to 24 or 32 bits.

Mixed precision usually keeps the parameters twice: in float32, the master weights, to
which updates are added, and rounded to bfloat16, with which gradients are computed. The
second copy repeats the upper half of the first, since a bfloat16 is the upper half of a
float32. Here the state has only the lower half.

Read as an integer, the bits of a positive number grow with it, and those of a negative
number with its magnitude. So a bfloat16 may also be a little larger than the master
weight, and the correction is then negative. An example:

    bits of the master weight    0x3DCCCCCD     0.1 in float32
    bits of the parameter        0x3DCD         0.10009766, the nearest bfloat16
    correction, in int16         -0x3333        0x3DCCCCCD - 0x3DCD0000
    correction, in int8          -0x33          or -0x34 in 51 of 256 cases

This differs from FlashOptim:

1. It wraps any optax transformation.
2. With int16, the master weight is a float32 to the bit.
3. With int8, it is rounded at random. Rounded to the nearest, it would stop moving if
   its steps are shorter than half the distance of its neighbours.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_flatten_with_path, tree_map_with_path
from jax.typing import ArrayLike, DTypeLike

from optax_rmsprop import _errors
from optax_rmsprop._errors import at, dtype_of, kind_of, short, shown, trees
from optax_rmsprop._numerics import cast, clip
from optax_rmsprop.wrappers._rounding import (
    LOWER_HALF_BITS,
    axis_bits_of_step,
    bits_of,
    from_bits,
    random_bits,
)
from optax_rmsprop.wrappers._transformation import checked

# The first 32 bits of the root of 2: an arbitrary number, but not `compress_state`'s,
# so that the parameters and their averages are rounded independently.
ROOT_OF_2 = 0xB504F333

# Master weights are clipped to [-LIMIT, LIMIT]. The difference of a number in there and
# any finite bfloat16 does not overflow in float32.
LIMIT = 2.0**119


class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
      count: int32 scalar, the number of updates made. With the seed, it determines all
        random bits.
      inner: the state of `tx`, as it is for float32 parameters.
      corrections: for each bfloat16 parameter an array of its shape, in int8 or int16:
        the bits of the master weight less those of the parameter. For a parameter in
        another dtype None.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    inner: optax.OptState
    corrections: Any


def master_weights(
    tx: optax.GradientTransformation, dtype: DTypeLike, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Train bfloat16 parameters as in float32, with one or two more bytes for each.

        m            = p and its correction, a float32
        u, s         = tx.update(g, s, m)
        m           <- m + u
        p           <- the bfloat16 nearest to m
        correction  <- bits(m) - bits(p)

    Everything in `tx` is as for float32 parameters: it is given the master weights m,
    and gradients are converted to float32. With an int16, m is a float32, and a run is
    that of float32 parameters whose gradients are computed after rounding them to
    bfloat16. With an int8, m has the first 24 bits of a float32, and is rounded up or
    down at random so that the mean is exact. Its neighbours are 0.0015 to 0.003 % away,
    those of a bfloat16 0.4 to 0.8 %.

    Its updates must be added as they are. So wrap a whole chain, and let nothing change
    them afterwards, such as `optax.scale` or `optax.lookahead`: that would not be
    noticed. `compress_state` and `optax.apply_if_finite` go inside. `optax.MultiSteps`
    and `optax.masked` may be outside.

    Args:
      tx: any optax transformation. Weight decay, or whatever else reads the parameters,
        is given the master weights.
      dtype: the dtype of the corrections, jnp.int8 or jnp.int16.
      seed: a Python integer in [0, 2³²) for the rounding to 24 bits. The same seed
        gives the same bits.

    Returns:
      A transformation whose state is a `MasterWeightsState`. Its updates of bfloat16
      parameters are in float32, such that `optax.apply_updates` makes exactly the
      bfloat16 nearest to m. (It needs JAX's standard promotion of dtypes. Under the
      strict one use `stochastic_apply_updates`, which then has nothing to round.) There
      is one exception: no float32 leads from a parameter to some numbers of less than
      2⁻¹⁶ of its size. After such a step, m may be off by 2⁻²³ of the old parameter.
      Parameters in other dtypes have the updates of `tx`.

      Master weights are clipped to [-2¹¹⁹, 2¹¹⁹]. If a parameter or its update is
      infinite, the new parameter is NaN.

      If you change a parameter between updates, its correction stays, so that m is
      another number which is rounded to the parameter. Change the master weights
      instead, with `float32_params` and `bfloat16_params`.

    Raises:
      TypeError: a `tx` that is not an optax transformation; a seed that is not an
        integer.
      ValueError: another dtype; a seed out of its range; parameters in float16 or fewer
        bits; an update without parameters, with parameters of other dtypes and shapes
        than in init, or with another state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_rmsprop import wrappers
      >>> tx = wrappers.master_weights(optax.sgd(1e-4), jnp.int16)
      >>> params = jnp.ones(2, jnp.bfloat16)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> wrappers.float32_params(optax.apply_updates(params, updates), state)
      Array([0.9999, 0.9999], dtype=float32)

    References:
      Micikevicius et al., Mixed Precision Training, arXiv:1710.03740: master weights.
      Gonzalez Ortiz et al., FlashOptim: Optimizers for Memory Efficient Training,
      arXiv:2602.23349, section 3.1: a parameter and its correction.
    """
    tx = checked(tx)
    dtype = _correction_dtype(dtype)
    seed = _errors.integer("seed", seed, high=2**32)

    def init_fn(params: optax.Params) -> MasterWeightsState:
        def first(path: Any, p: Any) -> jax.Array | None:
            given = dtype_of(p)
            if given == jnp.bfloat16:
                return jnp.zeros_like(p, dtype)
            is_floating = given is not None and jnp.issubdtype(given, jnp.floating)
            if is_floating and given.itemsize < 4:
                raise ValueError(
                    f"`params` must be in bfloat16 or at least 32 bits, got {given} at "
                    f"{at(path)}; convert them, or leave them out with optax.masked"
                )
            return None

        corrections = tree_map_with_path(first, params)
        inner = tx.init(jax.tree.map(_join, params, corrections))
        return MasterWeightsState(jnp.zeros([], jnp.int32), inner, corrections)

    def update_fn(
        updates: optax.Updates,
        state: MasterWeightsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MasterWeightsState]:
        _check_state(state, dtype)
        if params is None:
            raise ValueError(
                "`params` must be the parameters, got None; call "
                "update(grads, state, params)"
            )
        _check_params("params", params, state.corrections, jnp.bfloat16)
        _errors.same_tree("updates", updates, "`params`", params)
        masters = jax.tree.map(_join, params, state.corrections)
        updates = jax.tree.map(_widen, updates, state.corrections, is_leaf=_is_none)
        updates, inner = tx.update(updates, state.inner, masters, **extra_args)
        structure: Any
        leaves, structure = jax.tree.flatten(updates, is_leaf=_is_none)
        columns = map(structure.flatten_up_to, (params, masters, state.corrections))
        count = optax.safe_increment(state.count)
        is_cut = _cut_bits(dtype) > 0
        rounded = [np.shape(u) if is_cut and u is not None else (0,) for u in leaves]
        number = np.uint32(seed ^ ROOT_OF_2)
        axis_bits = axis_bits_of_step(number, count, tuple(rounded))
        pairs = list(map(_step, leaves, *columns, axis_bits))
        updates = structure.unflatten(update for update, _ in pairs)
        corrections = structure.unflatten(correction for _, correction in pairs)
        return updates, MasterWeightsState(count, inner, corrections)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def float32_params(params: optax.Params, state: optax.OptState) -> optax.Params:
    """Return the master weights, to save them or to evaluate a model with them.

    Args:
      params: the parameters.
      state: the state of `master_weights` that belongs to them, or of a transformation
        that contains it, as `optax.MultiSteps` does.

    Returns:
      The parameters, in float32 where they have a correction.

    Raises:
      ValueError: a state without a `MasterWeightsState`, or with several; parameters
        with other dtypes and shapes than those given to init.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_rmsprop import wrappers
      >>> params = jnp.ones(2, jnp.bfloat16)
      >>> state = wrappers.master_weights(optax.sgd(0.1), jnp.int8).init(params)
      >>> wrappers.float32_params(params, state)
      Array([1., 1.], dtype=float32)

    References:
      `master_weights`.
    """
    corrections = _part(state).corrections
    _check_params("params", params, corrections, jnp.bfloat16)
    return jax.tree.map(_join, params, corrections)


def bfloat16_params(
    masters: optax.Params, state: optax.OptState
) -> tuple[optax.Params, optax.OptState]:
    """Return the parameters, and a state with their corrections, for master weights.

    Use it to start from parameters in float32 without rounding them to bfloat16, or to
    go on after you saved or changed what `float32_params` returned.

    Args:
      masters: the master weights: parameters in float32 where the state has
        corrections.
      state: the state of `master_weights`, or of a transformation that contains it.

    Returns:
      The parameters, in bfloat16 where they have a correction, and the state with new
      corrections. Then `float32_params` returns the master weights: exactly with int16,
      rounded to the nearest 24 bits with int8. Finite numbers are clipped to
      [-2¹¹⁹, 2¹¹⁹], and those of less than 2⁻¹²⁶ may become 0.

    Raises:
      ValueError: a state without a `MasterWeightsState`, or with several; master
        weights with other dtypes and shapes than those of the state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_rmsprop import wrappers
      >>> tx, masters = wrappers.master_weights(optax.sgd(0.1), jnp.int16), jnp.ones(2)
      >>> state = tx.init(masters.astype(jnp.bfloat16))
      >>> params, state = wrappers.bfloat16_params(masters + 1e-4, state)
      >>> wrappers.float32_params(params, state)
      Array([1.0001, 1.0001], dtype=float32)

    References:
      `master_weights`.
    """
    old = _part(state).corrections
    _check_params("masters", masters, old, jnp.float32)

    def split(master: Any, correction: Any) -> tuple[Any, Any]:
        if not _is_array(correction):
            return master, correction
        to_nearest = 2 ** _cut_bits(correction.dtype) // 2
        p, correction = _split(master, correction.dtype, to_nearest)
        return (p + 0 * master).astype(jnp.bfloat16), correction

    structure: Any
    leaves, structure = jax.tree.flatten(masters)
    pairs = list(map(split, leaves, structure.flatten_up_to(old)))
    params = structure.unflatten(p for p, _ in pairs)
    corrections = structure.unflatten(correction for _, correction in pairs)

    def replaced(x: Any) -> Any:
        return x._replace(corrections=corrections) if _is_part(x) else x

    return params, jax.tree.map(replaced, state, is_leaf=_is_part)


def _cut_bits(dtype: np.dtype) -> int:
    """Return how many of the last bits of a float32 a correction lacks: 8, or 0."""
    return LOWER_HALF_BITS - 8 * dtype.itemsize


def _join(p: Any, correction: Any) -> Any:
    """Return the master weight: p itself if it has no correction."""
    if not _is_array(correction):
        return p
    p = p.astype(jnp.float32)
    difference = correction.astype(jnp.int32) << _cut_bits(correction.dtype)
    # Left out at 0, which a negative correction would turn into NaN. A 0 has one if the
    # user has changed the parameter.
    return jnp.where(p == 0, p, from_bits(bits_of(p) + difference))


def _split(
    master: jax.Array, dtype: np.dtype, up: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Return the nearest bfloat16, in float32, and the correction.

    `up` is added to the bits before those are cut off that the correction lacks. Random
    bits round at random, and half the last bit that is kept rounds to the nearest.

    Halfway between two bfloat16, the nearest is the one farther from 0, because a
    correction may be -2¹⁵ but not 2¹⁵.
    """
    cut_bits = _cut_bits(dtype)
    bits = bits_of(clip(master, LIMIT)) + up & -1 << cut_bits
    # The lower half, with its first bit as the sign.
    difference = bits << LOWER_HALF_BITS >> LOWER_HALF_BITS + cut_bits
    correction = difference.astype(dtype)
    p = from_bits(bits - (correction.astype(jnp.int32) << cut_bits))
    return p, correction


def _step(
    update: Any, p: Any, master: Any, correction: Any, axis_bits: list[jax.Array]
) -> tuple[Any, Any]:
    """Return what to add to a parameter, and its next correction."""
    if update is None or not _is_array(correction):
        return update, correction
    update = cast(update, jnp.float32)
    dtype, cut_bits = correction.dtype, _cut_bits(correction.dtype)
    up = random_bits(p.shape, cut_bits, axis_bits) if cut_bits else 0
    new, correction = _split(master + update, dtype, up)
    # p + (new - p) is rounded to `new`, unless that is less than 2⁻¹⁶ of p.
    return new - p.astype(jnp.float32) + 0 * update, correction


def _widen(g: Any, correction: Any) -> Any:
    """Convert the gradient of a bfloat16 parameter to float32."""
    return g if g is None or not _is_array(correction) else cast(g, jnp.float32)


def _is_array(correction: Any) -> bool:
    """Whether a parameter has a correction: neither None nor `optax.MaskedNode()`."""
    return hasattr(correction, "dtype")


def _is_none(x: Any) -> bool:
    return x is None


def _is_part(x: Any) -> bool:
    return isinstance(x, MasterWeightsState)


def _part(state: Any) -> MasterWeightsState:
    """Return the one `MasterWeightsState` in a state."""
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_part) if _is_part(x)]
    if len(found) != 1:
        raise ValueError(
            f"`state` must have one MasterWeightsState in it, got {len(found)} in "
            f"{short(str(jax.tree.structure(state)))}; make it with master_weights, "
            "around all other transformations, and with optax.partition pass the state "
            "of one group, state.inner_states[label]"
        )
    return found[0]


def _correction_dtype(dtype: Any) -> np.dtype:
    """Return the dtype that corrections are to have: int8 or int16."""
    given = _errors.as_dtype(dtype)
    if given is None or given not in (jnp.int8, jnp.int16):
        got = shown(dtype) if given is None else short(str(given))
        raise ValueError(
            f"`dtype` must be int8 or int16, got {got}; with int8 a bfloat16 has 24 "
            "bits, with int16 32"
        )
    return given


def _check_state(state: Any, dtype: np.dtype) -> None:
    """Check that a state has corrections of this dtype."""
    _errors.same_state(state, MasterWeightsState)
    _errors.count("state", state.count)
    for path, correction in tree_flatten_with_path(state.corrections)[0]:
        given = dtype_of(correction)
        if given != dtype:
            raise ValueError(
                f"`state` must have corrections in {dtype}, got "
                f"{given or kind_of(correction)} at {at(path)}; use the dtype with "
                "which it was made, or call init again"
            )


def _check_params(name: str, params: Any, corrections: Any, dtype: DTypeLike) -> None:
    """Check that parameters have this dtype where they have corrections."""
    structure: Any
    leaves, structure = tree_flatten_with_path(params)
    if not _errors.fits(structure, corrections):
        expected = jax.tree.structure(corrections, is_leaf=_is_none)
        raise ValueError(
            f"`{name}` must have the structure of the parameters given to init: "
            f"{trees(structure, expected)}"
        )
    rows = zip(leaves, structure.flatten_up_to(corrections), strict=True)
    for (path, p), correction in rows:
        given = dtype_of(p)
        if _is_array(correction):
            expected = f"{jnp.dtype(dtype)} of shape {correction.shape}"
            is_as_in_init = given == dtype and np.shape(p) == correction.shape
        else:
            expected = "a dtype that was not bfloat16"
            is_as_in_init = given != jnp.bfloat16 or correction is not None
        if not is_as_in_init:
            raise ValueError(
                f"`{name}` must be as in init, {expected}, got {given} of shape "
                f"{np.shape(p)} at {at(path)}; optax.apply_updates keeps dtypes"
            )
