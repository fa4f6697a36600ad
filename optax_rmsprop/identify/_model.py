"""Every RMSprop as one recurrence of switches and numbers.

A step is predicted from the parameters that were recorded before it, whatever the step
before it made of them (teacher forcing). So what is left over is the error of that step
alone, and does not grow.

NumPy in float64 on a few hundred coordinates: nothing is compiled. A number may be
complex: derivatives are those of the complex step, f(x + ih) = f(x) + ih f'(x), which
has no cancellation (Squire and Trapp, Using complex variables to estimate derivatives
of real functions, 1998).
"""

from typing import Any, NamedTuple

import numpy as np

from optax_rmsprop.identify._run import ROUNDINGS_OF_A_STEP, Run

# Under each root, so that its derivative is finite at 0.
TINY = 1e-300


class Form(NamedTuple):
    """What an RMSprop does one way or the other.

    The last three may be arrays of shape (K, 1), for variants of several forms.
    """

    centered: bool = False
    eps_in_sqrt: bool = False
    bias_correction: bool = False
    maximize: bool = False
    adam: bool = False  # momentum averages gradients, before the division
    nesterov: Any = False
    lr_in_momentum: Any = False
    corrected: Any = False  # decoupled decay times lr / (greatest lr), as timm has it


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
    given = (*n, *(slots or ()))
    shape = np.broadcast_shapes(*map(np.shape, given), (1, run.params.shape[1]))
    kind = np.result_type(*given)
    square, mean, buffer = slots or (n.initial, np.zeros(shape), np.zeros(shape))
    square = square + np.zeros(shape, kind)
    sign = -1.0 if form.maximize else 1.0
    greatest_rate = np.max(run.rates) * n.rate
    steps = np.zeros((len(run.grads), *shape), kind)
    sizes = np.zeros((len(run.grads), *shape))
    size, cancelled = np.zeros(shape), 1.0
    is_real = sizes.dtype == steps.dtype
    count = 0
    for t in range(len(run.grads)):
        if run.skipped[t]:
            continue
        count += 1
        decay = n.l2 * run.params[t]
        g = sign * run.grads[t] + decay
        weight = 1 - n.decay
        if form.bias_correction:
            weight = weight / (1 - n.decay**count)
        if form.centered:
            mean = mean + weight * (g - mean)
            # The decay of the first corrected step is 0, and so is g - mean.
            kept = 1.0 if form.bias_correction and count == 1 else 1 - weight
            square = (1 - weight) * square + weight / kept * (g - mean) ** 2
            if is_real:  # torch subtracts mean² from the average of squares
                cancelled = 1 + mean**2 / (square + n.eps**2 + TINY)
        else:
            square = (1 - weight) * square + weight * g * g
        if form.eps_in_sqrt:
            root = _sqrt(square + n.eps + TINY)
        else:
            root = _sqrt(square + TINY) + n.eps
        rate = run.rates[t] * n.rate
        inside = np.where(form.lr_in_momentum, rate, 1.0)
        outside = np.where(form.lr_in_momentum, 1.0, rate)
        if form.adam:
            buffer = n.momentum * buffer + (1 - n.momentum) * g
            step = buffer / root
            if form.bias_correction:
                step = step / (1 - n.momentum**count)
            unit = step
        else:
            unit = inside * g / root
            buffer = n.momentum * buffer + unit
            step = np.where(form.nesterov, n.momentum * buffer + unit, buffer)
        shrink = rate * n.decoupled
        shrink = shrink * np.where(form.corrected, rate / greatest_rate, 1.0)
        steps[t] = -(outside * step + shrink * run.params[t])
        if is_real:
            summed = (np.abs(run.grads[t]) + np.abs(decay)) / (np.abs(g) + TINY)
            size = n.momentum * size + np.abs(unit) * cancelled * summed
            sizes[t] = outside * size + np.abs(shrink * run.params[t])
    return steps, sizes


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
