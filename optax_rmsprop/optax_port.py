"""Carry a run of optax's own RMSprop over to ours, in the middle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path
from jax.typing import ArrayLike

from optax_rmsprop import _checks
from optax_rmsprop._carry import report
from optax_rmsprop._numerics import cast
from optax_rmsprop.transforms import ScaleByRmsState, ScaleByStddevState

# optax's states of averages, also those with a count, for which it exports no name.
_THEIRS = tuple(
    type(jax.eval_shape(make(bias_correction=correct).init, ()))
    for make in (optax.scale_by_rms, optax.scale_by_stddev)
    for correct in (False, True)
)
_OURS = ScaleByRmsState, ScaleByStddevState
_PARTS = (*_THEIRS, *_OURS, optax.TraceState, optax.ScaleByScheduleState)
# The gradients by which updates are compared, as factors of the root of nu; and how far
# updates may differ, as fractions of the largest in their array.
_FACTORS = 0.5, -1.0, 2.0
_INSIDE = (
    "optax.rmsprop has the learning rate inside the momentum buffer, as dialects.optax "
    "and rmsprop(lr_in_momentum=True)"
)
_TOLERANCE, _TOLERANCE_OF_16_BITS = 1e-3, 5e-2


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

    The result is not taken on trust: both make three updates, of the same random
    gradients, and these must agree. So another learning rate, decay or place of eps is
    found where it makes a difference at the size of this run's gradients.

    What cannot be exact: `nu - mu²` has the rounding of optax's own variance, and is 0
    where that is negative, and optax's next update NaN or too long. For parameters of
    16 bits, optax has rounded `nu` to their dtype.

    Args:
      opt_state: the state that `source` has now; arrays, not within `jax.jit`.
      source: the transformation of optax that made it.
      tx: ours, with the same options. Others can be chosen afterwards.
      params: the parameters.
      count: the number of updates made, in [0, 2³¹). By default it is read off
        `opt_state`, where bias correction or a schedule keeps it.
      decay: that of `source`, in [0, 1). Needed with bias correction, and only there.

    Returns:
      A state for `tx`, in the structure and dtypes of `tx.init(params)`.

    Raises:
      TypeError: a number of the wrong kind.
      ValueError: an `opt_state` that is not of `source`; a `tx` whose state has other
        parts, or the same in another order (a learning rate inside the momentum buffer
        cannot be taken out); updates that differ; a count that is needed or
        contradicts the state; complex averages, in which optax adds the squares of both
        parts.

    Warns:
      RuntimeWarning: an average holds NaN or infinity. It is carried as it is.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_rmsprop import dialects, from_optax
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
            f"parameters: {_names(parts)}, got {_names(wanted)}; {_INSIDE}"
        )
    steps = _steps(parts, count)
    _check_averages(parts)
    structure: Any = jax.tree.structure(like, is_leaf=_is_part)
    has_trace = optax.TraceState in map(type, parts)
    differences = []
    for sign in (-1, 1) if has_trace else (1,):
        rows = zip(parts, wanted, strict=True)
        carried = structure.unflatten(
            _carried(*row, steps, decay, sign) for row in rows
        )
        difference = _difference(source, opt_state, tx, carried, params)
        if difference is None:
            return carried
        differences.append(difference)
    raise ValueError(
        "`tx` must make the updates that `source` makes, with the same options, got "
        + ", and with the other sign of the trace ".join(differences)
        + (f"; {_INSIDE}" if has_trace else "")
    )


def _check_source(opt_state: optax.OptState, expected: optax.OptState) -> None:
    """Check that a state has the structure, shapes and dtypes of its source's."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (opt_state, expected)]
    got, wanted = (
        {path: f"{x.dtype}{list(x.shape)}" for path, x in tree_leaves_with_path(tree)}
        for tree in (opt_state, expected)
    )
    if structures[0] == structures[1] and got == wanted:
        return
    problem = f"got {structures[0]}, expected {structures[1]}"
    differing = [path for path in wanted if got.get(path, wanted[path]) != wanted[path]]
    for path in differing[:1]:
        problem = f"got {got[path]} at {keystr(path)}, expected {wanted[path]}"
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
    is_ours = isinstance(part, _THEIRS + _OURS)
    kind = "mu" in part._fields if is_ours else type(part)
    return kind, jax.tree.structure(part[-1]), *map(np.shape, jax.tree.leaves(part[-1]))


def _names(parts: list[Any]) -> str:
    names = [
        type(part).__name__ if _is_part(part) else f"{part.dtype}{list(part.shape)}"
        for part in parts
    ]
    return ", ".join(names) or "nothing"


