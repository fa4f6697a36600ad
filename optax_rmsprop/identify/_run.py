"""A recorded run as matrices: the parameters before and after each step, the gradients.

A few hundred coordinates tell as much as millions. They are chosen so that the sizes of
their gradients are spread widely, because eps shows where gradients are small and decay
where they vary, and so that their steps are large in units of the last place.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_rmsprop._errors import at, shown, some

LEAST_STEPS = 10
MOST_STEPS = 400
MOST_NUMBERS = 10_000
MOST_OF_A_LEAF = 4096
# The step that float arithmetic gives differs from the exact one by this many times
# the spacing of floats at 1.
ROUNDINGS_OF_A_STEP = 4


@dataclasses.dataclass(frozen=True)
class Run:
    """T steps at N coordinates, in float64."""

    params: np.ndarray  # (T, N), before each step
    moved: np.ndarray  # (T, N), what the step added to them
    grads: np.ndarray  # (T, N)
    norms: np.ndarray  # (T,), of all gradients of a step
    rates: np.ndarray  # (T,), ones if the learning rate is not known
    spacing: np.ndarray  # (N,), of the floats at 1 in the dtype of the parameters
    skipped: np.ndarray  # (T,), where the optimizer did nothing
    leaves: list[str]  # N paths

    @property
    def constant_rate(self) -> bool:
        return bool(np.ptp(self.rates) == 0)

    def last_place(self) -> np.ndarray:
        """The rounding error of a recorded step, whose two ends are rounded."""
        _, exponent = np.frexp(
            np.maximum(abs(self.params), abs(self.params + self.moved))
        )
        return self.spacing * 2.0 ** (np.maximum(exponent, -120) - 1) / np.sqrt(6)

    def at(self, coordinates: Any, steps: int | None = None) -> "Run":
        """Return the run at some coordinates, and its first steps."""
        return dataclasses.replace(
            self,
            params=self.params[:steps, coordinates],
            moved=self.moved[:steps, coordinates],
            grads=self.grads[:steps, coordinates],
            norms=self.norms[:steps],
            rates=self.rates[:steps],
            spacing=self.spacing[coordinates],
            skipped=self.skipped[:steps],
            leaves=[self.leaves[i] for i in np.arange(len(self.leaves))[coordinates]],
        )


def whole_run(params: Any, grads: Any, learning_rate: Any) -> Run:
    """Check a recording, and return it, of large leaves a part."""
    columns = columns_of(params, grads)
    steps = len(columns[0][2])
    if steps < LEAST_STEPS:
        raise ValueError(
            f"`grads` must have at least {LEAST_STEPS} steps on the first axis of each "
            f"array, got {steps}; record more, 30 to 60 tell most settings"
        )
    rates = rates_of(learning_rate, steps)
    leaves = [name for name, p, _, _ in columns for _ in range(p.shape[1])]
    path = np.concatenate([p for _, p, _, _ in columns], axis=1)
    run = Run(
        params=path[:-1],
        moved=np.diff(path, axis=0),
        grads=np.concatenate([g for _, _, g, _ in columns], axis=1),
        norms=np.sqrt(sum(map(_squares, jax.tree.leaves(grads)))),
        rates=rates,
        spacing=np.concatenate([np.full(p.shape[1], s) for _, p, _, s in columns]),
        skipped=np.zeros(steps, bool),
        leaves=leaves,
    )
    if not np.all(np.isfinite(path)):
        step, i = np.argwhere(~np.isfinite(path))[0]
        raise ValueError(
            f"`params` must be finite, got {path[step, i]} in {leaves[i]} at {step} "
            "of the first axis; give the part of the recording before it"
        )
    return _without_skipped(run)


def columns_of(params: Any, grads: Any) -> list[tuple[str, Any, Any, float]]:
    """The leaves as matrices (T + 1, n) and (T, n) of real numbers, with spacings."""
    flat_params, structure = jax.tree_util.tree_flatten_with_path(params)
    flat_grads, of_grads = jax.tree_util.tree_flatten_with_path(grads)
    if str(structure) != str(of_grads):
        theirs = {path for path, _ in flat_grads}
        ours = {path for path, _ in flat_params}
        paths = some(map(at, sorted(theirs ^ ours, key=str))) or str(of_grads)
        raise ValueError(
            "`params` and `grads` must be trees of one structure, got trees that "
            f"differ in {paths}; stack the steps of each array "
            "on its first axis, and record the gradient of each parameter"
        )
    if not sum(np.size(p) for _, p in flat_params):
        raise ValueError(
            "`params` must have numbers, got an empty tree or empty arrays"
        )
    columns: list[tuple[str, Any, Any, float]] = []
    for (path, p), (_, g) in zip(flat_params, flat_grads, strict=True):
        p, g = np.asarray(p), np.asarray(g)
        leaf = at(path) if path else "the array"
        for name, x in (("params", p), ("grads", g)):
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                raise TypeError(
                    f"`{name}` must be arrays of floats, got {x.dtype} in {leaf}; "
                    "leave out what the optimizer does not train"
                )
        if not (p.ndim and g.ndim and p.shape == (len(g) + 1, *g.shape[1:])):
            raise ValueError(
                "`params` must have T + 1 and `grads` T arrays of one shape on the "
                f"first axis, got shapes {p.shape} and {g.shape} in {leaf}; "
                "record the parameters before each step and after the last"
            )
        if columns and len(g) != len(columns[0][2]):
            raise ValueError(
                f"`grads` must have the same number of steps in each array, got "
                f"{len(g)} in {leaf} and {len(columns[0][2])} in {columns[0][0]}"
            )
        spacing = float(jnp.finfo(p.dtype).eps)
        columns.append((leaf, real(p), real(g), spacing))
    return columns


def _squares(array: Any) -> np.ndarray:
    """The sum of squares of each step, (T,)."""
    rows = np.asarray(array).reshape(len(array), -1)
    return np.array([np.sum(np.abs(row).astype(np.float64) ** 2) for row in rows])


def real(array: np.ndarray) -> np.ndarray:
    """Some coordinates of an array as a matrix in float64, the same for each shape.

    Complex numbers are two real ones each.
    """
    rows = array.reshape(len(array), -1)
    rows = rows[:, indices(rows.shape[1], MOST_OF_A_LEAF)]
    if np.iscomplexobj(rows):
        rows = np.stack([rows.real, rows.imag], -1).reshape(len(rows), -1)
    return rows.astype(np.float64)


@functools.cache
def indices(size: int, most: int) -> np.ndarray:
    """The coordinates of an array of this size that are looked at."""
    if size <= most:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).choice(size, most, replace=False))


def rates_of(learning_rate: Any, steps: int) -> np.ndarray:
    if learning_rate is None:
        return np.ones(steps)
    if callable(learning_rate):
        learning_rate = [learning_rate(step) for step in range(steps)]
    try:
        rates = np.asarray(learning_rate, np.float64)
    except (TypeError, ValueError):
        rates = np.empty(0)
    if np.iscomplexobj(learning_rate) or rates.shape not in ((), (steps,)):
        raise ValueError(
            f"`learning_rate` must be a number, {steps} numbers (one a step), a "
            f"schedule or None, got {shown(learning_rate)}"
        )
    if not (np.all(np.isfinite(rates)) and np.all(rates >= 0) and np.any(rates)):
        raise ValueError(
            "`learning_rate` must be finite, at least 0, and not always 0, got "
            f"{shown(learning_rate)}; with None it is fitted"
        )
    return np.full(steps, rates) if rates.shape == () else rates


def _without_skipped(run: Run) -> Run:
    """Mark the steps at which nothing moved although it had to.

    Loss scaling skips steps whose gradients are not finite, which may then be anything.
    Elsewhere a step counts as skipped only if it is visible that steps are taken: in 16
    bits, parameters may stand still because steps are below half the last place.
    """
    moved, grads = run.moved, run.grads
    still = ~np.any(moved, axis=1) & (run.rates > 0)
    finite = np.all(np.isfinite(grads), axis=1)
    if not np.all(finite | still):
        step = int(np.argmin(finite | still))
        leaf = run.leaves[int(np.argmin(np.isfinite(grads[step])))]
        raise ValueError(
            "`grads` must be finite where the parameters moved, got NaN or infinity in "
            f"{leaf} at step {step}; give the part of the recording before it"
        )
    if not np.any(grads[finite]):
        raise ValueError(
            "`grads` must not all be 0; record them after backward() and before "
            "zero_grad()"
        )
    if np.all(still):
        raise ValueError(
            "`params` must move, but all arrays are equal along their first axis; "
            "record copies (torch: p.detach().clone()), not references"
        )
    visible = np.max(np.median(np.abs(moved[~still]) / run.last_place()[~still], 0)) > 8
    skipped = still & (~finite | (visible & np.any(grads, axis=1)))
    return dataclasses.replace(
        run, skipped=skipped, grads=np.where(skipped[:, None], 0.0, grads)
    )


def chosen(run: Run) -> Run:
    """Keep coordinates of all sizes of gradients, in each size the best visible one.

    Of a long run, the first steps.
    """
    run = run.at(slice(None), MOST_STEPS)
    sizes = np.sqrt(np.mean(run.grads**2, axis=0))
    visible = np.sqrt(np.mean((run.moved / run.last_place()) ** 2, axis=0))
    usable = np.flatnonzero((sizes > 0) & (visible > 0))
    if not len(usable):
        raise ValueError(
            "`params` must move where `grads` are not 0, but none does; record the "
            "gradients of these parameters, at the same steps"
        )
    ordered = usable[np.argsort(sizes[usable], kind="stable")]
    bins = min(len(ordered), max(16, MOST_NUMBERS // len(run.grads)))
    best = [part[np.argmax(visible[part])] for part in np.array_split(ordered, bins)]
    return run.at(np.array(best))
