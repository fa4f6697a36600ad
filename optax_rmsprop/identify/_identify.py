"""`identify` and `compare`, and what they print."""

import dataclasses
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple, overload

import numpy as np
import optax

from optax_rmsprop.identify._calls import Call, calls, unlikely
from optax_rmsprop.identify._fit import Fit
from optax_rmsprop.identify._hints import hint
from optax_rmsprop.identify._model import Form, Numbers, predict, rounding
from optax_rmsprop.identify._rough import Progress
from optax_rmsprop.identify._run import Run, chosen, whole_run
from optax_rmsprop.identify._search import (
    WITHIN_ROUNDING,
    gradient_descent,
    plain,
    search,
    simplified,
)

# Each switch of a form, off and on.
SWITCHES = {
    "centered": ("not centered", "centered"),
    "eps_in_sqrt": ("eps outside the root", "eps under the root"),
    "lr_in_momentum": (
        "the learning rate outside the momentum buffer",
        "the learning rate inside the momentum buffer",
    ),
    "nesterov": ("momentum without nesterov", "nesterov momentum"),
    "bias_correction": ("no bias correction", "bias correction"),
    "corrected": (
        "decoupled weight decay times the learning rate",
        "decoupled weight decay times its square",
    ),
    "maximize": ("descent", "ascent"),
}
NUMBERS = {
    "rate": "learning rate",
    "decay": "decay",
    "eps": "eps",
    "momentum": "momentum",
    "l2": "weight decay (L2)",
    "decoupled": "decoupled weight decay",
    "initial": "initial average of squares",
}
# A single difference of so many roundings, and of this part of the usual step, is not
# rounding. Of terms that cancel in an optimizer's arithmetic, not all are known.
PARTS = 10.0
PART_OF_A_STEP = 1e-3


@dataclasses.dataclass(frozen=True)
class Finding:
    """A call that makes the recorded numbers.

    Attributes:
      call: the call as text; `learning_rate` stands for the rates that were given.
      tx: what the call returns.
      error: the root mean square of its differences from the recorded steps, over that
        of the recorded steps.
      roundings: the same in units of the rounding error of each recorded step.
      numbers: its settings by name.
      eps_up_to: 0, or a power of ten: any eps up to it makes these numbers, and
        `numbers` has an eps of 0.
    """

    call: str
    tx: optax.GradientTransformation
    error: float
    roundings: float
    numbers: dict[str, float]
    eps_up_to: float


