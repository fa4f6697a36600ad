"""Fit the numbers of one form of RMSprop to a run, by least squares."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from optax_rmsprop.identify._model import Form, Numbers, Slots, predict, rounding
from optax_rmsprop.identify._run import Run

# One fit is as good as another if the sum of its squared errors, in units of the mean
# square, exceeds the other's by less than this (a chance of 1e-7 for Gaussian errors).
AS_GOOD = 30.0
# Errors of rounding are not random: settings are rounded too. Below this many roundings
# no fit is better.
LEAST_ERROR = 1.0
# Iterations stop when none gains more than this part of the sum of squares.
CONVERGED = 1e-8

# Each number is fitted as a function of a variable. Here are the function, its inverse,
# and the bounds of the variable.
VARIABLES: dict[str, tuple[Callable, Callable, float, float]] = {
    "rate": (np.exp, np.log, -60.0, 60.0),
    "decay": (lambda x: 1 - np.exp(-x), lambda x: -np.log1p(-x), 1e-6, 16.0),
    "eps": (np.exp, lambda x: np.log(np.maximum(x, 1e-34)), -80.0, 60.0),
    "momentum": (lambda x: x, lambda x: x, 0.0, 0.99999),
    "l2": (lambda x: x, lambda x: x, 0.0, math.inf),
    "decoupled": (lambda x: x, lambda x: x, 0.0, math.inf),
    "initial": (lambda x: x, lambda x: x, 0.0, math.inf),
}
# The step of the complex derivative: its square vanishes beside anything.
H = 1e-30


@dataclasses.dataclass(frozen=True)
class Fit:
    """A form with the numbers that fit a run best."""

    run: Run
    form: Form
    numbers: dict[str, float]
    free: tuple[str, ...]  # the numbers that were fitted
    spread: dict[str, float]  # the standard deviation of the variable of each
    steps: np.ndarray  # (T, N)
    scale: np.ndarray  # (T, N), the rounding errors of the recorded steps
    slots: Slots | None = None  # before the first step, fitted
    eps_up_to: float = 0.0  # if not 0: every smaller eps is as good

    @property
    def residual(self) -> np.ndarray:
        """The differences from the recorded steps, in roundings."""
        return (self.steps - self.run.moved) / self.scale

    @functools.cached_property
    def error(self) -> float:
        """The root mean square of the residual; infinite if it is not finite."""
        with np.errstate(all="ignore"):
            error = float(np.sqrt(np.mean(self.residual**2)))
        return error if math.isfinite(error) else math.inf

    @property
    def relative(self) -> float:
        """The root mean square of the differences, over that of the steps."""
        difference, moved = self.steps - self.run.moved, self.run.moved
        return float(np.sqrt(np.mean(difference**2) / np.mean(moved**2)))

    def as_good_as(self, other: "Fit") -> bool:
        least = max(other.error, LEAST_ERROR) ** 2
        return self.steps.size * (self.error**2 - least) < AS_GOOD * least


@np.errstate(all="ignore")  # far from the best fit anything may overflow
def fit(
    run: Run,
    form: Form,
    first: dict[str, float],
    free: Sequence[str],
    slots: Slots | None = None,
    iterations: int = 30,
) -> Fit:
    """The least squares fit of the free numbers, and of the slots if they are given."""
    slot_names = []
    if slots:
        centered, momentum = form.centered, "momentum" in free or first["momentum"] > 0
        slot_names = ["square"] + ["mean"] * centered + ["buffer"] * momentum
    numbers, kinds = len(free), len(free) + len(slot_names)
    width, moved = run.params.shape[1], run.moved

    def variants(x: np.ndarray, move: np.ndarray) -> tuple[Numbers, Slots | None]:
        """The numbers and slots at x, each moved by its row of `move`, (kinds, K)."""
        given = {name: np.full((1, 1), value) for name, value in first.items()}
        for name, value, row in zip(free, x, move, strict=False):
            given[name] = VARIABLES[name][0](value + row)[:, None]
        rows = x[numbers:].reshape(-1, 1, width) + move[numbers:, :, None]
        fitted = dict(zip(slot_names, rows, strict=True))
        return Numbers(**given), slots and slots._replace(**fitted)

    def predicted(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps, sizes = predict(form, run, *variants(x, np.zeros((kinds, 1))))
        return steps[:, 0], sizes[:, 0]

    def slopes(xs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps, _ = predict(form, run, *variants(xs[0], 1j * H * np.eye(kinds)))
        steps = steps / scale[:, None]
        matrix = np.zeros((xs.shape[1], *moved.shape))
        matrix[:numbers] = steps.imag[:, :numbers].transpose(1, 0, 2) / H
        # A slot of a coordinate changes the steps of this coordinate only.
        each = np.arange(width)
        for k in range(numbers, kinds):
            own = matrix[numbers + (k - numbers) * width :][:width]
            own[each, :, each] = steps.imag[:, k].T / H
        values = steps.real[:, 0] - moved / scale
        return values.reshape(1, -1), matrix.reshape(1, len(matrix), -1)

    bounds = [VARIABLES[name][2:] for name in free]
    for name in slot_names:
        bounds += [(0.0 if name == "square" else -math.inf, math.inf)] * width
    low, high = np.array(bounds).reshape(-1, 2).T
    x = np.array([VARIABLES[name][1](first[name]) for name in free])
    x = np.concatenate([x, *(getattr(slots, n)[0] for n in slot_names)])
    scale, spread = rounding(np.abs(moved), run), np.zeros(numbers)
    for most in (iterations, iterations // 3):
        if len(x):
            x = descend(slopes, x[None], low, high, most)[0][0]
            spread = _spread(slopes(x[None])[1][0].T)[:numbers]
        # Terms that cancel make a rounding error larger than that of the step.
        scale = rounding(predicted(x)[1], run)
    fitted, fitted_slots = variants(x, np.zeros((kinds, 1)))
    return Fit(
        run,
        form,
        {name: float(value[0, 0]) for name, value in fitted._asdict().items()},
        tuple(free),
        dict(zip(free, spread, strict=True)),
        predicted(x)[0],
        scale,
        fitted_slots,
    )


def _spread(jacobian: np.ndarray) -> np.ndarray:
    """The standard deviation of each variable, infinite if the run does not show it."""
    size = np.linalg.norm(jacobian, axis=0)
    shown = size > 0
    spread = np.full(len(size), math.inf)
    triangle = np.linalg.qr(jacobian[:, shown] / size[shown], mode="r")
    inverse = np.linalg.pinv(triangle, rcond=1e-12)
    spread[shown] = np.linalg.norm(inverse, axis=1) / size[shown]
    return spread


def descend(
    slopes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    x: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    iterations: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of many small problems at once, by Levenberg and Marquardt.

    Returns the variables, (P, F), and the sums of squares, (P,). A variable that would
    leave its bounds is fixed for an iteration: settings that are 0 are found exactly.
    """
    x = np.clip(x, low, high)
    residual, slope = slopes(x)
    cost, damping = np.sum(residual**2, axis=1), np.full(len(x), 1e-2)
    cost = np.where(np.isfinite(cost), cost, math.inf)
    each = np.arange(x.shape[1])
    for _ in range(iterations):
        gradient = np.einsum("pfm,pm->pf", slope, residual)
        fixed = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
        matrix = slope @ slope.transpose(0, 2, 1)
        size = np.sqrt(matrix[:, each, each])
        size = np.where(fixed | (size == 0), math.inf, size)
        matrix = matrix / size[:, :, None] / size[:, None]
        matrix[:, each, each] = 1 + damping[:, None]
        change = np.linalg.solve(matrix, (gradient / size)[..., None])[..., 0] / size
        trial = np.clip(x - change, low, high)
        there, slope_there = slopes(trial)
        cost_there = np.sum(there**2, axis=1)
        better = cost_there < cost
        gain = cost - cost_there
        damping = np.where(better, np.maximum(damping / 5, 1e-10), damping * 5)
        x = np.where(better[:, None], trial, x)
        cost = np.where(better, cost_there, cost)
        residual = np.where(better[:, None], there, residual)
        slope = np.where(better[:, None, None], slope_there, slope)
        if np.all((damping > 1e8) | (better & (gain < CONVERGED * cost))):
            break
    return x, cost
