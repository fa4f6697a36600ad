"""Carry the state of optax's own RMSprop over to ours, in the middle of a run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_leaves_with_path
from jax.typing import ArrayLike

from optax_rmsprop import _errors
from optax_rmsprop._errors import at, kind_of, shown, some, trees
from optax_rmsprop._numerics import accumulator_dtype_of, cast
from optax_rmsprop.carry._run import warn_of_nan
from optax_rmsprop.transforms import ScaleByRmsState, ScaleByStddevState

# optax's states of averages. It exports no names for those with a count.
_THEIRS = tuple(
    type(jax.eval_shape(make(bias_correction=correct).init, ()))
    for make in (optax.scale_by_rms, optax.scale_by_stddev)
    for correct in (False, True)
)
_OURS = ScaleByRmsState, ScaleByStddevState
_PARTS = (*_THEIRS, *_OURS, optax.TraceState, optax.ScaleByScheduleState)
_INSIDE = (
    "optax.rmsprop has the learning rate inside the momentum buffer, as dialects.optax "
    "and rmsprop(lr_in_momentum=True)"
)
# Both transformations are compared by the updates that they make of these gradients,
# in units of the root of nu. With gradient accumulation it takes more updates until an
# average changes, at most this many.
_FACTORS = 0.5, -1.0, 2.0
_MOST_UPDATES = 64
# The tolerance, in units of a dtype's eps: with 32 or 64 bits, and with 16. Centered
# updates are divided by the root of nu - mu², a difference, whose relative rounding
# error is larger. Their tolerance is multiplied by _CENTERED.
_ROUNDINGS, _ROUNDINGS_OF_16_BITS, _CENTERED = 128, 8, 1000


def from_optax(
    opt_state: optax.OptState,
    source: optax.GradientTransformation,
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    count: int | None = None,
    decay: ArrayLike | None = None,
) -> optax.OptState:
    """Carry the state of optax's RMSprop over to ours, so that the run goes on.

        nu    = nu                          bias correction: nu / (1 - decayᵗ)
        mu    = mu                          likewise
        var   = max(nu - mu², 0)            of these nu and mu
        trace = trace or -trace             optax.rmsprop negates what it traces

    `source` may be `optax.rmsprop`, or any chain of `optax.scale_by_rms` or
    `optax.scale_by_stddev`, `optax.trace` and others, also inside `optax.masked`,
    `partition`, `inject_hyperparams`, `MultiSteps` and the like. In `tx` our parts
    replace optax's: for `optax.rmsprop`, `tx` is `dialects.optax` with the same
    arguments. States of other parts do not change.

    The result is verified. Both transformations make updates of the same gradients, and
    the updates and all averages after each must agree, within about a hundred roundings
    of the averages (a thousand times that for the updates of a centered form). So a
    different learning rate, decay or position of eps is found if its effect is larger,
    at the size of this run's gradients. The sign of each trace is found in the same
    way.

    Two numbers cannot be exact. `var` has the rounding error of `nu - mu²`, as optax's
    own variance has; where this is negative, and optax's next update NaN or too long,
    `var` is 0. For parameters of 16 bits, optax has rounded `nu` to their dtype.

    Args:
      opt_state: the present state of `source`; arrays, not within `jax.jit`.
      source: the transformation of optax that made it.
      tx: ours, with the same options. Others can be chosen afterwards.
      params: the parameters, as given to init.
      count: the number of updates made, in [0, 2³¹). By default it is taken from
        `opt_state`, which has it with bias correction or a schedule.
      decay: the decay of `source`, in [0, 1). Needed only with bias correction.

    Returns:
      A state for `tx`, in the structure and dtypes of `tx.init(params)`.

    Raises:
      TypeError: a number is of the wrong kind.
      ValueError: `opt_state` is not a state of `source`; the state of `tx` has other
        parts, or the same in another order (a learning rate inside the momentum buffer
        cannot be taken out); updates or averages differ; no update shows the sign of a
        trace; 64 updates do not change the averages; the count is missing or
        contradicts the state; averages are complex, because optax adds the squares of
        both parts.

    Warns:
      RuntimeWarning: an average has NaN or infinity. It is carried as it is.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_rmsprop import dialects
      >>> from optax_rmsprop.carry import from_optax
      >>> params, grads = jnp.ones(2), jnp.array([3.0, -4.0])
      >>> source = optax.rmsprop(0.1, decay=0.75, momentum=0.9)
      >>> _, opt_state = source.update(grads, source.init(params))
      >>> tx = dialects.optax(0.1, decay=0.75, momentum=0.9)
      >>> from_optax(opt_state, source, tx, params, count=1)[0].nu
      Array([2.25, 4.  ], dtype=float32)

    References:
      optax/_src/transform.py, optax/_src/alias.py (0.2.8).
    """
    _check_source(opt_state, jax.eval_shape(source.init, params))
    like: Any = jax.eval_shape(tx.init, params)
    parts, wanted = _parts(opt_state), _parts(like)
    if [_kind(part) for part in parts] != [_kind(part) for part in wanted]:
        raise ValueError(
            "`tx` must keep what `source` keeps, in the same order and for the same "
            f"parameters: {_names(parts)}, got {_names(wanted)}"
            + (f"; {_INSIDE}" if optax.TraceState in map(_type, wanted) else "")
        )
    steps = _steps(parts, count)
    _check_averages(parts)
    structure: Any = jax.tree.structure(like, is_leaf=_is_part)
    compare = _Comparison(source, opt_state, tx, params)
    signs = [1] * len(parts)

    def carried(parts: list[Any]) -> list[Any]:
        rows = zip(parts, wanted, signs, strict=True)
        return [_carried(*row, steps, decay) for row in rows]

    def differences() -> dict[int, str]:
        return compare.differences(structure.unflatten(carried(parts)), carried)

    def both_signs_agree(i: int, is_wrong: Callable[[dict[int, str]], bool]) -> bool:
        """Choose the sign of a trace, and return whether both signs are right."""
        wrong = {}
        for sign in (1, -1):
            signs[i] = sign
            wrong[sign] = is_wrong(differences())
        signs[i] = 1 if wrong[-1] else -1
        return not any(wrong.values())

    # The sign of a trace shows in the trace after the next updates, or else in the
    # updates. It may be the trace of another trace, so they are tried in order.
    traces = [i for i, part in enumerate(parts) if isinstance(part, optax.TraceState)]
    unknown = [i for i in traces if both_signs_agree(i, _has(i))]
    for i in unknown:
        is_zero = not any(x.any() for x in jax.tree.leaves(parts[i]))
        if both_signs_agree(i, bool) and not is_zero:
            raise ValueError(
                "`opt_state` must have traces whose sign an update shows, got one that "
                "has no effect now; carry it over where the learning rate is not 0"
            )
    for difference in differences().values():
        raise ValueError(
            "`tx` must make what `source` makes of the same gradients, got "
            f"{difference}; give both the same options"
            + (f"; {_INSIDE}" if traces else "")
        )
    return structure.unflatten(carried(parts))


def _has(part: int) -> Callable[[dict[int, str]], bool]:
    return lambda differences: part in differences


class _Comparison:
    """A comparison of the updates of two transformations for the same gradients."""

    def __init__(self, source: Any, opt_state: Any, tx: Any, params: Any):
        self._opt_state, self._params = opt_state, params
        self._updates = jax.jit(source.update), jax.jit(tx.update)
        parts = _parts(opt_state)
        self._sizes = _gradient_sizes(parts, params)
        averages = jax.tree.leaves(list(filter(_is_part, parts)))
        dtypes = {x.dtype for x in averages if jnp.issubdtype(x.dtype, jnp.floating)}
        infos = [jnp.finfo(dtype) for dtype in dtypes]
        roundings = [
            float(info.eps) * (_ROUNDINGS if info.bits > 16 else _ROUNDINGS_OF_16_BITS)
            for info in infos
        ]
        self._average_tolerance = max(roundings, default=0.0)
        centered = any(
            isinstance(part, _THEIRS) and "mu" in part._fields for part in parts
        )
        self._update_tolerance = self._average_tolerance * (
            _CENTERED if centered else 1
        )

    def differences(
        self, ours: Any, carried: Callable[[list[Any]], list[Any]]
    ) -> dict[int, str]:
        """The first difference in each part, by its number; -1 is for the updates."""
        their_update, our_update = self._updates
        theirs, found = self._opt_state, {}
        for number in range(_MOST_UPDATES):
            factor = _FACTORS[number % len(_FACTORS)]
            grads = jax.tree.map(lambda size: factor * size, self._sizes)  # noqa: B023
            their_updates, theirs = their_update(grads, theirs, self._params)
            our_updates, ours = our_update(grads, ours, self._params)
            rows = [
                (-1, our_updates, their_updates, their_updates, self._update_tolerance)
            ]
            pairs = zip(_parts(ours), carried(_parts(theirs)), strict=True)
            for i, (part, expected) in enumerate(pairs):
                rows += [(i, *row) for row in self._rows(part, expected)]
            for i, *row in rows:
                if i not in found and (difference := _apart(*row)):
                    found[i] = difference
            if number + 1 >= len(_FACTORS) and self._has_moved(theirs):
                return found
        raise ValueError(
            f"`source` must change its averages within {_MOST_UPDATES} updates, to be "
            "compared with; carry the state over shortly before an accumulation ends"
        )

    def _rows(self, part: Any, expected: Any) -> list[tuple[Any, Any, Any, float]]:
        """Trees to compare: ours, optax's, their scale, and the tolerance for it."""
        if isinstance(part, optax.TraceState):
            return [(part, expected, expected, self._update_tolerance)]
        if isinstance(part, ScaleByRmsState):
            return [(part.nu, expected.nu, expected.nu, self._average_tolerance)]
        if isinstance(part, ScaleByStddevState):
            nu = jax.tree.map(lambda var, mu: var + mu * mu, expected.var, expected.mu)
            root = jax.tree.map(jnp.sqrt, nu)
            return [
                (part.mu, expected.mu, root, self._average_tolerance),
                (part.var, expected.var, nu, self._average_tolerance),
            ]
        return []

    def _has_moved(self, theirs: Any) -> bool:
        states = (list(filter(_is_part, _parts(s))) for s in (self._opt_state, theirs))
        old, new = map(jax.tree.leaves, states)
        changed = [(x != y).any() for x, y in zip(old, new, strict=True)]
        return any(changed) or not any(map(np.size, old))


