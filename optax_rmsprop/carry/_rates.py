"""The learning rate of each group of a run in JAX, from the user's and the source's.

For example, take two groups with the rates 0.001 and 0.01 that have made 5 and 3
updates, because the second was added later, and the schedule f, given for both. Their
rates differ, so f multiplies them; and it counts the updates of the run:

    {"0": Adapted(f, factor=0.001, behind=0), "1": Adapted(f, factor=0.01, behind=2)}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_rmsprop import _errors
from optax_rmsprop._errors import kind_of, shown
from optax_rmsprop.carry._schedules import Schedule

if TYPE_CHECKING:
    from optax_rmsprop.carry._run import Group


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A schedule for one group of several: multiplied, and with the count of the run.

    Attributes:
      schedule: the user's, called with the number of updates of the run.
      factor: the group's rate, if the schedule multiplies it.
      behind: the updates that the run has made and the group, added later, has not.
    """

    schedule: Callable[[Any], Any]
    factor: float
    behind: int

    def __call__(self, count: Any) -> Any:
        return self.factor * self.schedule(count + self.behind)

    @property
    def momentum(self) -> Any:
        momentum = getattr(self.schedule, "momentum", None)
        return momentum and Adapted(momentum, 1.0, self.behind)


def learning_rates(learning_rate: Any, groups: Mapping[str, Group]) -> dict[str, Any]:
    """For each group's label its rate: a number, or a schedule of the group's count.

    Args:
      learning_rate: as in `from_torch`.
      groups: the groups of the source, by label.
    """
    rates: dict[str, Any] = {label: group.lr for label, group in groups.items()}
    factors = dict.fromkeys(groups, 1.0)
    if isinstance(learning_rate, list | tuple):
        if len(learning_rate) != len(groups):
            raise ValueError(
                f"`learning_rate` must have one for each of {len(groups)} groups, got "
                f"{len(learning_rate)}; give as many, or one for all"
            )
        rates = dict(zip(groups, learning_rate, strict=True))
    elif learning_rate is not None:
        bases = {label: group.initial_lr for label, group in groups.items()}
        if len({*rates.values()}) > 1 or len({*bases.values()}) > 1:
            if not callable(learning_rate) or isinstance(learning_rate, Schedule):
                raise ValueError(
                    f"`learning_rate` must be a list of one for each of {len(groups)} "
                    f"groups, whose rates differ, got {shown(learning_rate)}; or give "
                    "a function of the count, by which the rate of each is multiplied"
                )
            factors = bases
        rates = dict.fromkeys(groups, learning_rate)
    last = max(group.step for group in groups.values())
    for label, group in groups.items():
        _check_rate(label, rates[label], last)
        adapted = Adapted(rates[label], factors[label], last - group.step)
        if callable(rates[label]) and (adapted.factor != 1 or adapted.behind):
            rates[label] = adapted
    return rates


def _check_rate(label: str, rate: Any, step: int) -> None:
    """Refuse what is no rate, and a table of torch's that begins at another step."""
    if hasattr(rate, "get_last_lr"):
        raise TypeError(
            f"`learning_rate` must be a number or a schedule, got {kind_of(rate)}; "
            "give schedule_of(scheduler, steps)"
        )
    if isinstance(rate, Schedule) and rate.start != step:
        raise ValueError(
            f"`learning_rate` must be a table that begins at the run's step, {step}, "
            f"got one for group {label} that begins at {rate.start}; load the "
            "optimizer's state in torch, too, before schedule_of"
        )
    remedy = "give a number, a schedule, or a list of them"
    if not callable(rate) and not (np.ndim(rate) == 0 and _errors.is_real(rate)):
        raise TypeError(
            f"`learning_rate` must be a number or a schedule, got {shown(rate)} for "
            f"group {label}; {remedy}"
        )
