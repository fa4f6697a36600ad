"""Carry a run from Keras 3 to JAX, as `_torch.py` carries one from torch."""

from __future__ import annotations  # so that help() shows these types by name

import collections
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_rmsprop import dialects
from optax_rmsprop._errors import bare, some
from optax_rmsprop.carry._port import Port
from optax_rmsprop.carry._run import FROZEN, Group, Run, Source, carry

if TYPE_CHECKING:
    import keras

# Keras' suffix of a slot's name, and torch's name for the slot.
SLOTS = {
    "velocity": "square_avg",
    "average_gradient": "grad_avg",
    "momentum": "momentum_buffer",
}


def from_keras(
    model: keras.Model,
    optimizer: keras.optimizers.RMSprop,
    port: Port,
    learning_rate: Any = None,
) -> Run:
    """Carry a model and its RMSprop from Keras 3 to JAX.

    Args:
      model: holds all of the optimizer's variables. Nothing is changed in it.
      optimizer: a `keras.optimizers.RMSprop`, before its first step or after any.
      port: function from a dict of NumPy arrays to a tree of arrays, as in
        `from_torch`. The names are the variables' paths, such as
        "sequential/dense/kernel".
      learning_rate: in place of Keras': a number or an optax schedule of the steps made
        (Keras' included). Needed where Keras has a schedule.

    Returns:
      A `Run` whose optimizer is that of `dialects.keras`. Leaves that are not
      trainable stay put. Variables excluded from weight decay are in a group of their
      own.

    Raises:
      KeyError: the port asks for a path that the model does not have.
      TypeError: another optimizer.
      ValueError: a port that does more than to move elements, mixes groups or casts; an
        option of Keras' that has no counterpart here; a schedule of Keras'; equal
        paths.

    Warns:
      RuntimeWarning: a slot holds NaN or infinity. It is carried as it is.

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
    kind = type(optimizer)
    if (kind.__name__, kind.__module__.split(".")[0]) != ("RMSprop", "keras"):
        name = bare(f"{kind.__module__}.{kind.__name__}")
        raise TypeError(
            "`optimizer` must be a keras.optimizers.RMSprop of Keras 3, got "
            f"{name}; its state means something else"
        )
    if repeated := _repeated(v.path for v in model.weights):
        raise ValueError(
            "`model` must have a path of its own for each variable, got more than one "
            f"at {some(repeated)}; give the layers names"
        )
    arrays = {v.path: np.asarray(v) for v in model.weights}
    config = optimizer.get_config()
    takes = inspect.signature(dialects.keras).parameters
    options = {name: config[name] for name in takes.keys() & config.keys()}
    rate = options.pop("learning_rate")
    if learning_rate is None and not isinstance(rate, float):
        raise ValueError(
            "`learning_rate` must be given, because Keras' is a schedule, got None; "
            "give it as an optax schedule"
        )
    step = int(optimizer.iterations)
    groups = {"0": Group("keras", rate, options, step)}
    of_optimizer = {v.path.split("/")[-1]: v for v in optimizer.variables}
    if repeated := _repeated(v.path.split("/")[-1] for v in optimizer.variables):
        raise ValueError(
            "`model` must have variables whose paths differ in more than / and _, got "
            f"more than one slot {some(repeated)}; give the layers other names"
        )
    unclaimed = {name for name in of_optimizer if name.endswith(tuple(SLOTS))}
    labels = dict.fromkeys(arrays, FROZEN)
    slots: dict[str, Mapping[str, np.ndarray]] = {}
    for variable in model.trainable_variables:
        stem = variable.path.replace("/", "_")
        found = {
            name: np.asarray(of_optimizer[f"{stem}_{suffix}"])
            for suffix, name in SLOTS.items()
            if f"{stem}_{suffix}" in of_optimizer
        }
        unclaimed -= {f"{stem}_{suffix}" for suffix in SLOTS}
        if step and not found:
            continue
        labels[variable.path] = "0"
        if step:
            slots[variable.path] = found
        # Keras tells only by itself what exclude_from_weight_decay has excluded.
        if options["weight_decay"] and not optimizer._use_weight_decay(variable):
            labels[variable.path] = "1"
            without = options | {"weight_decay": None}
            groups["1"] = Group("keras", rate, without, step)
    if unclaimed:
        raise ValueError(
            "`model` must hold the optimizer's variables, but none of its trainable "
            f"variables has the slots {some(sorted(unclaimed))}; give the model that "
            "it trains"
        )
    shapes = {name: array.shape for name, array in arrays.items()}
    return Source(arrays, shapes, {}, groups, labels, labels, slots)


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, n in collections.Counter(names).items() if n > 1]
