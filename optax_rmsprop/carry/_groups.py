"""Parameter groups of a run, and their learning rates, the user's or the source's.

For example, take two groups with the rates 0.001 and 0.01 that have made 5 and 3
updates, because the second was added later, and the schedule f, given for both. Their
rates differ, so f multiplies them; and it counts the updates of the run:

    {"0": Adapted(f, factor=0.001, behind=0), "1": Adapted(f, factor=0.01, behind=2)}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_rmsprop import _errors, dialects
from optax_rmsprop._errors import kind_of, shown
from optax_rmsprop.carry._slots import (
    GRAD_AVG,
    MOMENTUM_BUFFER,
    OF_SQUARES,
    SQUARE_AVG,
)


class Group(NamedTuple):
    """Parameters with common options."""

    dialect: str
    lr: float
    options: dict[str, Any]  # the dialect's other arguments
    step: int  # updates made
    initial_lr: float  # that a scheduler multiplies

    @property
    def slots(self) -> list[str]:
        """The names of the slots that each of its parameters has."""
        needed = {
            SQUARE_AVG: True,
            GRAD_AVG: self.options["centered"],
            MOMENTUM_BUFFER: self.options["momentum"] > 0,
        }
        return [slot for slot, is_needed in needed.items() if is_needed]

    def initial(self, name: str) -> float:
        """The value of a slot, or of a field of our states, before the first update."""
        starts_at_1 = self.dialect in ("timm", "stable_baselines3")
        return float(starts_at_1 and name in OF_SQUARES)

    def transform(self, learning_rate: Any) -> optax.GradientTransformationExtraArgs:
        """The optimizer in JAX."""
        make = getattr(dialects, self.dialect)
        momentum = getattr(learning_rate, "momentum", None)
        if momentum is None:
            return make(learning_rate, **self.options)
        if MOMENTUM_BUFFER not in self.slots:
            raise ValueError(
                "`learning_rate` must have a momentum of None for a group without "
                "momentum, whose state has no buffer for it, got a schedule; begin the "
                "run with a momentum above 0"
            )

        def with_momentum(momentum: Any) -> optax.GradientTransformationExtraArgs:
            return make(learning_rate, **self.options | {"momentum": momentum})

        dtype = jnp.result_type(float)  # not that of 16-bit parameters
        return optax.inject_hyperparams(with_momentum, hyperparam_dtype=dtype)(momentum)


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
        _check_rate(label, rates[label], last, group.lr)
        adapted = Adapted(rates[label], factors[label], last - group.step)
        if callable(rates[label]) and (adapted.factor != 1 or adapted.behind):
            rates[label] = adapted
    return rates


def _check_rate(label: str, rate: Any, step: int, now: float) -> None:
    """Refuse what is no rate, and a table of torch's that begins in another way."""
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
    if isinstance(rate, Schedule) and rate.rates[0] != now:
        raise ValueError(
            f"`learning_rate` must be a table that begins with the rate of group "
            f"{label}, {now:g}, got one that begins with {rate.rates[0]:g}; give "
            "schedule_of of this optimizer's scheduler, with its groups in their order"
        )
    remedy = "give a number, a schedule, or a list of them"
    if not callable(rate) and not (np.ndim(rate) == 0 and _errors.is_real(rate)):
        raise TypeError(
            f"`learning_rate` must be a number or a schedule, got {shown(rate)} for "
            f"group {label}; {remedy}"
        )
