"""Runs of Keras 3, recorded, go on in JAX.

Here from_keras reads what was recorded, by classes that have of Keras' what it asks.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_rmsprop import from_keras
from peers.carried_keras import TOLERANCE, difference, go_on, port

RECORD = json.loads(
    (
        Path(__file__).parent.parent / "peers" / "recorded" / "runs_keras.json"
    ).read_text()
)


class Variable:
    def __init__(self, path, value):
        self.path = path
        self.value = np.asarray(value, np.float32)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.value, dtype)


class Model:
    """The part of a keras.Model that from_keras uses, from the record."""

    def __init__(self, half):
        self.weights = [Variable(*pair) for pair in half["weights"]]
        trainable = half["trainable"]
        self.trainable_variables = [v for v in self.weights if v.path in trainable]


class RMSprop:
    """The part of Keras' RMSprop that from_keras uses, from the record."""

    def __init__(self, half):
        self.config = half["config"]
        self.iterations = half["iterations"]
        self.variables = [Variable(*pair) for pair in half["variables"]]
        self.excluded = half["excluded"]

    def get_config(self):
        return dict(self.config)

    def _use_weight_decay(self, variable):
        return not any(word in variable.path for word in self.excluded)

    def update_step(self, gradient, variable, learning_rate):
        raise NotImplementedError


RMSprop.update_step.__module__ = "keras.src.optimizers.rmsprop"


def carried(run, learning_rate=None, port=port, **changes):
    half = json.loads(json.dumps(run["half"]))  # a copy
    half["config"].update(changes)
    return from_keras(Model(half), RMSprop(half), port, learning_rate)


@pytest.mark.parametrize("run", RECORD["runs"], ids=lambda run: str(run["options"]))
def test_keras_goes_on(run):
    assert RECORD["versions"]["keras"]
    rates = jnp.asarray(RECORD["learning_rates"])
    steps = range(RECORD["half"], 2 * RECORD["half"])
    params = go_on(carried(run, rates.__getitem__), RECORD["gradients"], steps)
    assert difference(params, run["end"]) <= TOLERANCE


@pytest.mark.parametrize("run", RECORD["runs"], ids=lambda run: str(run["options"]))
def test_real_keras_went_on(run):
    """By `record_runs.py keras`, from a keras.Model and its optimizer themselves."""
    assert 0 < run["carried"] <= TOLERANCE


def test_the_learning_rate_is_keras():
    run = RECORD["runs"][0]
    grads = jax.tree.map(jnp.ones_like, carried(run).params)
    steps = []
    for rate in (None, 1.0):
        params, tx, state = carried(run, rate)
        steps.append(tx.update(grads, state, params)[0]["dense"]["bias"])
    rate = RECORD["learning_rates"][RECORD["half"] - 1]
    np.testing.assert_allclose(steps[0], rate * steps[1], rtol=1e-5)


def test_one_that_has_not_stepped():
    run = json.loads(json.dumps(RECORD["runs"][0]))
    run["half"]["iterations"] = 0
    run["half"]["variables"] = []  # as before its build
    nu = carried(run).opt_state.inner_states["0"].inner_state[0].nu
    assert not nu["dense"]["kernel"].any()


def test_slots_are_carried_whatever_the_step():
    """`iterations.assign(0)` leaves them in Keras."""
    run = json.loads(json.dumps(RECORD["runs"][0]))
    run["half"]["iterations"] = 0
    chain, expected = (
        carried(r).opt_state.inner_states["0"].inner_state
        for r in (run, RECORD["runs"][0])
    )
    assert chain[0].count == 0
    nu = chain[0].nu["dense"]["kernel"]
    assert nu.any()
    np.testing.assert_array_equal(nu, expected[0].nu["dense"]["kernel"])


def test_steps_without_slots():
    """A model of a file without the optimizer's variables: Keras makes them anew."""
    run = json.loads(json.dumps(RECORD["runs"][0]))
    run["half"]["variables"] = []
    params, tx, state = carried(run, 1.0)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params)
    assert state.inner_states["0"].inner_state[0].count == RECORD["half"] + 1
    rho = run["half"]["config"]["rho"]
    first = -1 / np.sqrt(1 - rho + run["half"]["config"]["epsilon"])
    np.testing.assert_allclose(updates["dense"]["bias"], first, rtol=1e-5)


def test_a_constraint_is_refused():
    half = RECORD["runs"][0]["half"]
    model = Model(half)
    model.trainable_variables[0].constraint = max
    with pytest.raises(ValueError, match=r"must have no constraint, .* set its .const"):
        from_keras(model, RMSprop(half), port)


