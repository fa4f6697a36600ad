"""Tabulate a scheduler of torch: its learning rates, and its momenta if it has any.

torch's schedulers are objects that write into their optimizer's groups, many of them
from one step to the next: the new rate is the old one times a factor. Formulas of our
own would differ in the last bits. So a copy of the scheduler makes its steps, on a
stand-in for the optimizer, and what it writes becomes a table.
"""

from __future__ import annotations  # so that help() shows these types by name

import contextlib
import copy
import dataclasses
import functools
import inspect
import types
import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_rmsprop._errors import bare, is_real, kind_of, short, shown, some
from optax_rmsprop.carry._torch_format import finite

if TYPE_CHECKING:
    import torch

MOST = 2**31  # a count is an int32


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """An optax schedule from a table, made by `schedule_of`.

    Attributes:
      rates: the learning rate of each step of the scheduler, in float64.
      momenta: the momentum likewise; None if it stays what it is.
      start: the number of updates that the run had made when the table was made.
      every: the number of updates for which each entry serves.
    """

    rates: np.ndarray
    momenta: np.ndarray | None
    start: int
    every: int

    def __call__(self, count: ArrayLike) -> jax.Array:
        """The learning rate after this number of updates, torch's included.

        Before the table it is the first entry, and after it the last.
        """
        made = jnp.maximum(jnp.asarray(count).astype(int), self.start) - self.start
        return jnp.asarray(self.rates)[
            jnp.minimum(made // self.every, len(self.rates) - 1)
        ]

    @property
    def momentum(self) -> Schedule | None:
        """The schedule of the momentum; None if it stays what it is."""
        if self.momenta is None:
            return None
        return Schedule(self.momenta, None, self.start, self.every)


def schedule_of(
    scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int, every: int = 1
) -> list[Schedule]:
    """Tabulate a scheduler of torch from its present step on.

    A copy of the scheduler makes the steps. The scheduler and its optimizer stay as
    they are.

    Args:
      scheduler: any of torch.optim.lr_scheduler, or a subclass of `LRScheduler`, whose
        rates depend on its step only. If several schedulers take turns at one
        optimizer, join them in a `SequentialLR`.
        A wrapper may step it more often than once an update, as accelerate does in
        several processes: then give one that is made to step once.
      steps: the length of the table: how often the run still calls scheduler.step().
        Afterwards the last rate stays.
      every: the number of updates between two calls of scheduler.step(), for a
        scheduler that steps once an epoch. Tabulate it at the end of an epoch: the
        first entry serves for that many updates.

    Returns:
      A list for `from_torch(..., learning_rate=)`: for each group of the scheduler's
      optimizer an optax schedule from the number of updates made, torch's included, to
      the learning rate. Each has the attributes `rates` and `momenta` (NumPy arrays of
      float64; momenta is None if the scheduler does not change the momentum), `start`
      (the largest `step` in the optimizer's state, where the table begins), `every`,
      and `momentum` (a schedule of the momenta, or None).

    Raises:
      TypeError: it is no scheduler of torch, or its step needs a metric; `steps` or
        `every` is not an integer; the scheduler cannot be copied.
      ValueError: `steps` or `every` is not positive; the scheduler ends sooner; it
        changes an option other than the learning rate and the momentum; a rate is not
        finite.

    Example:
      >>> import torch
      >>> from optax_rmsprop.carry import schedule_of
      >>> optimizer = torch.optim.RMSprop(torch.nn.Linear(3, 2).parameters(), lr=0.5)
      >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
      >>> (schedule,) = schedule_of(scheduler, steps=5)
      >>> schedule.rates.tolist()
      [0.5, 0.5, 0.25, 0.25, 0.125]

    References:
      torch/optim/lr_scheduler.py and torch/optim/swa_utils.py (2.13.0).
    """
    steps = _positive("steps", steps, "give how often the run still steps the schedule")
    every = _positive("every", every, "give the updates between two scheduler steps")
    _check(scheduler)
    start = _step(scheduler.optimizer)
    stepped = _copy(scheduler)
    groups = stepped.optimizer.param_groups
    rates, momenta = np.empty((2, len(groups), steps))
    before = [_unscheduled(stepped, group) for group in groups]
    with warnings.catch_warnings(action="ignore"):  # torch's, of steps without updates
        for step in range(steps):
            for number, group in enumerate(groups):
                rates[number, step] = float(group["lr"])
                momenta[number, step] = float(group.get("momentum", 0))
            _advance(stepped, step, steps)
            for number, group in enumerate(groups):
                if (after := _unscheduled(stepped, group)) != before[number]:
                    raise _changed(number, before[number], after)
    for name, table in (("lr", rates), ("momentum", momenta)):
        if not np.isfinite(table).all():
            number, step = np.argwhere(~np.isfinite(table))[0]
            raise ValueError(
                f"`{name}` of group {number} must be finite, got "
                f"{table[number, step]} after {step} steps of the scheduler; repair "
                "it in torch, or give fewer `steps`"
            )
    return [
        Schedule(rate, momentum if np.ptp(momentum) else None, start, every)
        for rate, momentum in zip(rates, momenta, strict=True)
    ]


def _positive(name: str, value: Any, remedy: str) -> int:
    rule = f"`{name}` must be an integer in [1, 2³¹), got {shown(value)}; {remedy}"
    if not isinstance(value, int | np.integer) or not is_real(value):
        raise TypeError(rule)
    if not 1 <= value < MOST:
        raise ValueError(rule)
    return int(value)


def _check(scheduler: Any) -> None:
    from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

    if not isinstance(scheduler, LRScheduler):
        within = [
            name
            for name, value in getattr(scheduler, "__dict__", {}).items()
            if isinstance(value, LRScheduler)
        ]
        remedy = f"its .{bare(within[0])}" if within else "the scheduler itself"
        raise TypeError(
            "`scheduler` must be a torch.optim.lr_scheduler.LRScheduler, got "
            f"{kind_of(scheduler)}; give {remedy}"
        )
    needed = [
        parameter.name
        for parameter in inspect.signature(scheduler.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if isinstance(scheduler, ReduceLROnPlateau) or needed:
        raise TypeError(
            "`scheduler` must be a function of the step, got "
            f"{kind_of(scheduler)}, which steps by {some(needed or ['metrics'])}; in "
            "JAX chain optax.contrib.reduce_on_plateau after the optimizer"
        )


def _step(optimizer: Any) -> int:
    """The largest number of updates that the optimizer has made of a parameter."""
    steps = [
        finite("`step` of the scheduler's optimizer", state["step"])
        for state in optimizer.state.values()
        if "step" in state
    ]
    step = max(steps, default=0.0)
    if step != int(step) or not 0 <= step < MOST:
        raise ValueError(
            "`step` of the scheduler's optimizer must be an integer in [0, 2³¹), got "
            f"{step:g}; give the number of updates made"
        )
    return int(step)


def _advance(scheduler: Any, made: int, steps: int) -> None:
    """Make a step as torch does after each update, the last one of the table too.

    OneCycleLR with a total of 100 refuses its step 101. So a table of 100 is its
    longest, although the rate after step 100, which no update should use, exists.
    """
    try:
        scheduler.step()
    except Exception as error:
        why = f"raises {type(error).__name__}: {short(str(error))}"
        if not made:
            raise ValueError(
                f"`scheduler` must have a step left, but its next one {why}; give "
                "`learning_rate` a number instead"
            ) from error
        raise ValueError(
            f"`steps` must be at most {made}, got {steps}: the scheduler has {made} "
            f"left, and then its step {why}; give {made}"
        ) from error


def _unscheduled(scheduler: Any, group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group that a schedule of its rates does not carry."""
    names = scheduler.optimizer.defaults.keys() - {"lr", "momentum"}
    return {name: group[name] for name in names if name in group}


def _changed(number: int, before: dict[str, Any], after: dict[str, Any]) -> ValueError:
    names = [name for name in after if after[name] != before[name]]
    return ValueError(
        "`scheduler` must change only the learning rate and the momentum, but changes "
        f"{some(names)} of group {number}; give one that does not, and schedule the "
        "rest by optax.inject_hyperparams"
    )


def _copy(scheduler: Any) -> Any:
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
