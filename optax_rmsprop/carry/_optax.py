"""Carry a run of optax's own RMSprop over to ours, in the middle."""

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
from optax_rmsprop.carry._run import report
from optax_rmsprop.transforms import ScaleByRmsState, ScaleByStddevState

# optax's states of averages, also those with a count, for which it exports no name.
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
# The gradients by which both are compared, as factors of the root of nu, and the most
# updates that an accumulation of gradients may take.
_FACTORS = 0.5, -1.0, 2.0
_MOST = 64
# How many roundings the two may be apart: of 32 and 64 bits, and of 16; and how many
# times more in what is divided by the root of a difference.
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
    `optax.scale_by_stddev`, `optax.trace` and others, also inside of `optax.masked`,
    `partition`, `inject_hyperparams`, `MultiSteps` and the like. `tx` is the same with
    our parts in place of optax's: for `optax.rmsprop` that is `dialects.optax` with the
    same arguments. States of other parts are taken as they are.

    The result is not taken on trust. Both transformations make updates of the same
    gradients, and the updates and all averages after each must agree, within about a
    hundred roundings of the averages (a thousand times that for the updates of a
    centered form). So another learning rate, decay or place of eps is found where it
    makes that much of a difference at the size of this run's gradients. The sign of
    each trace is found in the same way.

    What cannot be exact: `var` has the rounding error of `nu - mu²`, as optax's own
    variance has. Where that is negative, and optax's next update NaN or too long, `var`
    is 0. For parameters of 16 bits, optax has rounded `nu` to their dtype.

    Args:
      opt_state: the state that `source` has now; arrays, not within `jax.jit`.
      source: the transformation of optax that made it.
      tx: ours, with the same options. Others can be chosen afterwards.
      params: the parameters, as given to init.
      count: the number of updates made, in [0, 2³¹). By default it is read off
        `opt_state`, where bias correction or a schedule of the rate keeps it.
      decay: that of `source`, in [0, 1). Needed with bias correction, and only there.

    Returns:
      A state for `tx`, in the structure and dtypes of `tx.init(params)`.

    Raises:
      TypeError: a number of the wrong kind.
      ValueError: an `opt_state` that is not of `source`; a `tx` whose state has other
        parts, or the same in another order (a learning rate inside the momentum buffer
        cannot be taken out); updates or averages that differ; a trace whose sign no
        update shows; averages that 64 updates do not change; a count that is needed or
        contradicts the state; complex averages, in which optax adds the squares of both
        parts.

    Warns:
      RuntimeWarning: an average holds NaN or infinity. It is carried as it is.

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
            + (f"; {_INSIDE}" if optax.TraceState in map(type, wanted) else "")
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
        """Choose the sign of a trace with which nothing is wrong, if there is one."""
        wrong = {}
        for sign in (1, -1):
            signs[i] = sign
            wrong[sign] = is_wrong(differences())
        signs[i] = 1 if wrong[-1] else -1
        return not any(wrong.values())

    # A trace shows its sign in what is added to it, or else in the updates. What is
    # added may come from another trace, so they go in their order.
    traces = [i for i, part in enumerate(parts) if isinstance(part, optax.TraceState)]
    unknown = [i for i in traces if both_signs_agree(i, _has(i))]
    for i in unknown:
        holds = any(x.any() for x in jax.tree.leaves(parts[i]))
        if both_signs_agree(i, bool) and holds:
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
    """What two transformations make of the same gradients."""

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
        self._rounding = max(roundings, default=0.0)
        centered = any(
            isinstance(part, _THEIRS) and "mu" in part._fields for part in parts
        )
        self._of_quotients = self._rounding * (_CENTERED if centered else 1)

    def differences(
        self, ours: Any, carried: Callable[[list[Any]], list[Any]]
    ) -> dict[int, str]:
        """The first difference in each part, by its number; in the updates, by -1."""
        their_update, our_update = self._updates
        theirs, found = self._opt_state, {}
        for number in range(_MOST):
            factor = _FACTORS[number % len(_FACTORS)]
            grads = jax.tree.map(lambda size: factor * size, self._sizes)  # noqa: B023
            their_updates, theirs = their_update(grads, theirs, self._params)
            our_updates, ours = our_update(grads, ours, self._params)
            rows = [(-1, our_updates, their_updates, their_updates, self._of_quotients)]
            pairs = zip(_parts(ours), carried(_parts(theirs)), strict=True)
            for i, (part, expected) in enumerate(pairs):
                rows += [(i, *row) for row in self._rows(part, expected)]
            for i, *row in rows:
                if i not in found and (difference := _apart(*row)):
                    found[i] = difference
            if number + 1 >= len(_FACTORS) and self._has_moved(theirs):
                return found
        raise ValueError(
            f"`source` must change its averages within {_MOST} updates, to be compared "
            "with; carry the state over shortly before an accumulation ends"
        )

    def _rows(self, part: Any, expected: Any) -> list[tuple[Any, Any, Any, float]]:
        """What to compare: ours, optax's, the size of their errors, and a tolerance."""
        if isinstance(part, optax.TraceState):
            return [(part, expected, expected, self._of_quotients)]
        if isinstance(part, ScaleByRmsState):
            return [(part.nu, expected.nu, expected.nu, self._rounding)]
        if isinstance(part, ScaleByStddevState):
            nu = jax.tree.map(lambda var, mu: var + mu * mu, expected.var, expected.mu)
            root = jax.tree.map(jnp.sqrt, nu)
            return [
                (part.mu, expected.mu, root, self._rounding),
                (part.var, expected.var, nu, self._rounding),
            ]
        return []

    def _has_moved(self, theirs: Any) -> bool:
        states = (list(filter(_is_part, _parts(s))) for s in (self._opt_state, theirs))
        old, new = map(jax.tree.leaves, states)
        changed = [(x != y).any() for x, y in zip(old, new, strict=True)]
        return any(changed) or not any(map(np.size, old))


