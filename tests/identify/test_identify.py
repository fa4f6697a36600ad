"""identify finds the implementation and its settings, or says that there is none."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reference
from helpers import slow_but
from optax_rmsprop import dialects, rmsprop
from optax_rmsprop.identify import identify
from optax_rmsprop.identify._hints import hint
from optax_rmsprop.identify._model import Form
from optax_rmsprop.identify._rough import roughly
from optax_rmsprop.identify._run import chosen, whole_run
from peers.record import KEPT, problem

RECORDED = Path(__file__).parents[1] / "peers" / "recorded"
STEPS, WIDTH = 40, 48


def gradients(steps=STEPS, width=WIDTH, seed=0):
    """Noise around a mean, of sizes from 1e-3 to 1 by coordinate."""
    rng = np.random.default_rng(seed)
    sizes = 10 ** rng.uniform(-3, 0, width)
    return (sizes * (rng.normal(size=(steps, width)) + rng.normal(size=width))).astype(
        np.float32
    )


def varying(steps=STEPS):
    return np.float32(1e-2 * (1 + 0.5 * np.sin(np.arange(steps))))


def by_reference(rates, dtype=np.float32, seed=0, **options):
    """A recording of the NumPy reference, whose parameters are rounded to a dtype."""
    g = gradients(len(rates), seed=seed)
    p = np.random.default_rng(seed + 1).normal(size=WIDTH)
    run = reference.rmsprop(
        p, g.astype(np.float64), lambda t: float(rates[t]), **options
    )
    return np.stack([p, *(state[0] for state in run)]).astype(dtype), g


def recording(tx, g, p=None, dtype=jnp.float32):
    """The parameters before and after each update of a transformation."""
    if p is None:
        p = np.random.default_rng(7).normal(size=g.shape[1:])
    p = jnp.asarray(p, dtype)
    state, history, update = tx.init(p), [np.asarray(p)], jax.jit(tx.update)
    for gradient in jnp.asarray(g, dtype):
        with jax.numpy_dtype_promotion("standard"):  # optax's need it
            updates, state = update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        history.append(np.asarray(p))
    return np.stack(history)


def names(found):
    return [finding.call.partition("(")[0] for finding in found]


def cases():
    """A recorded run of some dialects; `benchmarks/identify.py` has all runs."""
    for name in ("timm", "dqn2015"):
        file = RECORDED / f"{name}.json"
        recorded = json.loads(file.read_text())["results"] if file.exists() else []
        result = recorded[-1] if recorded else {"case": {}, "params": None}
        marks = [pytest.mark.slow] * (name != "timm")
        yield pytest.param(name, result, id=name, marks=marks)


@pytest.mark.parametrize(("name", "result"), list(cases()))
def test_a_recorded_run_is_found(name, result):
    """Between the steps that were recorded, our dialect goes on for its framework."""
    p, g, rates = problem()
    table = jnp.asarray(rates)
    tx = getattr(dialects, name)(lambda step: table[step], **result["case"])
    params = recording(tx, g, p)
    if result["params"] is not None:
        np.testing.assert_allclose(
            params[1:][KEPT], np.float32(result["params"]), rtol=1e-4
        )
    found = identify({"w": params}, {"w": g}, rates)
    assert f"dialects.{name}" in names(found), str(found)
    assert found[0].error < 1e-3


def told(options):
    """The options that change numbers."""
    options = dict(options)
    if options["bias_correction"]:
        options["initial_scale"] = 0.0
    if not options["momentum"]:
        options |= {"nesterov": False, "lr_in_momentum": False}
    if not options["weight_decay"]:
        options["decoupled_weight_decay"] = False
    return options


def found_settings(finding):
    numbers = dict(finding.numbers)
    l2, decoupled = numbers.pop("l2"), numbers.pop("decoupled")
    numbers.pop("rate")
    numbers["initial_scale"] = numbers.pop("initial")
    return numbers | {"weight_decay": l2 + decoupled}


def assert_found(found, options):
    """A finding has these settings within 1 %, and makes the recorded numbers."""
    assert found, str(found)
    options = told(options)
    expected = {k: options[k] for k in found_settings(found[0])}
    matching = [
        finding
        for finding in found
        if all(
            np.isclose(value, expected[name], rtol=0.01, atol=1e-6)
            for name, value in found_settings(finding).items()
        )
    ]
    assert matching, f"{options}\n{found}\n{[f.numbers for f in found]}"


SETTINGS = [
    {"momentum": 0.9, "eps_in_sqrt": True, "lr_in_momentum": True},
    {"bias_correction": True, "nesterov": True, "momentum": 0.8, "maximize": True},
    {"centered": True, "weight_decay": 0.05},
    # Fits that ended elsewhere before each form started from the others' numbers too.
    {"decay": 0.825, "eps": 1.35e-4, "momentum": 0.9, "centered": True}
    | {"initial_scale": 1.0, "eps_in_sqrt": True, "maximize": True},
    # So much weight decay that the steps follow the gradients no longer, and that they
    # follow their opposite.
    {"decay": 0.81, "eps": 1e-4, "weight_decay": 0.3, "centered": True}
    | {"bias_correction": True},
    {"decay": 0.8, "eps": 1e-4, "weight_decay": 0.2, "centered": True}
    | {"bias_correction": True, "maximize": True},
]


@pytest.mark.parametrize("options", slow_but(SETTINGS[:1], SETTINGS, name=repr))
def test_settings_are_found(options):
    plain = {"decay": 0.95, "eps": 2e-3, "momentum": 0.0, "weight_decay": 0.0}
    plain |= dict.fromkeys(
        ("nesterov", "lr_in_momentum", "decoupled_weight_decay", "bias_correction"),
        False,
    )
    options = plain | {"initial_scale": 0.0} | options
    params, g = by_reference(varying(), **options)
    found = identify(params, g, varying())
    assert_found(found, options)
    # The call is short: its decimals are those that were given.
    assert len(found[0].call) < 140, found[0].call
    assert ("maximize=True" in found[0].call) == ("maximize" in options)


def test_a_first_step_that_is_1000_times_the_others_tells_eps():
    """A centered and corrected average is 0 at first, and momentum keeps g/eps."""
    form = {"centered": True, "bias_correction": True, "nesterov": True}
    numbers = {"decay": 0.89, "eps": 1.41e-4, "momentum": 0.9, "weight_decay": 0.246}
    params, g = by_reference(varying(), **form, **numbers)
    run = chosen(whole_run(params, g, varying()))
    (found,) = roughly(run, [Form(**form)], rate_is_known=True, from_start=True)
    assert found.numbers["eps"] == pytest.approx(numbers["eps"], rel=1e-3)
    assert found.numbers["l2"] == pytest.approx(numbers["weight_decay"], rel=1e-3)


def test_a_warm_up_from_0_has_no_first_step_to_tell_eps():
    form = {"centered": True, "bias_correction": True}
    rates = varying() * np.minimum(np.arange(STEPS) / 10, 1)
    params, g = by_reference(rates, decay=0.9, eps=1e-2, **form)
    run = chosen(whole_run(params, g, rates))
    (found,) = roughly(run, [Form(**form)], rate_is_known=True, from_start=True)
    assert found.numbers["eps"] == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.slow
def test_parameters_of_16_bits():
    tx = dialects.timm(1e-1, alpha=0.9, eps=1e-3, momentum=0.9)
    g = gradients(60)
    params = recording(tx, g, dtype=jnp.bfloat16)
    found = identify(params, g.astype(jnp.bfloat16), 1e-1)
    assert "dialects.timm" in names(found), str(found)


@pytest.mark.slow
def test_an_unknown_constant_rate_is_fitted():
    params = recording(rmsprop(3e-3, 0.9, 1e-3), gradients())
    found = identify(params, gradients())
    assert found[0].call == "dialects.torch(0.003, alpha=0.9, eps=0.001)"


@pytest.mark.slow
def test_a_constant_rate_leaves_its_order_open():
    params = recording(rmsprop(3e-3, 0.9, 1e-2, momentum=0.9), gradients())
    found = identify(params, gradients(), 3e-3)
    inside = "dialects.optax(0.003, eps=0.01, momentum=0.9, eps_in_sqrt=False)"
    assert {found[0].call.partition("(")[0], inside} <= {*names(found), *calls(found)}
    assert "constant" in str(found)


def calls(found):
    return [finding.call for finding in found]


@pytest.mark.slow
def test_a_geometric_rate_leaves_the_order_open():
    """momentum * ratio inside the buffer makes the steps of momentum outside it."""
    rates = np.float32(1e-2 * 0.95 ** np.arange(STEPS))
    params, g = by_reference(rates, decay=0.9, eps=1e-2, momentum=0.8)
    found = identify(params, g, rates)
    momenta = {round(finding.numbers["momentum"], 3) for finding in found}
    assert momenta == {0.8, 0.76}


@pytest.mark.slow
def test_an_invisible_eps_is_the_default():
    g = gradients() + np.float32(3)
    found = identify(recording(rmsprop(1e-3, 0.9), g), g, 1e-3)
    assert "dialects.torch(0.001, alpha=0.9)" in calls(found)
    assert "Any eps up to" in str(found)


@pytest.mark.slow
def test_skipped_steps_and_steps_without_gradients():
    g = gradients()
    g[[5, 6]] = 0
    params = recording(rmsprop(1e-2, 0.9, 1e-3), g)
    # A step of loss scaling whose gradients overflowed.
    params = np.insert(params, 20, params[20], axis=0)
    g = np.insert(g, 20, np.inf, axis=0)
    found = identify(params, g, 1e-2)
    assert found[0].call == "dialects.torch(0.01, alpha=0.9, eps=0.001)"
    assert "1 step was skipped" in str(found)


@pytest.mark.slow
def test_a_run_that_began_before_its_recording():
    rates = np.float32(1e-2 * (1 + 0.5 * np.sin(np.arange(100))))
    table = jnp.asarray(rates)
    g = gradients(100)
    tx = dialects.keras(lambda t: table[t], 0.95, 0.9, 1e-4)
    params = recording(tx, g)
    found = identify(params[50:], g[50:], rates[50:])
    assert "dialects.keras(learning_rate, rho=0.95, epsilon=0.0001, momentum=0.9)" in (
        calls(found)
    )
    assert "began before" in str(found)


@pytest.mark.slow
def test_complex_numbers_and_trees():
    g = gradients()
    z = (g[:, :24] + 1j * g[:, 24:]).astype(np.complex64).reshape(STEPS, 4, 6)
    tx = rmsprop(1e-2, 0.9, 1e-3)
    p = {"z": jnp.ones((4, 6), jnp.complex64), "x": jnp.ones(3), "none": None}
    state, history = tx.init(p), [p]
    grads = {"z": jnp.asarray(z), "x": jnp.asarray(g[:, :3]), "none": None}
    for t in range(STEPS):
        now = {"z": grads["z"][t], "x": grads["x"][t], "none": None}
        updates, state = tx.update(now, state, p)
        p = optax.apply_updates(p, updates)
        history.append(p)
    params = jax.tree.map(lambda *x: np.stack(x), *history)
    found = identify(params, grads, 1e-2)
    assert found[0].call == "dialects.torch(0.01, alpha=0.9, eps=0.001)"


@pytest.mark.slow
def test_an_array_with_settings_of_its_own_is_not_passed_over():
    """Few numbers of it are among those that are fitted."""
    g = np.random.default_rng(0).normal(size=(STEPS, 3000)).astype(np.float32)
    small = g[:, :2]
    params = {
        "kernel": recording(rmsprop(1e-2, 0.9, weight_decay=0.1), g),
        "bias": recording(rmsprop(1e-2, 0.9), small),
    }
    found = identify(params, {"kernel": g, "bias": small}, 1e-2)
    assert not found
    assert "in ['bias']" in str(found)
    assert "settings of its own" in str(found)
    frozen = params | {"bias": np.ones((STEPS + 1, 2), np.float32)}
    found = identify(frozen, {"kernel": g, "bias": small}, 1e-2)
    assert not found
    assert "in ['bias']" in str(found)


@pytest.mark.slow
def test_a_late_or_single_wrong_step_is_not_passed_over():
    g = gradients(450)
    params = recording(rmsprop(1e-2, 0.9, 1e-3), g).astype(np.float64)
    params[430:, 3] += 1e-4
    found = identify(params.astype(np.float32), g, 1e-2)
    assert not found
    assert "first at step 429" in str(found)


@pytest.mark.slow
def test_rows_that_have_gradients_late():
    g = gradients()
    g[:32, 3] = 0
    found = identify(recording(rmsprop(1e-2, 0.9, 1e-3), g), g, 1e-2)
    assert "dialects.torch(0.01, alpha=0.9, eps=0.001)" in calls(found)


@pytest.mark.slow
def test_a_schedule_that_counts_only_the_steps_that_were_taken():
    g = gradients(41)
    table = jnp.asarray(varying(41))
    g[20] = np.nan
    tx = optax.apply_if_finite(rmsprop(lambda step: table[step], 0.9, 1e-3), 3)
    found = identify(recording(tx, g), g, varying(41))
    assert "dialects.torch(learning_rate, alpha=0.9, eps=0.001)" in calls(found)


OTHERS = {  # and the hints that are given
    "sgd": (optax.sgd(1e-1, momentum=0.9), "gradient descent"),
    "clipped": (
        optax.chain(optax.clip_by_global_norm(2.0), rmsprop(1e-2, eps=1e-3)),
        "clipped to a norm of 2 ",
    ),
}


@pytest.mark.parametrize("name", slow_but(["sgd"], OTHERS))
def test_none_of_these(name):
    g, (tx, says) = gradients(), OTHERS[name]
    found = identify(recording(tx, g), g, 1e-2)
    assert not found
    assert len(found) == 0
    assert "none of these" in str(found)
    assert says in str(found)


def test_gradient_descent_is_seen_in_float64_too():
    g = gradients().astype(np.float64)
    steps = itertools.accumulate(g, lambda p, x: p - 0.1 * x, initial=g[0])
    run = whole_run(np.stack([*steps]), g, 0.1)
    assert "gradient descent, momentum 0," in hint(run, [])


def test_equally_long_steps_are_lions():
    g = gradients()
    run = whole_run(recording(optax.lion(1e-3), g), g, 1e-3)
    assert "Lion" in hint(run, [])


@pytest.mark.slow
def test_gradients_of_other_steps():
    g = gradients()
    params = recording(rmsprop(1e-2, 0.9, 1e-3), g)
    late = identify(params[1:], g[:-1], 1e-2)
    assert not late
    assert "one step after" in str(late)


@pytest.mark.slow
def test_a_rate_that_is_not_the_one_given():
    params = recording(rmsprop(2e-2, 0.9, 1e-3), gradients())
    found = identify(params, gradients(), 1e-2)
    assert not found
    assert "2 times the one that was given" in str(found)


P, G = by_reference(np.full(STEPS, 1e-2), decay=0.9, eps=1e-3)


@pytest.mark.parametrize(
    ("params", "grads", "rate", "message"),
    [
        (P[:-1], G, 1e-2, "T \\+ 1"),
        ({"a": P}, {"b": G}, 1e-2, "one structure"),
        ({}, {}, 1e-2, "empty tree"),
        (P[:6], G[:5], 1e-2, "at least 10 steps"),
        (np.where(P[20] == P, np.nan, P), G, 1e-2, "`params` must be finite"),
        (P, np.where(np.arange(STEPS)[:, None] == 9, np.nan, G), 1e-2, "at step 9"),
        (P, 0 * G, 1e-2, "must not all be 0"),
        (np.broadcast_to(P[0], P.shape), G, 1e-2, "clone"),
        (P, G, [1e-2, 1e-3], "40 numbers"),
        (P, G, "fast", "a number, 40 numbers"),
        (P, G, 1j, "a number, 40 numbers"),
        (P, G, -1.0, "at least 0"),
        (P, G, np.nan, "finite"),
    ],
)
def test_bad_input(params, grads, rate, message):
    with pytest.raises(ValueError, match=message):
        identify(params, grads, rate)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="arrays of floats"):
        identify(P.astype(int), G, 1e-2)
