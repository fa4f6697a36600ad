"""The checks and the loop that the parts of RMSprop's chain share.

A part is an optax transformation that leaves the checks of trees to `checked`, which
makes them once for the whole chain. Its updates come in any floating-point dtype and
may be None anywhere; they go out in the accumulators' dtype. Its slots keep their
structure and dtype, whatever those of the gradients are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_rmsprop import _errors
from optax_rmsprop._numerics import accumulator_dtype_of, cast, update_dtype_of


def full_like(
    params: optax.Params, value: ArrayLike, accumulator_dtype: DTypeLike | None
) -> optax.Updates:
    """Make a slot: `value` in every element, or in both parts of a complex one."""

    def leaf(p: Any) -> jax.Array:
        dtype = accumulator_dtype_of(p, accumulator_dtype)
        both_parts = 1 + 1j if jnp.issubdtype(dtype, jnp.complexfloating) else 1
        return jnp.full_like(p, value * both_parts, dtype)

    return jax.tree.map(leaf, params)


def each_leaf(
    function: Callable[..., tuple[Any, ...]], updates: optax.Updates, *slots: Any
) -> tuple[Any, ...]:
    """Apply a function to each gradient and its slots; return its results as trees.

    The function returns an update and the new slots. Where a gradient is None, so is
    the update, and the slots, which may be whole trees there, stay as they are.
    """
    structure: Any
    leaves, structure = jax.tree.flatten(updates, is_leaf=_is_none)
    rows = zip(leaves, *map(structure.flatten_up_to, slots), strict=True)
    results = [row if row[0] is None else function(*row) for row in rows]
    columns = zip(*results, strict=True) if results else ((),) * (1 + len(slots))
    return tuple(map(structure.unflatten, columns))


def checked(
    inner: optax.GradientTransformation, needs_params: str | None = None
) -> optax.GradientTransformation:
    """Check the trees that a part, or a chain of parts, is given.

    Its updates are cast to the gradient's dtype, or to one that has the precision of
    the parameter too. `needs_params` is the option for which update needs parameters.
    """
    types: Any = None

    def init_fn(params: optax.Params) -> optax.OptState:
        _errors.params(params)
        return inner.init(params)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        nonlocal types
        if types is None:  # not earlier: building an optimizer makes no array
            types = _errors.state_types(jax.eval_shape(inner.init, ()))
        _errors.same_state(state, types)
        if needs_params and params is None:
            raise ValueError(
                f"`params` must be given to update for {needs_params}, got None; call "
                "update(grads, state, params)"
            )
        _errors.belong(updates, params, state)
        if params is None:
            new_updates, state = inner.update(updates, state)
            return jax.tree.map(_cast_back, new_updates, updates), state
        # A parameter without a gradient may be anything, and is not looked at.
        params = jax.tree.map(_where_given, updates, params, is_leaf=_is_none)
        new_updates, state = inner.update(updates, state, params)
        return jax.tree.map(_cast_back, new_updates, updates, params), state

    return optax.GradientTransformation(init_fn, update_fn)


def _where_given(g: Any, p: Any) -> Any:
    return None if g is None else p


def _cast_back(update: jax.Array, g: Any, p: Any = None) -> jax.Array:
    return cast(update, update_dtype_of(g, p))


def _is_none(x: Any) -> bool:
    return x is None
