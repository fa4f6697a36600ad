"""The calls, of ours and of every dialect, that give the numbers of a fit.

No table says which dialect does what. Each gets the fitted numbers under its own names
of arguments, and is run on the recording: a call is listed if its steps are the fitted
ones within rounding.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop import dialects
from optax_rmsprop.identify._fit import Fit
from optax_rmsprop.optimizer import rmsprop

# Names of arguments, of ours and in the dialects. tf.keras' `decay` is another thing
# than its `rho`: the first name that a function has counts.
WORDS = {
    "rate": ("learning_rate", "lr", "eta", "step_size"),
    "decay": ("rho", "alpha", "gamma", "decay"),
    "eps": ("epsilon", "eps"),
    "momentum": ("momentum",),
    "nesterov": ("nesterov",),
    "centered": ("centred", "centered"),
    "weight_decay": ("weight_decay", "wc"),
    "decoupled": ("decoupled_weight_decay", "decoupled_decay"),
    "corrected": ("corrected_weight_decay",),
    "max_lr": ("max_lr",),
    "initial": ("initial_scale",),
    "eps_in_sqrt": ("eps_in_sqrt", "eps_inside_sqrt"),
    "lr_in_momentum": ("lr_in_momentum",),
    "bias_correction": ("bias_correction",),
    "maximize": ("maximize",),
}
# Of calls that are equally short, those of these dialects come first.
BEST_KNOWN = ("torch", "tensorflow", "keras", "optax", "timm")


# What a step of our float32 arithmetic may differ by, over the usual step.
FLOAT32 = 3e-5


class Call(NamedTuple):
    """A call as text, and what it returns."""

    text: str
    tx: optax.GradientTransformation


def calls(fit: Fit) -> list[Call]:
    """Every call that gives the steps of a fit, the shortest first.

    Our own `rmsprop` is asked only if no dialect gives them. Of an eps that does not
    show, a dialect's default is preferred.
    """
    names = sorted(dialects.__all__, key=lambda name: name not in BEST_KNOWN)
    names[: len(BEST_KNOWN)] = BEST_KNOWN
    asked = {f"dialects.{name}": getattr(dialects, name) for name in names}
    for functions in (asked, {"rmsprop": rmsprop}):
        found = []
        for name, function in functions.items():
            given = (_call(name, function, fit, eps) for eps in _values_of_eps(fit))
            found += [call for call in given if call and _gives(call.tx, fit)][:1]
        if found:
            return sorted(found, key=unlikely)
    return []


def unlikely(call: Any) -> int:
    """Many arguments are; calls of dialects that few people use come two later."""
    name = call.text.partition("(")[0].removeprefix("dialects.")
    return call.text.count("=") + 2 * (name not in BEST_KNOWN)


def _values_of_eps(fit: Fit) -> list[float | None]:
    """The fitted value; if it is invisible, first a dialect's default (None)."""
    if not fit.eps_up_to:
        return [fit.numbers["eps"]]
    return [None, 0.0, fit.eps_up_to, fit.eps_up_to**2]  # the last for under the root


def _call(
    name: str, function: Callable[..., Any], fit: Fit, eps: float | None
) -> Call | None:
    """The call with the fitted numbers, if the function takes them."""
    parameters = inspect.signature(function).parameters
    rate, rate_text = _rate(fit)
    arguments, texts = {}, [rate_text]
    for concept, value in _values(fit, eps).items():
        word = next((word for word in WORDS[concept] if word in parameters), None)
        if word is None:
            continue
        default, text = parameters[word].default, _text(value)
        if concept == "weight_decay" and fit.form.corrected and function is rmsprop:
            # The optimizer multiplies by the rate once more.
            most = float(np.max(fit.run.rates) * fit.numbers["rate"])
            text = f"lambda step: {text} * {rate_text}(step) / {_text(most)}"
            value = _times(value / most, rate)
        if callable(value) or value != (default or 0):
            arguments[word] = value
            texts.append(f"{word}={text}")
    arguments[next(word for word in WORDS["rate"] if word in parameters)] = rate
    try:
        return Call(f"{name}({', '.join(texts)})", function(**arguments))
    except (TypeError, ValueError):
        return None  # a dialect may refuse a number, such as an alpha of 0


def _rate(fit: Fit) -> tuple[float | optax.Schedule, str]:
    rates = fit.run.rates[~fit.run.skipped] * fit.numbers["rate"]
    if fit.run.constant_rate:
        return float(rates[0]), _text(rates[0])
    table, last = np.float32(rates), len(rates) - 1
    return lambda step: jnp.asarray(table)[jnp.minimum(step, last)], "learning_rate"


def _times(factor: float, rate: Any) -> optax.Schedule:
    return lambda step: factor * rate(step)


def _values(fit: Fit, eps: float | None) -> dict[str, Any]:
    """What the arguments of a call must say, by concept; eps None is not said."""
    form, numbers = fit.form, fit.numbers
    values: dict[str, Any] = {"decay": numbers["decay"]}
    if eps is not None:
        values["eps"] = eps
    values["momentum"] = numbers["momentum"]
    if numbers["momentum"]:
        values["nesterov"] = form.nesterov
        if not fit.run.constant_rate:
            values["lr_in_momentum"] = form.lr_in_momentum
    values["centered"] = form.centered
    values["weight_decay"] = numbers["l2"] + numbers["decoupled"]
    values["decoupled"] = numbers["decoupled"] > 0
    if form.corrected:
        values["corrected"] = True
        values["max_lr"] = float(np.max(fit.run.rates) * numbers["rate"])
    values["initial"] = numbers["initial"]
    if not fit.eps_up_to:
        values["eps_in_sqrt"] = form.eps_in_sqrt
    values |= {"bias_correction": form.bias_correction, "maximize": form.maximize}
    return values


def _text(value: float) -> str:
    if isinstance(value, bool):
        return repr(value)
    # A framework that keeps a setting in float32 has 0.0099999998 for 0.01.
    short = np.float32(value)
    return str(short) if float(short) == value else f"{value:.8g}"


def _gives(tx: optax.GradientTransformation, fit: Fit) -> bool:
    """Whether a transformation makes the steps of a fit, within rounding."""
    usual = np.sqrt(np.mean(fit.run.moved**2, axis=0))
    bound = np.maximum(fit.scale, FLOAT32 * usual)
    total = 0.0
    try:
        for t, step in _steps(tx, fit):
            total += np.sum(((step - fit.steps[t]) / bound[t]) ** 2)
            if not total <= fit.steps.size:  # most that are wrong end here soon
                return False
    except KeyError:  # the state has not the slots of the fit
        return False
    return True


def _steps(
    tx: optax.GradientTransformation, fit: Fit
) -> Iterator[tuple[int, np.ndarray]]:
    """The steps of a transformation, from the state that was fitted, if any."""
    run = fit.run
    params = jnp.asarray(run.params, jnp.float32)
    state = tx.init(params[0])
    if fit.slots:
        square, mean, buffer = (jnp.asarray(x[0], jnp.float32) for x in fit.slots)
        slots = {"mu": mean, "var": square} if fit.form.centered else {"nu": square}
        if fit.numbers["momentum"]:
            slots["trace"] = buffer
        state = optax.tree_utils.tree_set(state, **slots)
    for t in np.flatnonzero(~run.skipped):
        grads = jnp.asarray(run.grads[t], jnp.float32)
        updates, state = tx.update(grads, state, params[t])
        yield int(t), np.asarray(updates, np.float64)
