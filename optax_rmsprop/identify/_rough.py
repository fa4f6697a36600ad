"""Fit every form of RMSprop to a small part of a run, from many points.

The fits tell which forms are worth a fit to the whole run, and where it starts. First
each form starts from the best points of a grid. Then each starts from what the best
forms have found, because one switch more or less changes the numbers little.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from optax_rmsprop.identify._fit import VARIABLES, H, descend
from optax_rmsprop.identify._model import Form, Numbers, Slots, predict
from optax_rmsprop.identify._run import Run

COORDINATES = 16
STEPS = 30
# Eps in units of the median gradient, decay, momentum, and a weight decay that adds
# this fraction of the median gradient.
GRID = (1e-3, 0.1, 3.0), (0.5, 0.9, 0.99, 0.999), (0.0, 0.5, 0.9), (0.0, 1.0)
STARTS = len(GRID[0])
ITERATIONS = 12

# What is put around a loop over forms.
Progress = Callable[[list[Form]], Iterable[Form]]


class Rough(NamedTuple):
    """A form with numbers that fit a part of a run."""

    form: Form
    numbers: dict[str, float]
    free: tuple[str, ...]
    cost: float


@dataclasses.dataclass(frozen=True)
class _Part:
    """The part of a run, with a weight for each of its steps, (T, N).

    Far from the best fit, rounding is no measure: each coordinate counts alike.
    """

    run: Run
    weight: np.ndarray
    from_start: bool
    rate_is_known: bool

    @property
    def moved(self) -> np.ndarray:
        return self.run.moved * self.weight

    def slots(self, form: Form) -> Slots | None:
        return None if self.from_start else usual_slots(self.run, form)


@np.errstate(all="ignore")  # far from the best fit anything may overflow
def roughly(
    run: Run,
    forms: Iterable[Form],
    rate_is_known: bool,
    from_start: bool,
    progress: Progress = iter,
) -> list[Rough]:
    """The fits of all forms, the best first.

    A run that did not start at its first step starts with averages of its own gradients
    here, and its first third does not count.
    """
    early = run.at(slice(None), STEPS)
    moves = np.any(early.moved, axis=0) & np.any(early.grads, axis=0)
    if np.any(moves):
        run = early.at(moves)
    width = run.params.shape[1]
    some = np.linspace(0, width - 1, min(width, COORDINATES)).astype(int)
    run = run.at(np.unique(some))
    counts = np.arange(len(run.grads)) >= (0 if from_start else len(run.grads) // 3)
    weight = counts[:, None] / np.sqrt(np.mean(run.moved**2, axis=0))
    part = _Part(run, weight, from_start, rate_is_known)
    among = list(forms)
    found = {
        form: _fitted(part, form, _from_grid(part, form)) for form in progress(among)
    }
    best = sorted(found.values(), key=lambda rough: rough.cost)[:STARTS]
    for form in progress(among):
        again = _fitted(part, form, _from_others(best, form))
        found[form] = min(found[form], again, key=lambda rough: rough.cost)
    return sorted(found.values(), key=lambda rough: rough.cost)


def _from_grid(part: _Part, form: Form) -> Numbers:
    """The best point of the grid for each eps, of shape (STARTS, 1).

    From an eps that is too large, where steps are too short, the way is often blocked.
    """
    run, weight = part.run, part.weight
    initials = (0.0,) if form.bias_correction or not part.from_start else (0.0, 1.0)
    points = np.array(list(itertools.product(*GRID, initials)))
    eps, decay, momentum, l2, initial = points.T[:, :, None]
    root = np.sqrt(np.median(run.grads[run.grads != 0] ** 2))
    narrow, eps = eps**0.1, eps * root  # 0.5, 0.8 and 1.1
    l2 = l2 * root / max(np.median(np.abs(run.params)), 1e-30)
    if form.centered and form.bias_correction and part.from_start:
        # The first deviation is 0. So the first step is (g + l2 * p) / eps, which tells
        # both. It may be 1000 times the others, which then tell little else.
        at = np.argmax(~run.skipped)
        terms = np.stack([run.grads[at] * (-1) ** form.maximize, run.params[at]])
        terms, first = -run.rates[at] * terms * weight[at], part.moved[at]
        known = np.all(np.isfinite(terms))  # a coordinate may not move at all
        inverse, both = np.linalg.lstsq(terms.T, first)[0] if known else (0.0, 0.0)
        if inverse > 0:
            eps = narrow * np.where(form.nesterov, 1 + momentum, 1.0) / inverse
            l2 = np.full_like(l2, max(both / inverse, 0.0))
    eps = eps ** (2 if form.eps_in_sqrt else 1)
    one = np.ones_like(decay)
    numbers = Numbers(one, decay, eps, momentum, l2, 0 * one, initial)
    steps, _ = predict(form, run, numbers, part.slots(form))
    steps, moved = steps * weight[:, None], part.moved[:, None]
    if not part.rate_is_known:
        most = np.maximum(np.sum(steps**2, axis=(0, 2)), 1e-300)
        rates = np.maximum(np.sum(steps * moved, axis=(0, 2)) / most, 1e-20)
        numbers = numbers._replace(rate=rates[:, None])
        steps = steps * numbers.rate
    # What is left may be decoupled weight decay.
    shrunk = (-run.rates[:, None] * run.params * weight)[:, None]
    left = np.sum((moved - steps) * shrunk, axis=(0, 2)) / np.sum(shrunk**2)
    decoupled = np.maximum(left, 0)[:, None] / numbers.rate
    errors = np.sum(
        (steps + numbers.rate * decoupled * shrunk - moved) ** 2, axis=(0, 2)
    )
    each = errors.reshape(len(GRID[0]), -1)
    best = np.argmin(each, axis=1) + each.shape[1] * np.arange(len(each))
    return Numbers(*(x[best] for x in numbers._replace(decoupled=decoupled)))


def _from_others(best: list[Rough], form: Form) -> Numbers:
    """The numbers that other forms have found, of shape (STARTS, 1)."""
    rows = [[*converted(rough.form, rough.numbers, form).values()] for rough in best]
    rows += rows[:1] * (STARTS - len(rows))
    return Numbers(*np.array(rows).T[:, :, None])


def converted(form: Form, numbers: dict[str, float], other: Form) -> dict[str, float]:
    """The numbers of a form as a start for another, where eps has another unit."""
    power = (1 + other.eps_in_sqrt) / (1 + form.eps_in_sqrt)
    return numbers | {"eps": numbers["eps"] ** power}


def _fitted(part: _Part, form: Form, first: Numbers) -> Rough:
    """The best fit of a form, from STARTS points."""
    free = free_numbers(form, part.rate_is_known, part.from_start)
    if "initial" not in free:
        first = first._replace(initial=0 * first.initial)
    # A derivative by momentum is 0 where there is none to look ahead with.
    first = first._replace(momentum=np.maximum(first.momentum, 0.01))
    slots = part.slots(form)

    def slopes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The differences of each problem, (P, M), and derivatives, (P, F, M)."""
        problems, width = x.shape
        moved = (x[:, None] + 1j * H * np.eye(width)).reshape(-1, width).T
        numbers = Numbers(*(np.repeat(value, width, axis=0) for value in first))
        for name, row in zip(free, moved, strict=True):
            numbers = numbers._replace(**{name: VARIABLES[name][0](row)[:, None]})
        steps, _ = predict(form, part.run, numbers, slots)
        steps = (steps * part.weight[:, None]).transpose(1, 0, 2)
        steps = steps.reshape(problems, width, -1)
        return steps.real[:, 0] - part.moved.ravel(), steps.imag / H

    x = np.stack([VARIABLES[n][1](getattr(first, n)[:, 0]) for n in free], axis=-1)
    low, high = np.array([VARIABLES[name][2:] for name in free]).T
    # From where no coordinate shows eps any more, there is no way back.
    eps = free.index("eps")
    low[eps] = np.min(x[:, eps]) - 5
    x, cost = descend(slopes, x, low, high, ITERATIONS)
    k = int(np.argmin(cost))
    numbers = {name: float(getattr(first, name)[k, 0]) for name in Numbers._fields}
    for name, value in zip(free, x[k], strict=True):
        numbers[name] = float(VARIABLES[name][0](value))
    return Rough(form, numbers, tuple(free), float(cost[k]))


def free_numbers(form: Form, rate_is_known: bool, from_start: bool) -> list[str]:
    fixed = {"rate"} if rate_is_known else set()
    if form.bias_correction or not from_start:
        fixed.add("initial")
    return [name for name in Numbers._fields if name not in fixed]


def usual_slots(run: Run, form: Form) -> Slots:
    """Averages of the recorded gradients, in place of those before the first step."""
    mean = np.mean(run.grads, axis=0) * (-1 if form.maximize else 1)
    square = np.var(run.grads, axis=0) + (0 if form.centered else mean**2)
    return Slots(square[None], mean[None], np.zeros_like(mean)[None])
