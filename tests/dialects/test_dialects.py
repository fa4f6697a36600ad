"""Every dialect against runs of its framework, and against the wrong switch."""

import inspect
import itertools
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from helpers import covering, stepper
from optax_rmsprop import dialects, rmsprop
from peers import transcriptions
from peers.record import FRAMEWORKS, KEPT, STEPS, options, problem

RECORDED = Path(__file__).parent.parent / "peers" / "recorded"
TOLERANCE = 1e-5  # observed: 3e-6
TRANSCRIBED = {
    "optimisers_jl": [
        *options(epsilon=[1e-2], rho=[0.9, 0.99], centred=[False, True]),
        {"epsilon": 1e-2, "centered": True},
    ],
    "dqn2015": [{}, {"wc": 0.1}],
    "graves2013": options(eps=[1e-2, 1e-4], momentum=[0.0, 0.9]),
}


def recorded_cases(name):
    """Arguments of the dialect, and the parameters at the recorded steps."""
    for result in json.loads((RECORDED / f"{name}.json").read_text())["results"]:
        yield result["case"], np.array(result["params"])


def transcribed_cases(name):
    transcription = getattr(transcriptions, name)
    run = [np.asarray(x, np.float64) for x in problem()]
    for case in TRANSCRIBED[name]:
        yield case, np.array(list(transcription(*run, **case)))[KEPT]


def rows(name, title, cases):
    """The defaults, and cases with every pair of options; the first two are not slow.

    `benchmarks/identify.py` compares all that were recorded.
    """
    cases = list(cases)
    pairs = covering([case for case, _ in cases])
    for i, (case, params) in enumerate(cases):
        marks = [pytest.mark.slow] * (case not in [{}, *pairs[:2]])
        if case in [{}, *pairs]:
            yield pytest.param(name, case, params, id=f"{title}-{i}", marks=marks)


def evidence():
    for name in sorted(FRAMEWORKS.keys() & dialects.__all__):
        yield from rows(name, name, recorded_cases(name))
    for name in TRANSCRIBED:
        yield from rows(name, f"{name}-transcribed", transcribed_cases(name))


EVIDENCE = list(evidence())


def learning_rate(count):
    return jnp.asarray(problem()[2])[count]


def train(tx, steps=STEPS):
    """The parameters at the recorded steps, in float32."""
    p, gradients, _ = problem()
    p, history = jnp.asarray(p), []
    state = tx.init(p)
    for g in map(jnp.asarray, gradients[:steps]):
        p, state = stepper(tx)(p, state, g)
        history.append(np.asarray(p))
    return np.stack([history[i] for i in KEPT if i < steps])


def largest_difference(actual, expected):
    """The largest difference of all parameters and steps, relative to the parameter."""
    return np.max(np.abs(actual - expected) / np.maximum(np.abs(expected), 0.1))


@pytest.mark.parametrize(("name", "case", "expected"), EVIDENCE)
def test_equals_its_framework(name, case, expected):
    actual = train(getattr(dialects, name)(learning_rate, **case))
    assert largest_difference(actual, expected) <= TOLERANCE


def test_every_dialect_has_evidence():
    assert set(dialects.__all__) <= FRAMEWORKS.keys() | TRANSCRIBED.keys()


@pytest.mark.parametrize(
    ("case", "expected"), list(recorded_cases("mindspore_vectors"))
)
def test_mindspore_on_a_cpu_has_epsilon_outside_in_arrays_of_8(case, expected):
    as_documented = settings_of("mindspore", case)
    assert largest_difference(train(rmsprop(**as_documented)), expected) > TOLERANCE
    outside = as_documented | {"eps_in_sqrt": False}
    assert largest_difference(train(rmsprop(**outside)), expected) <= TOLERANCE


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_records_are_of_these_cases(name):
    recorded = json.loads((RECORDED / f"{name}.json").read_text())
    assert recorded["kept"] == KEPT
    assert recorded["versions"]
    assert [result["case"] for result in recorded["results"]] == FRAMEWORKS[name][2]
    for key, values in zip(
        ("params", "gradients", "learning_rates"), problem(), strict=True
    ):
        np.testing.assert_array_equal(np.float32(recorded[key]), values)


# Our signatures differ in this: torch users pass parameters first, Paddle's by name
# only; bitsandbytes had two more arguments; and one dialect stands for two functions.
NOT_IN_ORIGINAL = {"bitsandbytes": ["percentile_clipping", "block_wise"]}
OTHER_DEFAULTS = {"jax_example_libraries": {"momentum": None}}


@pytest.mark.parametrize("name", sorted(FRAMEWORKS.keys() & dialects.__all__))
def test_arguments_have_the_originals_order_and_defaults(name):
    recorded = json.loads((RECORDED / f"{name}.json").read_text())["signature"]
    expected = dict(recorded) | OTHER_DEFAULTS.get(name, {})
    expected.pop("params", None)
    if "parameters" in expected:
        names = list(expected)
        expected = {n: expected[n] for n in names[: names.index("parameters")]}
    ours = {
        p.name: "required" if p.default is p.empty else p.default
        for p in inspect.signature(getattr(dialects, name)).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    }
    for extra in NOT_IN_ORIGINAL.get(name, []):
        ours.pop(extra)
    assert list(ours.items()) == list(expected.items())


def toggled(name):
    return lambda settings: settings | {name: not settings.get(name, False)}


# Each changes one switch of the settings that a dialect gives to rmsprop.
SWITCHES = {
    "eps": toggled("eps_in_sqrt"),
    "start": lambda s: s | {"initial_scale": 1.0 - s.get("initial_scale", 0.0)},
    "momentum": toggled("lr_in_momentum"),
    "decay": toggled("decoupled_weight_decay"),
    "centered": toggled("centered"),
}


def matters(switch, settings):
    """Whether the switch can change a number of these settings at all."""
    return {
        "momentum": bool(settings.get("momentum")),
        "decay": bool(settings.get("weight_decay")),
        "start": not settings.get("bias_correction"),  # they exclude each other
    }.get(switch, True)


def settings_of(name, case):
    """The arguments with which a dialect calls rmsprop."""
    seen = {}

    def spy(*args, **kwargs):
        seen.update(inspect.signature(rmsprop).bind(*args, **kwargs).arguments)
        return rmsprop(*args, **kwargs)

    dialect = getattr(dialects, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[dialect.__module__], "rmsprop", spy)
        dialect(learning_rate, **case)
    return seen


def controls():
    """Each switch of each dialect, in the first and the last case where it matters."""
    for switch, name in itertools.product(SWITCHES, dialects.__all__):
        values = [
            row.values
            for row in EVIDENCE
            if row.values[0] == name and matters(switch, settings_of(*row.values[:2]))
        ]
        for i, row in enumerate(values[:: max(1, len(values) - 1)]):
            # The last has the most options.
            marks = [pytest.mark.slow] * (i == 0 < len(values) - 1)
            yield pytest.param(*row, switch, id=f"{name}-{switch}-{i}", marks=marks)


SHOWN = 21  # after so many steps, every wrong switch shows


@pytest.mark.parametrize(("name", "case", "expected", "switch"), list(controls()))
def test_the_wrong_switch_does_not_equal_it(name, case, expected, switch):
    wrong = train(rmsprop(**SWITCHES[switch](settings_of(name, case))), SHOWN)
    assert largest_difference(wrong, expected[: len(wrong)]) > TOLERANCE
