"""Checks of single arguments: numbers, schedules, flags, dtypes."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from optax import ScalarOrSchedule

from optax_rmsprop._errors._texts import at, kind_of, shown

Function = TypeVar("Function", bound=Callable[..., Any])


# What frameworks call our arguments, and a dialect that takes that name.
FOREIGN = {
    "alpha": ("decay", "torch"),
    "epsilon": ("eps", "keras"),
    "eta": ("learning_rate", "optimisers_jl"),
    "gamma": ("decay", "jax_example_libraries"),
    "lr": ("learning_rate", "torch"),
    "rho": ("decay", "keras"),
    "step_size": ("learning_rate", "jax_example_libraries"),
    "wc": ("weight_decay", "dqn2015"),
}


def knows_foreign_names(function: Function) -> Function:
    """Let the error about another framework's argument say what it is called here."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() & FOREIGN.keys():
            ours, dialect = FOREIGN[name]
            own = ours in inspect.signature(function).parameters
            where = "" if own else " of rmsprop()"
            raise TypeError(
                f"{function.__name__}() takes no `{name}`, got {shown(kwargs[name])}; "
                f"here it is `{ours}`{where}, and dialects.{dialect} takes `{name}`"
            )
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


# For dialects without maximize, see `dialects/_arguments.py`.
ASCEND = "; to ascend give maximize=True"


def number(
    name: str,
    value: Any,
    *,
    high: float = math.inf,
    zero: bool = True,
    hint: str = "",
    below_0: str = "",
) -> ArrayLike:
    """Check a scalar hyperparameter against [0, high), or (0, high) unless `zero`.

    Python and NumPy numbers come back as `float`, which promotes no dtype. JAX arrays
    come back as floating-point arrays; their value is checked unless it is traced.
    `hint` ends every error about it, `below_0` that about a negative number.
    """
    rule = f"`{name}` must be a number in {'[' if zero else '('}0, {high:g})"
    if not is_real(value):
        if callable(value) and not isinstance(value, type):
            hint = "; to schedule it use optax.inject_hyperparams"
        elif hint != _SCHEDULED and isinstance(value, jax.Array):
            hint = _HYPERPARAM_DTYPE if jnp.iscomplexobj(value) else hint
        raise TypeError(f"{rule}, got {shown(value)}{hint}")
    if np.ndim(value) != 0:
        raise TypeError(
            f"{rule}, got an array of shape {np.shape(value)}{hint}; use jax.vmap to "
            "run many values at once"
        )
    # Within jax.jit, operations on an array make a tracer, also if it is none itself.
    known = None if isinstance(value, Tracer) else _float(value)
    got = shown(value) if known is None or math.isinf(known) else f"{known:g}"
    if isinstance(value, jax.Array):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(jnp.float32)
        if jnp.finfo(value.dtype).bits < 32:
            raise TypeError(
                f"{rule} in at least float32, got {value.dtype}, which rounds 0.999 to "
                f"1{_HYPERPARAM_DTYPE}"
            )
    else:
        value = known
    if known is not None:
        within = 0 <= known < high if zero else 0 < known < high
        if not within:
            why = below_0 if known < 0 else ""
            raise ValueError(f"{rule}, got {got}{hint}{why}")
        if known > float(jnp.finfo(jnp.float32).max):
            raise ValueError(f"{rule}, got {known}, which is infinite in float32")
    return value


_SCHEDULED = " from its schedule"


# optax.inject_hyperparams makes all numbers arrays in the dtype of the parameters.
_HYPERPARAM_DTYPE = "; with optax.inject_hyperparams pass hyperparam_dtype=jnp.float32"


def is_real(value: Any) -> bool:
    """Whether a value is a real number or an array of real numbers."""
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
        return False
    if isinstance(value, int):
        return not isinstance(value, bool)
    dtype = dtype_of(value)
    kinds = jnp.integer, jnp.floating
    return dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf


def schedule(name: str, value: Any, **rules: Any) -> ScalarOrSchedule:
    """Check a number as `number` does; a schedule comes back with a check of its own.

    That check is of each number that the schedule returns. The values of JAX arrays are
    left out of it: under `jax.jit` they are not known.
    """
    if isinstance(value, type) or not callable(value):
        return number(name, value, **rules)

    def checked(count: Any) -> Any:
        result = value(count)
        is_array = isinstance(result, jax.Array) and result.ndim == 0
        if not (is_array and is_real(result)):
            number(name, result, **{**rules, "hint": _SCHEDULED})
        return result

    return checked


def is_off(value: ArrayLike) -> bool:
    """Whether an option is 0 for good, which only a Python number can promise."""
    return isinstance(value, float) and value == 0


def flags(**options: Any) -> None:
    """Check options that choose the program, which a traced value cannot do."""
    for name, value in options.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"`{name}` must be True or False, got {shown(value)}")


def integer(name: str, value: Any, *, high: float = math.inf) -> int:
    """Check a Python or NumPy integer against [0, high)."""
    rule = f"`{name}` must be an integer in [0, {high:g})"
    if not isinstance(value, int | np.integer) or not is_real(value):
        raise TypeError(
            f"{rule}, got {shown(value)}; it chooses the program: do not trace it"
        )
    if not 0 <= value < high:
        raise ValueError(f"{rule}, got {shown(value)}")
    return int(value)


# optax.inject_hyperparams takes functions and dtypes for schedules, and calls them.
STATIC_ARGS = "; with optax.inject_hyperparams name `{}` in its static_args"


def as_dtype(value: Any) -> np.dtype | None:
    """What a value says as a dtype; None if it is none."""
    if value is None or isinstance(value, jax.Array | np.ndarray | np.generic):
        return None
    try:
        return jnp.dtype(value)
    except Exception:  # for texts NumPy has more than one kind of error
        return None


def dtype_of(leaf: Any) -> Any:
    """The dtype of a number or an array, in JAX; None for anything else.

    `jnp.result_type` alone takes the string "float32", the class `float` and None for
    dtypes, and does not know float0.
    """
    if getattr(leaf, "dtype", None) == jax.dtypes.float0:
        return jax.dtypes.float0
    if leaf is None or isinstance(leaf, str | type | np.dtype):
        return None
    if isinstance(leaf, jax.Array):  # the quick way
        return leaf.dtype
    try:
        return jnp.result_type(leaf)
    except (TypeError, ValueError, OverflowError):
        return None


def inexact(name: str, leaf: Any, path: Any, *, remedy: str, real: bool) -> None:
    """Check that a leaf is floating point or, unless `real`, complex."""
    dtype, kind = dtype_of(leaf), jnp.floating if real else jnp.inexact
    if dtype is not None and jnp.issubdtype(dtype, kind):
        if _has_sign_and_zero(dtype):
            return
        dtype = f"{dtype}, which has neither sign nor 0,"
    elif dtype == jax.dtypes.float0:
        dtype = "float0"
        remedy = "the gradient of an integer: give None in its place"
    raise TypeError(
        f"`{name}` must be floating point{'' if real else ' or complex'}, got "
        f"{kind_of(leaf) if dtype is None else dtype} at {at(path)}; {remedy}"
    )


@functools.cache
def _has_sign_and_zero(dtype: Any) -> bool:
    """False for float8_e8m0fnu, which is made for scales."""
    return np.array_equal(np.array([-1, 0], dtype).astype(complex), [-1, 0])
