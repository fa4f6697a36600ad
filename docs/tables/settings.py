"""The arguments with which a dialect, or a block of a page, calls rmsprop."""

import contextlib
import inspect
import re
import sys
from pathlib import Path
from unittest import mock

import optax

import optax_rmsprop
from optax_rmsprop import dialects, rmsprop

DOCS = Path(__file__).resolve().parents[1]
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(rmsprop).parameters.items()
}
# The frameworks' names for the arguments of rmsprop.
ARGUMENTS = {
    "decay": ("alpha", "rho", "gamma", "decay"),
    "eps": ("eps", "epsilon"),
    "momentum": ("momentum",),
}
IN_FRONT = ("add_decayed_weights", "clip", "clip_by_global_norm")


@contextlib.contextmanager
def recorded():
    """A list of the arguments of every call of rmsprop meanwhile.

    Each is a dict with all arguments of rmsprop, and the first argument of what stands
    in front of it in a chain, such as `clip`.
    """
    seen, front = [], {}

    def recording(*args, **kwargs):
        given = inspect.signature(rmsprop).bind(*args, **kwargs).arguments
        seen.append(DEFAULTS | given | front)
        made = rmsprop(*args, **kwargs)
        front.clear()  # rmsprop itself uses optax.add_decayed_weights
        return made

    def noting(name):
        original = getattr(optax, name)

        def noted(value, *args):
            front[name] = value
            return original(value, *args)

        return noted

    homes = {
        sys.modules[getattr(dialects, name).__module__] for name in dialects.__all__
    }
    with contextlib.ExitStack() as patches:
        for home in {optax_rmsprop, *homes}:
            patches.enter_context(mock.patch.object(home, "rmsprop", recording))
        for name in IN_FRONT:
            patches.enter_context(mock.patch.object(optax, name, noting(name)))
        yield seen


def parameters(name):
    return inspect.signature(getattr(dialects, name)).parameters


def option_of(name, options):
    """The dialect's argument among these names, or None."""
    return next((o for o in options if o in parameters(name)), None)


def flipped(name, option):
    return {option: not parameters(name)[option].default}


def given(name, **case):
    """The arguments of the dialect's rmsprop call, or None if it refuses the case."""
    first = next(iter(parameters(name).values()))
    lr = () if first.default is not first.empty else (0.1,)
    with recorded() as seen:
        try:
            getattr(dialects, name)(*lr, **case)
        except (TypeError, ValueError):
            return None
    return seen[-1]


def settings_in(page, section):
    """By name, what each optimizer in the blocks of a section gives to rmsprop."""
    text = (DOCS / page).read_text(encoding="utf-8")
    section = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = {}
    for code in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S):
        scope = {}
        with recorded() as seen:
            exec(compile(code, page, "exec"), scope)
        names = {}  # by optimizer; a loop over them has another name for the last
        for name, value in scope.items():
            if isinstance(value, optax.GradientTransformation):
                names.setdefault(value, name)
        found |= dict(zip(names.values(), seen, strict=True))
    return found
