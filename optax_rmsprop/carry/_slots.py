"""The slots of an RMSprop: their names in torch, in Keras and here, and their values.

    torch              Keras' suffix       here
    square_avg         velocity            nu; if centered, var = square_avg - grad_avg²
    grad_avg           average_gradient    mu, if centered
    momentum_buffer    momentum            trace, with momentum

Everywhere else in `carry` slots have torch's names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

SQUARE_AVG, GRAD_AVG, MOMENTUM_BUFFER = "square_avg", "grad_avg", "momentum_buffer"
SLOTS = (SQUARE_AVG, GRAD_AVG, MOMENTUM_BUFFER)
KERAS_SUFFIXES = {
    SQUARE_AVG: "velocity",
    GRAD_AVG: "average_gradient",
    MOMENTUM_BUFFER: "momentum",
}
_SAME = {"nu": SQUARE_AVG, "mu": GRAD_AVG, "trace": MOMENTUM_BUFFER}
FIELDS = {*_SAME, "var"}  # of our states
OF_SQUARES = {SQUARE_AVG, "nu", "var"}


def field_value(
    field: str, slots: Mapping[str, Callable[[], np.ndarray]]
) -> np.ndarray:
    """A field of our states, for one parameter, from torch's slots."""
    if field == "var":
        return _variance(slots[SQUARE_AVG](), slots[GRAD_AVG]())
    return slots[_SAME[field]]()


def _variance(square_avg: np.ndarray, grad_avg: np.ndarray) -> np.ndarray:
    """Our `var`; real and imaginary parts are separate numbers."""
    mu = grad_avg.astype(np.result_type(square_avg, np.float32))
    var = np.empty(square_avg.shape, mu.dtype)
    # torch's difference can round below 0, where its root is NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        var.real = np.maximum(square_avg.real - mu.real**2, 0)
        if np.iscomplexobj(square_avg):
            var.imag = np.maximum(square_avg.imag - mu.imag**2, 0)
    return var


def square_average(var: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """torch's `square_avg` from our fields, the inverse of `_variance`."""
    square_avg = np.empty(var.shape, np.result_type(var, mu))
    with np.errstate(over="ignore"):
        square_avg.real = var.real + mu.real**2
        if np.iscomplexobj(square_avg):
            square_avg.imag = var.imag + mu.imag**2
    return square_avg