def _apart(got: Any, expected: Any, sizes: Any, tolerance: float) -> str | None:
    """The worst difference in a leaf that exceeds its tolerance, or None.

    Elements for which optax has NaN or infinity are not compared.
    """
    rows = zip(*map(jax.tree.leaves, (got, sizes)), strict=True)
    for (path, y), row in zip(tree_leaves_with_path(expected), rows, strict=True):
        dtype = accumulator_dtype_of(y)
        x, y, size = (jnp.asarray(leaf, dtype) for leaf in (row[0], y, row[1]))
        known = jnp.isfinite(y)
        errors = jnp.where(known, jnp.abs(x - y), 0)
        limit = tolerance * jnp.max(jnp.where(known, jnp.abs(size), 0), initial=0)
        if not (errors <= limit).all():
            worst = np.unravel_index(np.argmax(errors), errors.shape)
            was, should = (np.asarray(leaf)[worst] for leaf in (x, y))
            return f"{was:.6g} where it makes {should:.6g} at {at(path)}"
    return None


def _check_source(opt_state: optax.OptState, expected: optax.OptState) -> None:
    """Check that a state has the structure, shapes and dtypes of its source's."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (opt_state, expected)]
    got, wanted = (
        {path: _array(x) for path, x in tree_leaves_with_path(tree)}
        for tree in (opt_state, expected)
    )
    if structures[0] == structures[1] and got == wanted:
        return
    problem = trees(*structures)
    differing = [path for path in wanted if got.get(path, wanted[path]) != wanted[path]]
    for path in differing[:1]:
        problem = f"got {got[path]} at {at(path)}, expected {wanted[path]}"
    raise ValueError(
        f"`opt_state` must be a state of `source` for these parameters, {problem}; "
        "give the transformation that made it"
    )


def _is_part(x: Any) -> bool:
    return isinstance(x, _PARTS)


def _parts(state: optax.OptState) -> list[Any]:
    """The states of RMSprop's parts, and all other arrays, in the order of leaves."""
    return jax.tree.leaves(state, is_leaf=_is_part)


