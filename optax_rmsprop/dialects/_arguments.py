"""The decorator of every dialect, and the check for options that are not supported.

A dialect calls `rmsprop` with its own arguments under our names. An error of `rmsprop`
uses our names too. So `dialect` translates it: with `@dialect(decay="alpha")`,

    `decay` must be a number in [0, 1), got 1.5 (torch calls it alpha)

comes out of `dialects.torch` as

    dialects.torch: `alpha` must be a number in [0, 1), got 1.5
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from optax_rmsprop import _errors
from optax_rmsprop._errors import short, shown

_ASCEND = "; to ascend put optax.scale(-1.0) before this in an optax.chain"

Function = TypeVar("Function", bound=Callable[..., Any])


def dialect(**names: str) -> Callable[[Function], Function]:
    """Make a function a dialect: its errors use the framework's names of arguments.

    Args:
      **names: the framework's name for each argument of `rmsprop` that has another name
        there.
    """

    def decorate(function: Function) -> Function:
        prefix = f"dialects.{function.__name__}: "
        signature = inspect.signature(function)

        def translated(error: Exception) -> str:
            message = str(error).replace(" (torch calls it alpha)", "")
            if "maximize" not in signature.parameters:
                message = message.replace(_errors.ASCEND, _ASCEND)
            message = re.sub(
                r"`(\w+)`", lambda m: f"`{names.get(m[1], m[1])}`", message
            )
            return prefix + message

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(
                    f"{prefix}{short(str(error))}; it takes "
                    f"{', '.join(signature.parameters)} (and init takes the parameters)"
                ) from None
            try:
                # A schedule is called in `update`, where errors are not translated. So
                # it is checked here, under the framework's name.
                for ours in ("learning_rate", "weight_decay"):
                    theirs = names.get(ours, ours)
                    if callable(value := bound.arguments.get(theirs)):
                        bound.arguments[theirs] = _errors.schedule(theirs, value)
                return function(*bound.args, **bound.kwargs)
            except (TypeError, ValueError) as error:
                raise type(error)(translated(error)) from None

        return checked  # type: ignore[return-value]

    return decorate


def refuse(name: str, value: Any, default: Any, remedy: str) -> None:
    """Refuse a value of an option that changes the numbers and is not supported.

    The default passes, also as an array, because optax.inject_hyperparams turns all
    numbers into arrays. A traced value is not checked.
    """
    if isinstance(value, Tracer):
        return
    is_default = value is default
    is_number = _errors.is_real(value) or isinstance(value, np.bool_)
    if default is not None and is_number:
        dtype = value.dtype if isinstance(value, jax.Array) else None
        is_default = np.array_equal(value, np.asarray(default, dtype))
    if not is_default:
        raise ValueError(
            f"`{name}` must be {default}, because other values are not supported, got "
            f"{shown(value)}; {remedy}"
        )