def _has_count(part: Any) -> bool:
    return _is_part(part) and "count" in part._fields


def _steps(parts: list[Any], count: int | None) -> int:
    """The number of updates made, on which all must agree that count them."""
    found = {int(part.count) for part in parts if _has_count(part)}
    if count is not None:
        found.add(_checks.integer("count", count, high=2**31))
    if len(found) != 1:
        got = " and ".join(map(str, sorted(found))) or "None, and none in `opt_state`"
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
            where = keystr(path)
            if isinstance(part, _THEIRS) and jnp.iscomplexobj(leaf):
                raise ValueError(
                    f"`opt_state` must have real averages, got {leaf.dtype} at {where}:"
                    " optax adds the squares of both parts, which we keep apart"
                )
            if not jnp.isfinite(leaf).all():
                broken.append(where)
    report(broken)


def _carried(
    part: Any, like: Any, steps: int, decay: ArrayLike | None, sign: int
) -> Any:
    """A part of optax's state, as ours."""
    if isinstance(part, optax.TraceState):
        return optax.TraceState(
            jax.tree.map(lambda t, new: sign * cast(t, new.dtype), *part, *like)
        )
    if not isinstance(part, _THEIRS):
        return part
    total: Any = 1.0
    if _has_count(part) and steps:  # optax divides by this at every use
        why = "; bias correction needs that of `source`"
        total = 1 - _checks.number("decay", decay, high=1, hint=why) ** steps

    def average(x: jax.Array, new: jax.ShapeDtypeStruct) -> jax.Array:
        return cast(x, new.dtype) / total

    count = jnp.asarray(steps, like.count.dtype)
    if isinstance(like, ScaleByRmsState):
        return ScaleByRmsState(count, jax.tree.map(average, part.nu, like.nu))
    mu = jax.tree.map(average, part.mu, like.mu)
    nu = jax.tree.map(average, part.nu, like.var)
    var = jax.tree.map(lambda nu, mu: jnp.maximum(nu - mu * mu, 0), nu, mu)
    return ScaleByStddevState(count, mu, var)


def _difference(
    source: optax.GradientTransformation,
    opt_state: optax.OptState,
    tx: optax.GradientTransformation,
    carried: optax.OptState,
    params: optax.Params,
) -> str | None:
    """Where the next updates of two transformations differ, if they do."""
    sizes, tolerance = _gradient_sizes(opt_state, params)
    their_update, our_update = jax.jit(source.update), jax.jit(tx.update)
    moves = False
    for factor in _FACTORS:
        grads = jax.tree.map(lambda size: factor * size, sizes)  # noqa: B023
        theirs, opt_state = their_update(grads, opt_state, params)
        ours, carried = our_update(grads, carried, params)
        rows = zip(tree_leaves_with_path(theirs), jax.tree.leaves(ours), strict=True)
        for (path, x), y in rows:
            x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
            x, y = x[np.isfinite(x)], y[np.isfinite(x)]
            if not x.any() and not y.any():
                continue
            moves = True
            worst = np.argmax(np.abs(x - y))
            if not np.abs(x - y)[worst] <= tolerance * np.abs(x).max():
                where = keystr(path) or "the root"
                return f"{y[worst]:.6g} where it makes {x[worst]:.6g} at {where}"
    if not moves:
        raise ValueError(
            f"`source` must make an update that is not 0 within {len(_FACTORS)}, to be "
            "compared with; carry the state over where an accumulation ends"
        )
    return None


def _gradient_sizes(
    opt_state: optax.OptState, params: optax.Params
) -> tuple[optax.Updates, float]:
    """The root of nu where it is known, else 1; and the tolerance that nu allows."""

    def size(old: jax.Array, nu: Any) -> jax.Array:
        if np.shape(nu) != old.shape or isinstance(nu, optax.MaskedNode):
            return old
        return jnp.where(nu > 0, jnp.sqrt(nu), 1).astype(old.dtype)

    sizes, tolerance = jax.tree.map(jnp.ones_like, params), _TOLERANCE
    for part in _parts(opt_state):
        if isinstance(part, _THEIRS):
            if any(nu.dtype.itemsize < 4 for nu in jax.tree.leaves(part.nu)):
                tolerance = _TOLERANCE_OF_16_BITS
            if _checks.fits(jax.tree.structure(sizes), part.nu):
                sizes = jax.tree.map(size, sizes, part.nu)
    return sizes, tolerance
