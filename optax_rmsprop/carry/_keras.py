"""Carry a run from Keras 3 to JAX, as `_torch` carries one from torch."""

from __future__ import annotations  # so that help() shows these types by name

import collections
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_rmsprop import dialects
from optax_rmsprop._errors import bare, kind_of, some
from optax_rmsprop.carry._groups import Group
from optax_rmsprop.carry._port import Port
from optax_rmsprop.carry._run import Run, Source, Weight, carry, lazy, warn
from optax_rmsprop.carry._slots import KERAS_SUFFIXES

if TYPE_CHECKING:
    import keras

# Options that `dialects.keras` refuses, and that can be reset in the middle of a run.
# Without gradient_accumulation_steps, Keras counts batches instead of updates.
CAN_BE_RESET = (
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "loss_scale_factor",
    "use_ema",
)
# What makes an update in Keras.
METHODS = (
    *("update_step", "apply", "apply_gradients", "_apply_weight_decay"),
    "_get_current_learning_rate",
)


def from_keras(
    model: keras.Model,
    optimizer: keras.optimizers.RMSprop,
    port: Port,
    learning_rate: Any = None,
) -> Run:
    """Carry a model and its RMSprop from Keras 3 to JAX.

    Args:
      model: has all of the optimizer's variables. It is not changed.
      optimizer: a `keras.optimizers.RMSprop`, before its first step or after any.
      port: a function from a dict of NumPy arrays to a tree of arrays, as in
        `from_torch`. The names are the variables' paths, such as
        "sequential/dense/kernel".
      learning_rate: replaces Keras': a number or an optax schedule of the number of
        updates made (Keras' included). It must be given if Keras has a schedule.

    Returns:
      A `Run` with `dialects.keras` as its optimizer, which does not change leaves that
      are not trainable. Variables excluded from weight decay are in a group of their
      own.

    Raises:
      KeyError: the port asks for a path that the model does not have.
      TypeError: the optimizer is not Keras' RMSprop.
      ValueError: the port changes elements, mixes groups or casts; an option of Keras
        has no counterpart here; Keras has a schedule, and no learning_rate is given;
        paths are equal.

    Warns:
      RuntimeWarning: a slot has NaN or infinity. It is carried as it is. Or trainable
        variables have no slots although others have: they do not train.

    Example:
      >>> model.compile(keras.optimizers.RMSprop(momentum=0.9))  # doctest: +SKIP
      >>> model.fit(images, labels)  # doctest: +SKIP
      >>> def port(weights):
      ...     return {"kernel": weights["sequential/dense/kernel"]}
      >>> run = from_keras(model, model.optimizer, port)  # doctest: +SKIP

    References:
      keras/src/optimizers/rmsprop.py (3.15.1).
    """
    source = _read(model, optimizer, learning_rate)
    return carry(source, port, learning_rate)


def _read(
    model: keras.Model, optimizer: keras.optimizers.RMSprop, learning_rate: Any
) -> Source:
    step = getattr(type(optimizer), "update_step", None)
    where = getattr(step, "__module__", ""), getattr(step, "__qualname__", "")
    is_known = where == ("keras.src.optimizers.rmsprop", "RMSprop.update_step")
    methods = (getattr(type(optimizer), name, None) for name in METHODS)
    if not is_known or not all(
        getattr(method, "__module__", "keras.").startswith("keras.")
        for method in methods
    ):
        remedy = "its state means something else"
        if hasattr(optimizer, "inner_optimizer"):
            remedy = "give its .inner_optimizer"
        raise TypeError(
            "`optimizer` must be a keras.optimizers.RMSprop of Keras 3, or inherit its "
            f"update_step and apply, got {kind_of(optimizer)}; {remedy}"
        )
    check_paths(model)
    weights = {
        v.path: Weight(tuple(np.shape(v)), lazy(np.asarray, v)) for v in model.weights
    }
    config = optimizer.get_config()
    takes = inspect.signature(dialects.keras).parameters
    options = {name: config[name] for name in takes.keys() & config.keys()}
    if not options.get("use_ema"):  # then Keras reads none of these
        options.pop("ema_momentum", None)
        options.pop("ema_overwrite_frequency", None)
    for name in (name for name in CAN_BE_RESET if name in options):
        try:
            dialects.keras(**{name: options[name]})
        except ValueError as error:
            raise ValueError(
                f"{error}, and set Keras' optimizer.{name} to {takes[name].default}"
            ) from None
    rate = options.pop("learning_rate")
    if not isinstance(rate, float):
        if learning_rate is None:
            raise ValueError(
                "`learning_rate` must be given, because Keras' is a schedule, got "
                "None; give it as an optax schedule"
            )
        rate = 0.0  # the given one replaces it
    step = int(optimizer.iterations)
    groups = {"0": Group("keras", rate, options, step, rate)}
    variables = {v.path.split("/")[-1]: v for v in optimizer.variables}
    if repeated := _repeated(v.path.split("/")[-1] for v in optimizer.variables):
        raise ValueError(
            "`model` must have variables whose paths differ in more than / and _, got "
            f"more than one slot {some(repeated)}; give the layers other names"
        )
    suffixes = tuple(KERAS_SUFFIXES.values())
    unclaimed = {name for name in variables if name.endswith(suffixes)}
    any_slots, of_none = bool(unclaimed), list[str]()
    for variable in model.trainable_variables:
        stem = variable.path.replace("/", "_")
        names = {slot: f"{stem}_{suffix}" for slot, suffix in KERAS_SUFFIXES.items()}
        slots = {
            slot: lazy(np.asarray, variables[name])
            for slot, name in names.items()
            if name in variables
        }
        unclaimed -= set(names.values())
        # Keras makes the slots of all variables at once, before its first update and
        # after a file without them was loaded.
        if any_slots and not slots:
            of_none.append(bare(variable.path))
            continue
        if (constraint := getattr(variable, "constraint", None)) is not None:
            raise ValueError(
                f"`{bare(variable.path)}` must have no constraint, because Keras' "
                "optimizer applies it after each update and ours does not, got "
                f"{kind_of(constraint)}; set its .constraint to None, and project the "
                "parameters in JAX (optax.projections)"
            )
        label = "0"
        # exclude_from_weight_decay can be read by this private method only.
        if options["weight_decay"] and not optimizer._use_weight_decay(variable):
            label = "1"
            without = options | {"weight_decay": None}
            groups[label] = Group("keras", rate, without, step, rate)
        weights[variable.path] = weights[variable.path]._replace(
            group=label, trained=True, slots=slots or None
        )
    if unclaimed:
        raise ValueError(
            "`model` must have the optimizer's variables, but none of its trainable "
            f"variables has the slots {some(sorted(unclaimed))}; give the model that "
            "it trains"
        )
    if of_none:
        warn(
            "carried as variables that do not train, because the optimizer has no "
            f"slots of them: {some(of_none, most=300)}; if they were unfrozen since it "
            "was built, compile the model again in Keras"
        )
    return Source(weights, groups)


def check_paths(model: keras.Model) -> None:
    """Refuse a model of which two variables have the same path."""
    if repeated := _repeated(v.path for v in model.weights):
        raise ValueError(
            "`model` must have a path of its own for each variable, got more than one "
            f"at {some(repeated)}; give the layers names that differ"
        )


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, n in collections.Counter(names).items() if n > 1]
