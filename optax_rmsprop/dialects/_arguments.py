"""What every dialect does with its arguments: refuse, in the framework's own words."""

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

Dialect = TypeVar("Dialect", bound=Callable[..., Any])


def speaks(**names: str) -> Callable[[Dialect], Dialect]:
    """Let errors use a framework's names for our arguments, and list what it takes.

    Args:
      **names: the framework's name for each argument of `rmsprop` it calls otherwise.
    """

    def decorate(dialect: Dialect) -> Dialect:
        name = f"dialects.{dialect.__name__}"

        def translated(message: str) -> str:
            message = message.replace(" (torch calls it alpha)", "")
            if "maximize" not in inspect.signature(dialect).parameters:
                message = message.replace(_errors.ASCEND, _ASCEND)
            return re.sub(r"`(\w+)`", lambda m: f"`{names.get(m[1], m[1])}`", message)

        @functools.wraps(dialect)
        def checked(*args: Any, **kwargs: Any) -> Any:
            signature = inspect.signature(dialect)
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(
                    f"{name}: {short(str(error))}; it takes "
                    f"{', '.join(signature.parameters)} (and init takes the parameters)"
                ) from None
            try:
                # A schedule is called later, where this no longer translates.
                for ours in ("learning_rate", "weight_decay"):
                    theirs = names.get(ours, ours)
                    if callable(value := bound.arguments.get(theirs)):
                        bound.arguments[theirs] = _errors.schedule(theirs, value)
                return dialect(*bound.args, **bound.kwargs)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {translated(str(error))}") from None

        return checked  # type: ignore[return-value]

    return decorate


def refuse(name: str, value: Any, default: Any, remedy: str) -> None:
    """Refuse a value that would change the numbers in a way we do not reproduce.

    A traced value is not checked. optax.inject_hyperparams turns all numbers to arrays.
    """
    if isinstance(value, Tracer):
        return
    equal = value is default
    is_number = _errors.is_real(value) or isinstance(value, np.bool_)
    if default is not None and is_number:
        dtype = value.dtype if isinstance(value, jax.Array) else None
        equal = np.array_equal(value, np.asarray(default, dtype))
    if not equal:
        raise ValueError(
            f"`{name}` must be {default}, for we do not reproduce it, got "
            f"{shown(value)}; {remedy}"
        )