def _kind(part: Any) -> Any:
    """A value that is equal for a part of optax and the corresponding one of ours."""
    if not _is_part(part):
        return part.shape, part.dtype
    is_average = isinstance(part, _THEIRS + _OURS)
    kind = "mu" in part._fields if is_average else _type(part)
    return kind, jax.tree.structure(part[-1]), *map(np.shape, jax.tree.leaves(part[-1]))


def _type(part: Any) -> Any:
    """The type of a part. Our ScaledTraceState is optax's TraceState in this file."""
    return optax.TraceState if isinstance(part, optax.TraceState) else type(part)


def _names(parts: list[Any]) -> str:
    names = [_type(part).__name__ if _is_part(part) else _array(part) for part in parts]
    return some(names, most=150) or "nothing"


def _array(x: Any) -> str:
    """Dtype and shape."""
    is_array = hasattr(x, "dtype") and hasattr(x, "shape")
    return f"{x.dtype}{shown(list(x.shape))}" if is_array else kind_of(x)


def _has_count(part: Any) -> bool:
    return _is_part(part) and "count" in part._fields


def _steps(parts: list[Any], count: int | None) -> int:
    """The number of updates made. All counts in the state must agree on it."""
    counts = [part.count for part in parts if _has_count(part)]
    for value in jax.block_until_ready(counts):
        _errors.count("opt_state", value)
    found = set(map(int, counts))
    if count is not None:
        if isinstance(count, jax.Array) and count.ndim == 0 and _errors.is_real(count):
            count = count.item()  # Flax's TrainState has an array
        found.add(_errors.integer("count", count, high=2**31))
    if len(found) != 1:
        got = some(sorted(found), " and ")
        got = got or "None, and no average or schedule in `opt_state` counts them"
        raise ValueError(
            "`count` must be the number of updates that made `opt_state`, got "
            f"{got}; give the right one"
        )
    return found.pop()


