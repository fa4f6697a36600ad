"""Every RMSprop as one recurrence of switches and numbers.

A step is predicted from the parameters that were recorded before it, whatever the step
before it made of them (teacher forcing). So what is left over is the error of that step
alone, and does not grow.

NumPy in float64 on a few hundred coordinates: nothing is compiled. A number may be
complex: derivatives are those of the complex step, f(x + ih) = f(x) + ih f'(x), which
has no cancellation (Squire and Trapp, Using complex variables to estimate derivatives
of real functions, 1998).
"""

from typing import NamedTuple

import numpy as np

from optax_rmsprop.identify._run import ROUNDINGS_OF_A_STEP, Run

# Under each root, so that its derivative is finite at 0.
TINY = 1e-300


class Form(NamedTuple):
    """What an RMSprop does one way or the other."""

    centered: bool = False
    eps_in_sqrt: bool = False
    bias_correction: bool = False
    maximize: bool = False
    adam: bool = False  # momentum averages gradients, before the division
    nesterov: bool = False
    lr_in_momentum: bool = False
    corrected: bool = False  # decoupled decay times lr / (greatest lr), as timm has it


class Numbers(NamedTuple):
    """The numbers of an RMSprop; here arrays of shape (K, 1) for K variants."""

    rate: np.ndarray  # times the given learning rates
    decay: np.ndarray
    eps: np.ndarray
    momentum: np.ndarray
    l2: np.ndarray
    decoupled: np.ndarray
    initial: np.ndarray


class Slots(NamedTuple):
    """The state before the first recorded step, of shape (K, N)."""

    square: np.ndarray  # the variance, if centered
    mean: np.ndarray
    buffer: np.ndarray


def predict(
    form: Form, run: Run, numbers: Numbers, slots: Slots | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of K variants, (T, K, N), and the sizes of their roundings.

    These are in units of the spacing of floats at 1. They are more than the size of the
    step where terms cancel: in a variance, in a buffer, in a gradient and weight decay.
    For complex numbers they are 0.
    """
    n = numbers
    taken = np.flatnonzero(~run.skipped)
    given = (*n, *(slots or ()))
    shape = np.broadcast_shapes(*map(np.shape, given), (1, run.params.shape[1]))
    steps = np.zeros((len(run.grads), *shape), np.result_type(*given))
    sizes = np.zeros((len(run.grads), *shape))
    is_real = sizes.dtype == steps.dtype
    params, grads = run.params[taken, None], run.grads[taken, None]
    square, mean, buffer = slots or (n.initial, 0.0, 0.0)

    decay = n.l2 * params
    g = (-grads if form.maximize else grads) + decay
    count = np.arange(1, len(taken) + 1)[:, None, None]
    weight = (1 - n.decay) / (1 - n.decay**count if form.bias_correction else 1.0)
    weight = np.broadcast_to(weight, (len(taken), *weight.shape[-2:]))
    kept, cancelled = 1 - weight, 1.0
    if form.centered:
        means = _recur(mean, kept, weight * g)
        # The decay of the first corrected step is 0, and so is g - mean.
        divisor = np.where(form.bias_correction & (count == 1), 1.0, kept)
        squares = _recur(square, kept, weight / divisor * (g - means) ** 2)
        if is_real:  # torch subtracts mean² from the average of squares
            cancelled = 1 + means**2 / (squares + n.eps**2 + TINY)
    else:
        squares = _recur(square, kept, weight * (g * g))
    if form.eps_in_sqrt:
        root = _sqrt(squares + (n.eps + TINY))
    else:
        root = _sqrt(squares + TINY) + n.eps

    rate = run.rates[taken, None, None] * n.rate
    inside, outside = (rate, 1.0) if form.lr_in_momentum else (1.0, rate)
    shrink = rate * n.decoupled
    if form.corrected:
        shrink = shrink * rate / (np.max(run.rates) * n.rate)
    momentum = np.broadcast_to(n.momentum, (len(taken), *n.momentum.shape))
    if form.adam:
        step = _recur(buffer, momentum, (1 - n.momentum) * g) / root
        if form.bias_correction:
            step = step / (1 - n.momentum**count)
        unit = step
    else:
        unit = inside * g / root
        step = _recur(buffer, momentum, unit)
        if form.nesterov:
            step = n.momentum * step + unit
    steps[taken] = -(outside * step + shrink * params)
    if is_real:
        summed = (np.abs(grads) + np.abs(decay)) / (np.abs(g) + TINY)
        size = _recur(0.0, momentum, np.abs(unit) * cancelled * summed)
        sizes[taken] = outside * size + np.abs(shrink * params)
    return steps, sizes


def _recur(
    first: np.ndarray | float, kept: np.ndarray, added: np.ndarray
) -> np.ndarray:
    """x <- kept * x + added from a first x, after each of the steps on the first axis.

    The only loop over steps: all else is computed for all of them at once.
    """
    kind = np.result_type(first, kept, added)
    shape = np.broadcast_shapes(np.shape(first), kept.shape[1:], added.shape[1:])
    results = np.empty((len(added), *shape), kind)
    for one, other, result in zip(kept, added, results, strict=True):
        np.multiply(one, first, out=result)
        result += other
        first = result
    return results


def _sqrt(x: np.ndarray) -> np.ndarray:
    """The root, where the imaginary part is a derivative; faster than NumPy's."""
    if not np.iscomplexobj(x):
        return np.sqrt(x)
    root = np.empty_like(x)
    root.real = np.sqrt(x.real)
    root.imag = x.imag / (2 * root.real)
    return root


def rounding(sizes: np.ndarray, run: Run) -> np.ndarray:
    """The error that rounding makes in a recorded step of such a size, (T, N).

    A wrong form may have terms that cancel nearly completely, which would excuse any
    difference. So the part of the arithmetic is at most 1/1000 of the usual step, or
    what a step has in a dtype of 16 bits.
    """
    usual = np.sqrt(np.mean(run.moved**2, axis=0))
    each = ROUNDINGS_OF_A_STEP * run.spacing
    arithmetic = np.minimum(each * sizes, np.maximum(1e-3, each) * usual)
    return np.sqrt(run.last_place() ** 2 + arithmetic**2)
