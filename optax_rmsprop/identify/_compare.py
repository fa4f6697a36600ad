"""Whether a transformation makes recorded numbers and, if not, what differs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop._errors import kind_of
from optax_rmsprop.identify._fit import fit
from optax_rmsprop.identify._identify import (
    NUMBERS,
    SWITCHES,
    Explanation,
    Findings,
    explain,
    findings_of,
    parts,
)
from optax_rmsprop.identify._model import rounding
from optax_rmsprop.identify._run import Run, real, whole_run
from optax_rmsprop.identify._search import WITHIN_ROUNDING


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a transformation differs from recorded numbers.

    Attributes:
      same: whether it makes them, within rounding.
      error: the root mean square of its differences from the recorded steps, over that
        of the recorded steps.
      roundings: the same in units of the rounding error of each step.
      by_step: the error of each of the T steps.
      step: the first step that differs by more than rounding, from 0, or None.
      leaf: the path of the leaf where it differs most in that step, or None.
      causes: what differs. If one switch or setting alone explains it, only that.
      found: what `identify` says of the recorded numbers, or None if they are the same.
    """

    same: bool
    error: float
    roundings: float
    by_step: np.ndarray = dataclasses.field(repr=False)
    step: int | None = None
    leaf: str | None = None
    causes: tuple[str, ...] = ()
    found: Findings | None = None

    def __str__(self) -> str:
        if self.same:
            return f"The same numbers: error {self.error:.1e}, within rounding."
        lines = [
            f"Other numbers: error {self.error:.1e}, first at step {self.step} (the "
            f"first is 0) in {self.leaf}.",
            "error by step: "
            + ", ".join(
                f"{self.by_step[step]:.1e} at {step}"
                for step in np.unique(
                    np.linspace(self.step or 0, len(self.by_step) - 1, 4).astype(int)
                )
            ),
        ]
        if self.causes:
            lines.append("What differs: " + "; ".join(self.causes) + ".")
        return "\n".join([*lines, str(self.found)])


def compare(
    tx: optax.GradientTransformation,
    params: Any,
    grads: Any,
    learning_rate: Any = None,
) -> Comparison:
    """Say whether a transformation makes recorded numbers and, if not, what differs.

    `tx.update` gets the recorded parameters and gradients of each step, so that a
    difference does not change the later ones but through the state. If the numbers
    differ, the steps of `tx` and the recorded ones are both identified (`identify`).

    Args:
      tx: an optax transformation whose update needs only gradients and parameters, with
        the learning rate of the recorded run.
      params, grads: as in `identify`, but all parameters that `tx` needs, such as for
        a mask or a global norm.
      learning_rate: as in `identify`; only to identify them.

    Returns:
      A `Comparison`; its text says the same in a few lines.

    Raises:
      TypeError, ValueError: as `identify`; a `tx` that is no transformation.
    """
    if not callable(getattr(tx, "init", None)) or not hasattr(tx, "update"):
        raise TypeError(
            f"`tx` must be an optax.GradientTransformation, got {kind_of(tx)}; "
            "such as optax_rmsprop.rmsprop(1e-3)"
        )
    whole = whole_run(params, grads, learning_rate)
    if jnp.result_type(float) == jnp.float32:  # then `tx` computes in float32
        spacing = np.maximum(whole.spacing, float(np.finfo(np.float32).eps))
        whole = dataclasses.replace(whole, spacing=spacing)
    scale = rounding(np.abs(whole.moved), whole)
    # Steps without a move may have been skipped, or accumulated by `tx`.
    steps = min(
        (_steps(tx, params, grads, whole, skips) for skips in (False, True)),
        key=lambda steps: np.sum(parts(steps, scale, whole)),
    )
    difference = (steps - whole.moved) / scale
    roundings = float(np.sqrt(np.mean(difference**2)))
    per_step = np.sqrt(np.mean((steps - whole.moved) ** 2, axis=1))
    usual = np.sqrt(np.mean(whole.moved**2))
    parted = np.argwhere(parts(steps, scale, whole))
    result = Comparison(
        roundings <= WITHIN_ROUNDING and not len(parted),
        float(np.sqrt(np.mean(per_step**2)) / usual),
        roundings,
        per_step / usual,
    )
    if result.same:
        return result
    step = int(parted[0][0]) if len(parted) else 0
    leaf = whole.leaves[int(np.argmax(np.abs(difference[step])))]
    theirs = explain(whole, learning_rate is not None)
    causes: tuple[str, ...] = ("its steps are not finite",)
    if np.all(np.isfinite(steps)):
        made = dataclasses.replace(whole, moved=steps)
        causes = _causes(theirs, explain(made, learning_rate is not None))
    found = findings_of(whole, theirs)
    return dataclasses.replace(result, step=step, leaf=leaf, causes=causes, found=found)


def _steps(
    tx: optax.GradientTransformation, params: Any, grads: Any, whole: Run, skips: bool
) -> np.ndarray:
    """The updates of `tx` for the recorded parameters and gradients, (T, N)."""

    def step_of(tree: Any, t: int) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x[t]), tree)

    update = jax.jit(tx.update)
    state = tx.init(step_of(params, 0))
    steps = np.zeros_like(whole.moved)
    for t in range(len(steps)):
        if whole.skipped[t] and (skips or not np.isfinite(whole.norms[t])):
            continue
        updates, state = update(step_of(grads, t), state, step_of(params, t))
        leaves = (real(np.asarray(x)[None])[0] for x in jax.tree.leaves(updates))
        steps[t] = np.concatenate(list(leaves))
    return steps


def _causes(theirs: Explanation, made: Explanation) -> tuple[str, ...]:
    """What differs between the recorded steps and those of the transformation.

    If one of the differences, put into the form of the transformation, makes the
    recorded steps, it alone is the cause.
    """
    if not (theirs.explained and made.explained):
        return ()
    recorded, own = theirs.explained[0], made.explained[0]
    causes = {}
    for name, texts in SWITCHES.items():
        value, other = getattr(own.form, name), getattr(recorded.form, name)
        if value != other:
            text = f"{texts[value]}, but the recording has {texts[other]}"
            causes[text] = own.form._replace(**{name: other}), own.numbers
    for name, title in NUMBERS.items():
        value, other = own.numbers[name], recorded.numbers[name]
        if value != other:
            text = f"{title} {value:.6g}, but the recording has {other:.6g}"
            causes[text] = own.form, own.numbers | {name: other}
    for text, (form, numbers) in causes.items():
        alone = fit(recorded.run, form, numbers, (), recorded.slots)
        if alone.error <= WITHIN_ROUNDING:
            return (text,)
    return tuple(causes)
