"""Copy a scheduler of torch, so that its steps change neither it nor its optimizer.

The copy writes into a stand-in for the optimizer, which has copies of the options of
each group. The functions in it that refer to the optimizer, to its groups or to the
scheduler (by a variable, by an argument or as methods) see the copies of these.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from typing import Any

from optax_rmsprop._errors import kind_of, short


def copy_of(scheduler: Any) -> Any:
    """A copy of a scheduler whose optimizer is a stand-in, with the options only."""
    from torch.optim import Optimizer

    # It is not of the optimizer's class, which may hand on what is written to it, as
    # that of accelerate does. It has neither parameters nor state: a scheduler that
    # reads them is no function of the step, and fails.
    original, stand_in = scheduler.optimizer, object.__new__(Optimizer)
    copies = {id(p): p for group in original.param_groups for p in group["params"]}
    try:
        stand_in.defaults = copy.deepcopy(original.defaults, copies)
        stand_in.param_groups = [
            {name: copy.deepcopy(v) for name, v in group.items() if name != "params"}
            for group in original.param_groups
        ]
        copies[id(original)] = stand_in
        copies[id(original.param_groups)] = stand_in.param_groups
        copies |= zip(
            map(id, original.param_groups), stand_in.param_groups, strict=True
        )
        return _copied(scheduler, copies)
    except Exception as error:
        raise TypeError(
            "`scheduler` must be one that can be copied, got "
            f"{kind_of(scheduler)}: {type(error).__name__}: {short(str(error))}; let "
            "its functions depend on the step only"
        ) from error


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of a scheduler, or of a part of it.

    `copies` has the copies made so far by the id of the original, as the memo of
    `copy.deepcopy` has. That function alone would not do: it shares functions, and
    with them the optimizer to which they refer, and it copies the object of a bound
    method, which may be a trainer with model and data.
    """
    from torch.optim.lr_scheduler import LRScheduler

    if id(value) in copies:
        return copies[id(value)]
    copied = functools.partial(_copied, copies=copies)
    if isinstance(value, types.FunctionType):
        return _copied_function(value, copies)
    if isinstance(value, types.MethodType):
        owner = value.__self__
        if id(owner) not in copies:
            own = {name: copies.get(id(v), v) for name, v in vars(owner).items()}
            copies[id(owner)] = object.__new__(type(owner))
            vars(copies[id(owner)]).update(own)
        return types.MethodType(copied(value.__func__), copies[id(owner)])
    if isinstance(value, functools.partial):
        keywords = {name: copied(v) for name, v in value.keywords.items()}
        return functools.partial(
            copied(value.func), *map(copied, value.args), **keywords
        )
    if isinstance(value, LRScheduler):
        copies[id(value)] = object.__new__(type(value))
        vars(copies[id(value)]).update({k: copied(v) for k, v in vars(value).items()})
        return copies[id(value)]
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    if type(value) is dict:
        return {name: copied(v) for name, v in value.items()}
    return copy.deepcopy(value, copies)


def _copied_function(
    function: types.FunctionType, copies: dict[int, Any]
) -> types.FunctionType:
    """A function that sees the copies where the original sees the originals.

    What else it refers to, such as a data loader, it shares with the original.
    """
    from torch.optim.lr_scheduler import LRScheduler

    def seen(value: Any) -> Any:
        kinds = (types.FunctionType, types.MethodType, functools.partial, LRScheduler)
        if isinstance(value, kinds):
            return _copied(value, copies)
        return copies.get(id(value), value)

    variables, cells = function.__globals__, function.__closure__ or ()
    replaced = {k: copies[id(v)] for k, v in variables.items() if id(v) in copies}
    new = types.FunctionType(
        function.__code__,
        variables | replaced if replaced else variables,
        function.__name__,
        closure=tuple(types.CellType() for _ in cells),
    )
    copies[id(function)] = new  # before its variables, which may refer to it
    new.__defaults__ = function.__defaults__ and tuple(map(seen, function.__defaults__))
    new.__kwdefaults__ = function.__kwdefaults__
    for cell, old in zip(new.__closure__ or (), cells, strict=True):
        with contextlib.suppress(ValueError):  # the cell is empty
            cell.cell_contents = seen(old.cell_contents)
    return new