@dataclasses.dataclass(frozen=True)
class Findings(Sequence[Finding]):
    """The calls that make the recorded numbers, the shortest first; maybe none.

    Attributes:
      findings: the calls.
      nearest: the best fit that does not make the numbers, as text.
      nearest_error: its error, as in `Finding`.
      notes: sentences on what the recording does not tell, or why nothing makes it.
      residual: the differences of the best fit, in roundings, (T, N), for a figure.
      sizes: the root mean square of the gradient of each of the N coordinates.
      leaves: the path of the leaf of each coordinate.
    """

    findings: tuple[Finding, ...]
    nearest: str
    nearest_error: float
    notes: tuple[str, ...]
    residual: np.ndarray = dataclasses.field(repr=False)
    sizes: np.ndarray = dataclasses.field(repr=False)
    leaves: tuple[str, ...] = dataclasses.field(repr=False)

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Finding, ...]: ...
    def __getitem__(self, index: int | slice) -> Finding | tuple[Finding, ...]:
        return self.findings[index]

    def __len__(self) -> int:
        return len(self.findings)

    def __str__(self) -> str:
        lines = [" error    call"]
        for i, finding in enumerate(self):
            head = "the same numbers: " * (i > 0)
            error = "" if i else f"{finding.error:.1e}"
            lines.append(f" {error:7s}  {head}{finding.call}")
        if not self:
            lines.append("          none of these: no RMSprop makes these numbers")
        if self.nearest:
            lines.append(
                f" {self.nearest_error:.1e}  the nearest that is not it: {self.nearest}"
            )
        return "\n".join([*lines, *self.notes])

    def draw(self, file: str | PathLike[str]) -> None:
        """Draw the differences of the best fit from the recording, in roundings.

        By step, and by coordinate over the size of its gradients. Needs matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        by_step, by_coordinate = figure.subplots(1, 2, sharey=True)
        largest = np.max(np.abs(self.residual), axis=1)
        by_step.plot(largest, "^", markersize=4, label="largest")
        usual = np.sqrt(np.mean(self.residual**2, axis=1))
        by_step.plot(usual, "o", markersize=4, label="root mean square")
        by_step.set(xlabel="step", ylabel="difference, in roundings", yscale="log")
        by_step.legend()
        usual = np.maximum(np.sqrt(np.mean(self.residual**2, axis=0)), 1e-3)
        by_coordinate.plot(self.sizes, usual, "o", color="C1", markersize=4)
        by_coordinate.set(xlabel="size of a coordinate's gradients", xscale="log")
        least, most = np.min(usual), np.max(largest)
        by_step.set_ylim(min(0.1, least / 2), max(10.0, most * 2))
        for axes in (by_step, by_coordinate):
            axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        nearest = f"none of these; the nearest: {self.nearest}"
        figure.suptitle(self[0].call if self else nearest, fontsize=10, wrap=True)
        figure.savefig(file, dpi=150)


def identify(params: Any, grads: Any, learning_rate: Any = None) -> Findings:
    """Find the RMSprop, its settings and its name, that made recorded numbers.

    Each step is predicted from the recorded parameters before it, by one recurrence
    with a switch for everything in which implementations differ:

        g  <- ±g + weight_decay * p
        nu <- decay * nu + (1 - decay) * g²          centered: the variance of g
        u  <- g / (√nu + eps)                        or g / √(nu + eps)
        b  <- momentum * b + u                       or momentum * b + learning_rate * u
        p  <- p - learning_rate * b                  or p - b

    with bias correction, Nesterov momentum, decoupled weight decay and the average
    before the first step. Every combination is fitted by least squares. The fits that
    the recording cannot tell apart are all listed, and no other.

    Args:
      params: a tree of arrays with T + 1 parameters on the first axis: before the first
        step, and after each of T steps, T at least 10; 30 to 60 tell most settings. All
        parameters or some: a few hundred numbers suffice. In the dtype in which the
        optimizer has them, because the error is compared with its rounding. The
        fit uses up to 400 steps; the calls that are listed make all of them.
      grads: the same tree with T gradients, as the optimizer got them: after clipping
        and unscaling.
      learning_rate: the learning rate, T of them (one a step), a schedule, or None: a
        constant rate is fitted. A rate that changes shows more.

    Returns:
      `Findings`, a sequence of `Finding` whose text is a table. `found[0].tx` is a
      transformation that makes these numbers, `found[0].call` its call. Empty if no
      RMSprop makes them within rounding; then `notes` says where the best one differs
      first and what else it may be.

    Raises:
      TypeError: arrays that are not of floats.
      ValueError: shapes that disagree, too few steps, NaN, gradients that are all 0,
        parameters that do not move.
    """
    return identified(params, grads, learning_rate, iter)


def identified(
    params: Any,
    grads: Any,
    learning_rate: Any,
    progress: Progress,
) -> Findings:
    """`identify` with something around its loop."""
    whole = whole_run(params, grads, learning_rate)
    return findings_of(whole, explain(whole, learning_rate is not None, progress))


class Explanation(NamedTuple):
    """What the search has found.

    `explained` are the fits that explain the run equally well, with the shortest
    settings; those with the fewest come first.
    """

    fits: list[Fit]
    explained: list[Fit]
    from_start: bool


@np.errstate(all="ignore")  # far from the best fit anything may overflow
def explain(whole: Run, rate_is_known: bool, progress: Progress = iter) -> Explanation:
    """Fit all forms, from the first step or, if none explains the run, a later one."""
    run = chosen(whole)
    fits, from_start = search(run, rate_is_known, progress=progress), True
    if fits[0].error > WITHIN_ROUNDING and np.any(run.skipped):
        counted = search(_counted(run), rate_is_known, progress=progress)
        fits = min(fits, counted, key=lambda fits: fits[0].error)
    if fits[0].error > WITHIN_ROUNDING:
        later = search(run, rate_is_known, from_start=False, progress=progress)
        if later[0].error <= WITHIN_ROUNDING:
            fits, from_start = later, False
    if fits[0].error > WITHIN_ROUNDING or gradient_descent(fits[0].run):
        return Explanation(fits, [], from_start)
    distinct: dict[Any, Fit] = {}
    for fit in fits:
        if fit.error <= WITHIN_ROUNDING and fit.as_good_as(fits[0]):
            simple = simplified(fit)
            distinct.setdefault((simple.form, *simple.numbers.values()), simple)
    fewest = sorted(
        (fit for fit in distinct.values() if not _decays_twice(fit)),
        key=lambda fit: sum(x != 0 for x in fit.numbers.values()),
    )
    return Explanation(fits, fewest, from_start)


def _counted(run: Run) -> Run:
    """The run with a schedule that counts only the steps that were taken."""
    rates = run.rates.copy()
    rates[~run.skipped] = run.rates[: np.sum(~run.skipped)]
    return dataclasses.replace(run, rates=rates)


def parts(steps: np.ndarray, scale: np.ndarray, run: Run) -> np.ndarray:
    """Which steps differ from the recorded ones by more than rounding, (T, N)."""
    usual = np.sqrt(np.mean(run.moved**2, axis=0))
    return ~(
        abs(steps - run.moved) <= np.maximum(PARTS * scale, PART_OF_A_STEP * usual)
    )


def parted(whole: Run, fit: Fit) -> str:
    """Where a fit differs from the whole recording, or "" if it does not.

    Of a run that began before its recording, only the coordinates are known whose
    slots were fitted.
    """
    run, steps, scale = fit.run, fit.steps, fit.scale
    if fit.slots is None:
        run = whole
        if not np.array_equal(fit.run.rates, whole.rates[: len(fit.run.rates)]):
            run = _counted(run)
        numbers = Numbers(*(np.full((1, 1), x) for x in fit.numbers.values()))
        predicted, sizes = predict(fit.form, run, numbers)
        steps, scale = predicted[:, 0], rounding(sizes[:, 0], run)
    return _first_part(steps, scale, run)


def _first_part(steps: np.ndarray, scale: np.ndarray, run: Run) -> str:
    """The first step that differs by more than rounding, or ""."""
    for step, i in np.argwhere(parts(steps, scale, run))[:1]:
        size = abs(steps[step, i] - run.moved[step, i]) / scale[step, i]
        return (
            f"first at step {step} (the first is 0) in {run.leaves[i]}, by {size:.0f} "
            "roundings"
        )
    return ""


def _decays_twice(fit: Fit) -> bool:
    """Whether weights decay in both ways, which no RMSprop does."""
    return fit.numbers["l2"] > 0 and fit.numbers["decoupled"] > 0


def findings_of(whole: Run, explanation: Explanation) -> Findings:
    """The answer to a user: all calls, or why there is none."""
    fits, explained, from_start = explanation
    run, best = fits[0].run, fits[0]
    notes = []
    elsewhere = parted(whole, explained[0]) if explained else ""
    if elsewhere:
        notes.append(
            f"The nearest makes most of the numbers, but differs {elsewhere}. If this "
            "array has settings of its own, identify it by itself."
        )
    named: dict[str, tuple[Call, Fit]] = {}
    for found in explained if not elsewhere else []:
        for call in calls(found):
            named.setdefault(call.text, (call, found))
    findings = [
        Finding(*call, found.relative, found.error, found.numbers, found.eps_up_to)
        for call, found in sorted(named.values(), key=lambda item: unlikely(item[0]))
    ]
    if findings:
        simple = explained[0]
        others = (found for found in fits if not found.as_good_as(best))
        nearest = next(others, None)
        text = ""
        if nearest:
            form = plain(nearest.form, nearest.numbers, 1e-3)
            text = _difference(form, simple.form)
        if simple.eps_up_to:
            notes.append(f"Any eps up to {simple.eps_up_to:.0e} makes these numbers.")
        if run.constant_rate and simple.numbers["momentum"]:
            notes.append(
                "The learning rate is constant, so the numbers do not tell whether it "
                "is inside the momentum buffer."
            )
    else:
        nearest = explained[0] if explained else best
        text = next((call.text for call in calls(nearest)), _described(nearest))
        if not explained:
            notes += _reasons(whole, fits)
    if not from_start:
        notes.append("The run began before its first recorded step.")
    if np.any(run.skipped):
        skipped = int(np.sum(run.skipped))
        notes.append(f"{skipped} step{'s were' if skipped > 1 else ' was'} skipped.")
        if skipped > len(run.skipped) / 3 and not findings:
            notes.append(
                "If gradients are accumulated, record their average at the steps that "
                "are taken."
            )
    return Findings(
        tuple(findings),
        text,
        nearest.relative if nearest else 0.0,
        tuple(notes),
        best.residual,
        np.sqrt(np.mean(run.grads**2, axis=0)),
        tuple(run.leaves),
    )


def _reasons(whole: Run, fits: list[Fit]) -> list[str]:
    """Where the best fit differs, and what the run may be."""
    best, reasons = fits[0], []
    if where := _first_part(best.steps, best.scale, best.run):
        reasons.append(f"The nearest differs {where}.")
    if best.error <= WITHIN_ROUNDING and _decays_twice(best):
        reasons.append("It needs weight decay of both kinds, which no RMSprop has.")
    else:
        likely = hint(chosen(whole), fits)
        reasons += [likely[0].upper() + likely[1:] + "."] if likely else []
    return reasons


def _described(fit: Fit) -> str:
    """The switches that are on, and the numbers that are not 0."""
    switches = [SWITCHES[name][1] for name in SWITCHES if getattr(fit.form, name)]
    numbers = [f"{NUMBERS[n]} {x:.6g}" for n, x in fit.numbers.items() if x]
    return ", ".join([*switches, *numbers])


def _difference(form: Form, other: Form) -> str:
    texts = [
        SWITCHES[name][getattr(form, name)]
        for name in SWITCHES
        if getattr(form, name) != getattr(other, name)
    ]
    return ", ".join(texts) or "other settings"
