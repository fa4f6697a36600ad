"""What a run may be that no RMSprop explains.

Each trial changes the gradients or the form, and fits again, with a learning rate of
its own. It is told only if it explains the run within rounding.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import scipy.optimize

from optax_rmsprop.identify._fit import Fit, fit
from optax_rmsprop.identify._model import Form
from optax_rmsprop.identify._rough import roughly
from optax_rmsprop.identify._run import Run
from optax_rmsprop.identify._search import (
    WITHIN_ROUNDING,
    forms,
    gradient_descent,
    refined,
)

# Lion's weight decay makes its steps differ by a percent or two.
EQUALLY_FAR = 0.02


def hint(run: Run, fits: list[Fit]) -> str:
    """The first trial that explains the run, as a sentence; "" if there is none."""
    sizes = np.abs(run.moved)
    spread = np.ptp(sizes, axis=1) / np.maximum(np.max(sizes, axis=1), 1e-300)
    if np.mean(spread < EQUALLY_FAR) > 0.9 and run.params.shape[1] > 2:
        return "every coordinate moves equally far: this looks like Lion or signSGD"
    for found, text in _trials(run, fits):
        if text and found.error <= WITHIN_ROUNDING:
            return text
    agree = np.mean(np.sign(run.moved) * np.sign(run.grads))
    if abs(agree) < 3 / np.sqrt(run.grads.size):
        return (
            "the steps have nothing to do with the gradients of the same steps: these "
            "may be of other batches, or of another order of the parameters"
        )
    return ""


def _trials(run: Run, fits: list[Fit]) -> Iterator[tuple[Fit, str]]:
    """Fits to changes of the run, each with what it means if it is good."""
    descent = gradient_descent(run)
    if descent:
        yield (
            descent,
            "the steps are proportional to the gradients: this is gradient descent, "
            f"momentum {round(descent.numbers['momentum'], 4):g}, or eps is far above "
            "them",
        )
    found = _best(run, forms(run, True))
    yield found, _scaled(found, "rate" not in fits[0].free)
    adam = Form(adam=True, maximize=fits[0].form.maximize)
    found = _best(run, [adam, adam._replace(bias_correction=True)])
    yield (
        found,
        "this looks like Adam: its step divides an average of gradients, b1 "
        f"{found.numbers['momentum']:.4g}, b2 {found.numbers['decay']:.4g}",
    )
    inner = slice(1, -1)
    for by, which in ((1, "before"), (-1, "after")):
        shifted = dataclasses.replace(
            run,
            params=run.params[inner],
            moved=run.moved[inner],
            grads=np.roll(run.grads, by, axis=0)[inner],
            norms=run.norms[inner],
            rates=run.rates[inner],
            skipped=run.skipped[inner],
        )
        yield (
            _best(shifted, forms(run, False), from_start=False),
            f"each step is made of the gradients recorded one step {which} it",
        )

    def by_norm(limit: float) -> np.ndarray:
        return run.grads * np.minimum(1, limit / np.maximum(run.norms, 1e-300))[:, None]

    def by_value(limit: float) -> np.ndarray:
        return np.clip(run.grads, -limit, limit)

    for clip, sizes, kind in (
        (by_norm, run.norms, "to a norm of"),
        (by_value, np.abs(run.grads), "to values of at most"),
    ):
        limit, found = _clipped(run, fits, clip, sizes)
        yield (
            found,
            f"the gradients were clipped {kind} {limit:.4g} before the optimizer; "
            "record them after clipping",
        )


def _scaled(found: Fit, rate_is_known: bool) -> str:
    rate = found.numbers["rate"]
    # An average that forgets nothing, as Adagrad's, makes the rate another number.
    if not rate_is_known or abs(rate - 1) < 1e-3 or found.numbers["decay"] > 1 - 1e-6:
        return ""
    return f"the learning rate is {rate:.6g} times the one that was given"


def _best(run: Run, among: Iterable[Form], from_start: bool = True) -> Fit:
    """The best fit with a rate of its own."""
    best = roughly(run, among, False, from_start)[0]
    return refined(run, best, from_start)


def _clipped(
    run: Run, fits: list[Fit], clip: Callable[[float], np.ndarray], sizes: np.ndarray
) -> tuple[float, Fit]:
    """The limit that explains the run best, and the fit with it."""

    def fitted(start: Fit, logarithm: float) -> Fit:
        clipped = dataclasses.replace(run, grads=clip(float(np.exp(logarithm))))
        free = tuple({"rate": None} | dict.fromkeys(start.free))
        return fit(clipped, start.form, start.numbers, free, iterations=8)

    # Of each kind of moments and place of eps, the best fit.
    starts: dict[tuple[bool, bool], Fit] = {}
    for found in fits:
        starts.setdefault((found.form.centered, found.form.eps_in_sqrt), found)
    grid = np.log(np.quantile(sizes[sizes > 0], np.linspace(0.02, 0.98, 7)))
    tried = [
        (fitted(start, x), k) for start in starts.values() for k, x in enumerate(grid)
    ]
    best, near = min(tried, key=lambda pair: pair[0].error)
    found = scipy.optimize.minimize_scalar(
        lambda x: fitted(best, x).error,
        bounds=(grid[max(near - 1, 0)], grid[min(near + 1, len(grid) - 1)]),
        method="bounded",
        options={"xatol": 1e-7, "maxiter": 25},
    )
    return float(np.exp(found.x)), fitted(best, found.x)