def _apart(got: Any, expected: Any, sizes: Any, tolerance: float) -> str | None:
    """Where two trees are too far apart, as far as the expected one is finite."""
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
            where = at(path)
            return f"{was:.6g} where it makes {should:.6g} at {where}"
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
    """The states that RMSprop is made of, in their order, and all other arrays."""
    return jax.tree.leaves(state, is_leaf=_is_part)


def _kind(part: Any) -> Any:
    """The same for a part of optax's and for ours that corresponds to it."""
    if not _is_part(part):
        return part.shape, part.dtype
    kind: Any = type(part)
    if isinstance(part, _THEIRS + _OURS):
        kind = "mu" in part._fields
    elif isinstance(part, optax.TraceState):
        kind = optax.TraceState
    return kind, jax.tree.structure(part[-1]), *map(np.shape, jax.tree.leaves(part[-1]))


def _names(parts: list[Any]) -> str:
    names = [type(part).__name__ if _is_part(part) else _array(part) for part in parts]
    return some(names, most=150) or "nothing"


def _array(x: Any) -> str:
    """Dtype and shape."""
    is_array = hasattr(x, "dtype") and hasattr(x, "shape")
    return f"{x.dtype}{shown(list(x.shape))}" if is_array else kind_of(x)


def _has_count(part: Any) -> bool:
    return _is_part(part) and "count" in part._fields


def _steps(parts: list[Any], count: int | None) -> int:
    """The number of updates made, on which all must agree that count them."""
    counts = [part.count for part in parts if _has_count(part)]
    for value in jax.block_until_ready(counts):
        _errors.count("opt_state", value)
    found = set(map(int, counts))
    if count is not None:
        if isinstance(count, jax.Array) and count.ndim == 0 and _errors.is_real(count):
            count = count.item()  # of a TrainState
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
    report(broken)


def _carried(
    part: Any, like: Any, sign: int, steps: int, decay: ArrayLike | None
) -> Any:
    """A part of optax's state, as ours, if ours is another."""
    if isinstance(part, optax.TraceState):
        return type(like)(
            jax.tree.map(lambda t, new: sign * cast(t, new.dtype), *part, *like)
        )
    if not isinstance(like, _OURS):
        return part
    total: Any = 1.0
    if _has_count(part) and part.count:  # optax divides by this at every use
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
    """The root of nu, where it belongs to a parameter and is not 0; else 1."""
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