def _check_averages(parts: list[Any]) -> None:
    """Refuse complex averages; report those that are not finite."""
    broken = []
    for part in filter(_is_part, parts):
        for path, leaf in tree_leaves_with_path(part):
            where = at(path)
            if isinstance(part, _THEIRS) and jnp.iscomplexobj(leaf):
                raise ValueError(
                    f"`opt_state` must have real averages, got {leaf.dtype} at {where}:"
                    " optax adds the squares of both parts, which we keep apart"
                )
            if not jnp.isfinite(leaf).all():
                broken.append(where)
        if "nu" in part._fields:
            _errors.not_negative("opt_state", part.nu)
    warn_of_nan(broken)


def _carried(
    part: Any, like: Any, sign: int, steps: int, decay: ArrayLike | None
) -> Any:
    """Convert a part of optax's state to the type and the dtypes of `like`."""
    if isinstance(part, optax.TraceState):
        return type(like)(
            jax.tree.map(lambda t, new: sign * cast(t, new.dtype), *part, *like)
        )
    if not isinstance(like, _OURS):
        return part
    total: Any = 1.0
    if _has_count(part) and part.count:  # optax divides by `total` at every use
        why = "; bias correction needs that of `source`"
        decay = _errors.number("decay", decay, high=1, hint=why)
        total = 1 - decay ** int(part.count)

    def average(x: jax.Array, new: jax.ShapeDtypeStruct) -> jax.Array:
        return cast(x, new.dtype) / total

    count = jnp.asarray(steps, like.count.dtype)
    if isinstance(like, ScaleByRmsState):
        return ScaleByRmsState(count, jax.tree.map(average, part.nu, like.nu))
    mu = jax.tree.map(average, part.mu, like.mu)
    nu = jax.tree.map(average, part.nu, like.var)
    var = jax.tree.map(lambda nu, mu: jnp.maximum(nu - mu * mu, 0), nu, mu)
    return ScaleByStddevState(count, mu, var)


def _gradient_sizes(parts: list[Any], params: optax.Params) -> optax.Updates:
    """For each element of a parameter the root of its nu, or 1 without one or at 0."""
    if isinstance(params, optax.LookaheadParams):
        params = params.fast

    def size(old: jax.Array, nu: Any) -> jax.Array:
        if isinstance(nu, optax.MaskedNode) or np.shape(nu) != old.shape:
            return old
        return jnp.where(nu > 0, jnp.sqrt(nu), 1).astype(old.dtype)

    sizes = jax.tree.map(jnp.ones_like, params)
    for part in parts:
        if isinstance(part, _THEIRS) and _errors.fits(
            jax.tree.structure(sizes), part.nu
        ):
            sizes = jax.tree.map(size, sizes, part.nu)
    return sizes
