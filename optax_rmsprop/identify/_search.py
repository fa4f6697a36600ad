"""Find the forms of RMSprop that explain a run, and the shortest settings of each.

Every form is fitted roughly (`_rough.py`), and the best of them to the whole run. Then
numbers that the run does not need become 0 (or the initial average 1), and the others
the shortest decimals that are as good: so settings come out as somebody typed them.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from optax_rmsprop.identify._fit import VARIABLES, Fit, fit
from optax_rmsprop.identify._model import Form, Numbers
from optax_rmsprop.identify._rough import (
    Progress,
    Rough,
    converted,
    free_numbers,
    roughly,
    usual_slots,
)
from optax_rmsprop.identify._run import Run

# A fit explains a run if its error is below this many roundings.
WITHIN_ROUNDING = 3.0
FINE_FITS = 6
# The neighbours of the best form are tried again while they divide the error by two.
ROUNDS = 3
GAINED = 0.5
# If fewer steps than this share follow the gradient, or its opposite, weight decay or
# momentum may hide whether the run ascends.
UNCLEAR = 0.1
# With fitted slots the least squares have up to three columns a coordinate.
COORDINATES_WITH_SLOTS = 32
# Frameworks round the settings too. The variable of a setting may be off by this.
LEAST_REACH = 1e-6


def forms(run: Run, from_start: bool) -> Iterator[Form]:
    """Every form that the run may show.

    The order of learning rate and momentum, and the correction of weight decay, do not
    show while the rate is constant. Bias is corrected by the number of the step, which
    only a run from its start tells.
    """
    both = (False, True)
    varies = both if not run.constant_rate else (False,)
    corrects = both if from_start else (False,)
    # The first step that moves has no momentum, if the run is recorded from its start.
    # But it may make the parameters so large that weight decay decides all later signs.
    follows = np.sign(run.moved) * np.sign(run.grads)
    first = follows[np.argmax(np.any(run.moved, axis=1))]
    shares = float(np.mean(first)), float(np.mean(follows))
    unclear = min(map(abs, shares)) < UNCLEAR
    ascends = both if unclear else sorted({share > 0 for share in shares})
    for switches in itertools.product(
        both, both, corrects, ascends, (False,), both, varies, varies
    ):
        yield Form(*switches)


def plain(form: Form, numbers: dict[str, float], zero: float = 0.0) -> Form:
    """Switch off what changes nothing, because its number is 0."""
    if numbers["momentum"] <= zero:
        form = form._replace(lr_in_momentum=False, nesterov=False)
    if numbers["decoupled"] <= zero:
        form = form._replace(corrected=False)
    if numbers["eps"] == 0:
        form = form._replace(eps_in_sqrt=False)
    return form


def gradient_descent(run: Run) -> Fit | None:
    """Gradient descent with momentum, if it explains the run.

    It is the limit of RMSprop for a large eps, which then explains the run too.
    """
    eps = 1e20 * np.max(np.abs(run.grads))
    rate = np.sum(np.abs(run.moved)) / np.sum(np.abs(run.grads)) / np.mean(run.rates)
    first = dict.fromkeys(Numbers._fields, 0.0) | {"decay": 0.5, "eps": eps}
    for ascends, momentum in itertools.product((False, True), (0.0, 0.5, 0.9)):
        numbers = first | {"momentum": momentum, "rate": rate * eps * (1 - momentum)}
        free = "rate", "momentum", "l2", "decoupled"
        found = fit(run, Form(maximize=ascends), numbers, free)
        if found.error <= WITHIN_ROUNDING:
            return found
    return None


def search(
    run: Run,
    rate_is_known: bool,
    from_start: bool = True,
    progress: Progress = iter,
) -> list[Fit]:
    """The forms that fit best; the best first."""
    rough: dict[Form, Rough] = {}
    among = list(forms(run, from_start))
    for found in roughly(run, among, rate_is_known, from_start, progress):
        rough.setdefault(plain(found.form, found.numbers, 1e-3), found)
    fine = [refined(run, r, from_start) for r in list(rough.values())[:FINE_FITS]]
    fine.sort(key=lambda found: found.error)
    for _ in range(ROUNDS):
        # The right form may have been started too far away.
        before = fine[0].error
        if before > WITHIN_ROUNDING:
            near = _neighbours(fine[0], among)
            fine += [refined(run, other, from_start) for other in near]
            fine.sort(key=lambda found: found.error)
        if fine[0].error > GAINED * before:
            break
    return fine


def _neighbours(best: Fit, among: list[Form]) -> Iterator[Rough]:
    """The forms that differ in one switch, with the numbers of the best."""
    for form in among:
        if sum(a != b for a, b in zip(form, best.form, strict=True)) == 1:
            numbers = converted(best.form, best.numbers, form)
            free = tuple(free_numbers(form, "rate" not in best.free, not best.slots))
            yield Rough(form, numbers, free, best.error)


def refined(run: Run, rough: Rough, from_start: bool) -> Fit:
    """Fit a form to the whole run."""
    slots = None
    if not from_start:
        width = run.params.shape[1]
        part = np.linspace(0, width - 1, min(width, COORDINATES_WITH_SLOTS)).astype(int)
        run = run.at(np.unique(part))
        slots = usual_slots(run, rough.form)
    return fit(run, rough.form, rough.numbers, rough.free, slots)


def simplified(best: Fit) -> Fit:
    """Set to 0 what the run does not need, and shorten what is left."""
    found = best
    for name, value in [
        ("decoupled", 0.0),
        ("l2", 0.0),
        ("momentum", 0.0),
        ("initial", 0.0),
        ("initial", 1.0),
        ("eps", 0.0),
    ]:
        if name in found.free:
            found = _fixed(found, name, value, best) or found
    for name in sorted(found.free, key=lambda name: found.spread[name]):
        found = _shortest(found, name, best)
    if found.numbers["eps"] == 0:
        found = dataclasses.replace(found, eps_up_to=_greatest_eps(found, best))
    return dataclasses.replace(found, form=plain(found.form, found.numbers))


def _fixed(found: Fit, name: str, value: float, best: Fit) -> Fit | None:
    """The fit with a number fixed, unless it is worse."""
    free = [other for other in found.free if other != name]
    first = found.numbers | {name: value}
    other = fit(found.run, found.form, first, free, found.slots)
    return other if other.as_good_as(best) else None


def _shortest(found: Fit, name: str, best: Fit) -> Fit:
    """Fix a number to the decimal of fewest digits that is as good."""
    forward, back, *_ = VARIABLES[name]
    middle = back(found.numbers[name])
    reach = 4 * max(found.error, 1.0) * found.spread[name] + LEAST_REACH
    low, high = forward(middle - reach), forward(middle + reach)
    for digits in range(1, 9):
        decimal = float(f"{found.numbers[name]:.{digits - 1}e}")
        if low <= decimal <= high:
            shorter = _fixed(found, name, decimal, best)
            if shorter:
                return shorter
    return found


def _greatest_eps(found: Fit, best: Fit) -> float:
    """The greatest power of ten that is as good an eps as 0."""
    for exponent in range(4, -38, -1):
        numbers = found.numbers | {"eps": 10.0**exponent}
        if fit(found.run, found.form, numbers, (), found.slots).as_good_as(best):
            return 10.0**exponent
    return 0.0
