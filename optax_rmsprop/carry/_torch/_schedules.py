"""Tabulate a scheduler of torch: its learning rates, and its momenta if it has any.

torch's schedulers are objects that write into their optimizer's groups, many of them
from one step to the next: the new rate is the old one times a factor. Formulas of our
own would differ in the last bits. So a copy of the scheduler makes its steps, on a
stand-in for the optimizer (`_scheduler_copy.py`), and what it writes becomes a table.
"""

from __future__ import annotations  # so that help() shows these types by name

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_rmsprop._errors import bare, is_real, kind_of, short, shown, some
from optax_rmsprop.carry._groups import Schedule
from optax_rmsprop.carry._torch._format import updates_made
from optax_rmsprop.carry._torch._scheduler_copy import copy_of

if TYPE_CHECKING:
    import torch

MOST = 2**31  # a count is an int32


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
    stepped = copy_of(scheduler)
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
    # Equal tables are one object: so `from_torch` sees which groups do the same.
    made: dict[bytes, Schedule] = {}
    schedules = []
    for rate, momentum in zip(rates, momenta, strict=True):
        cycled = momentum if np.ptp(momentum) else None
        table = rate.tobytes() + (b"" if cycled is None else cycled.tobytes())
        schedule = Schedule(rate, cycled, start, every)
        schedules.append(made.setdefault(table, schedule))
    return schedules


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
        updates_made("`step` of the scheduler's optimizer", state["step"])
        for state in optimizer.state.values()
        if "step" in state
    ]
    return max(steps, default=0)


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