def test_a_schedule_of_keras_must_be_given():
    run = json.loads(json.dumps(RECORD["runs"][0]))
    run["half"]["config"]["learning_rate"] = {"class_name": "CosineDecay"}
    with pytest.raises(ValueError, match="`learning_rate` must be given, because"):
        carried(run)
    assert carried(run, 0.1).params


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ({"clipnorm": 1.0}, "and set Keras' optimizer.clipnorm to None"),
        ({"use_ema": True}, "and set Keras' optimizer.use_ema to False"),
        ({"gradient_accumulation_steps": 2}, r"wrap this in optax.MultiSteps$"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(option, remedy):
    (name,) = option
    with pytest.raises(ValueError, match=f"keras: `{name}` must be .*{remedy}"):
        carried(RECORD["runs"][0], **option)


def test_what_keras_does_not_read_is_no_matter():
    carried(RECORD["runs"][0], ema_momentum=0.5, ema_overwrite_frequency=5)


def test_another_optimizer():
    class Adam:
        pass

    half = RECORD["runs"][0]["half"]
    with pytest.raises(TypeError, match=r"must be a keras.optimizers.RMSprop .*Adam"):
        from_keras(Model(half), Adam(), port)

    class Own(RMSprop):
        def update_step(self, gradient, variable, learning_rate):
            raise NotImplementedError

    class Scaled(RMSprop):
        def apply(self, grads, variables):
            raise NotImplementedError

    for optimizer in (Own(half), Scaled(half)):
        with pytest.raises(TypeError, match="inherit its update_step and apply, got"):
            from_keras(Model(half), optimizer, port)


def test_equal_paths():
    half = RECORD["runs"][0]["half"]
    model = Model(half)
    model.weights[1].path = model.weights[0].path
    with pytest.raises(ValueError, match="a path of its own for each variable"):
        from_keras(model, RMSprop(half), port)


def test_an_optimizer_of_another_model():
    half = json.loads(json.dumps(RECORD["runs"][0]["half"]))
    for pair in half["variables"]:
        pair[0] = pair[0].replace("net_", "other_")
    with pytest.raises(
        ValueError, match=r"none of its trainable variables has .*other"
    ):
        from_keras(Model(half), RMSprop(half), port)


def test_a_variable_of_no_optimizer_stays_put():
    run = json.loads(json.dumps(RECORD["runs"][0]))
    run["half"]["trainable"].append("net/frozen/kernel")
    with pytest.warns(RuntimeWarning, match="no slots of them: net/frozen/kernel; if"):
        params, tx, state = carried(run)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, state, params)
    assert not updates["frozen"].any()
    assert updates["dense"]["bias"].all()


def test_paths_that_give_equal_slots():
    half = json.loads(json.dumps(RECORD["runs"][0]["half"]))
    half["variables"].append(half["variables"][-1])
    with pytest.raises(ValueError, match="paths differ in more than / and _"):
        from_keras(Model(half), RMSprop(half), port)


def test_nan_is_reported():
    run = json.loads(json.dumps(RECORD["runs"][0]))
    path, values = run["half"]["variables"][2]
    assert path.endswith("velocity")
    run["half"]["variables"][2] = [path, (np.asarray(values) * np.nan).tolist()]
    says = "square_avg of `net/dense/kernel`"
    with pytest.warns(RuntimeWarning, match=says) as record:
        carried(run)
    assert record[0].filename == __file__


LONG_PATHS = [f"net/{'layer' * 30}{i}/kernel" for i in range(3000)]


def long_half(paths, slots):
    """A model and an optimizer with these paths, all trained for a step."""
    options = RECORD["runs"][0]["half"]
    return options | {
        "weights": [(path, 1.0) for path in paths],
        "trainable": set(paths),
        "iterations": 1,
        "variables": [(f"{slot}_velocity", 1.0) for slot in slots],
    }


OF_LONG = {
    "a path of its own": long_half(2 * LONG_PATHS, []),
    "differ in more than / and _": long_half(LONG_PATHS, 2 * LONG_PATHS),
    "have the optimizer's variables": long_half(
        ["short"], [path.replace("/", "_") for path in LONG_PATHS]
    ),
}


@pytest.mark.parametrize(("text", "half"), OF_LONG.items(), ids=OF_LONG)
def test_errors_are_short(text, half):
    with pytest.raises(ValueError, match=f"`model` must .*{text}") as raised:
        from_keras(Model(half), RMSprop(half), dict)
    assert len(str(raised.value)) < 600
