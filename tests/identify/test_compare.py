"""compare says whether a transformation makes recorded numbers, and what differs."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_identify import by_reference, recording, varying

from optax_rmsprop import dialects, rmsprop
from optax_rmsprop.identify import compare

RATES = varying()
TABLE = jnp.asarray(RATES)


def rate(step):
    return TABLE[step]


TORCH, G = by_reference(RATES, decay=0.9, eps=1e-2, momentum=0.9)


def test_the_same_numbers():
    same = compare(dialects.torch(rate, 0.9, 1e-2, momentum=0.9), TORCH, G, RATES)
    assert same.same
    assert same.step is same.leaf is same.found is None
    assert "The same numbers" in str(same)


CAUSE = "decay 0.99, but the recording has 0.9"


@pytest.mark.slow
def test_a_single_cause():
    tx = rmsprop(rate, 0.99, 1e-2, momentum=0.9)
    other = compare(tx, {"w": TORCH}, {"w": G}, RATES)
    assert not other.same
    assert other.causes == (CAUSE,)
    assert other.leaf == "['w']"
    assert other.step == 0
    assert other.found[0].call.startswith("dialects.torch(learning_rate, alpha=0.9")
    assert CAUSE in str(other)


@pytest.mark.slow
def test_several_causes():
    other = compare(dialects.keras(rate, 0.9, 0.9, 1e-2), TORCH, G, RATES)
    assert len(other.causes) == 2
    assert any("inside the momentum buffer, but" in cause for cause in other.causes)
    assert other.by_step.shape == (len(G),)
    assert other.by_step[0] > 1e-2


@pytest.mark.slow
def test_a_part_that_one_leaf_does_not_get():
    """A mask that leaves one leaf out shows in this leaf, at the first step."""
    tx = optax.masked(rmsprop(1e-2, 0.9, 1e-2), {"a": True, "b": False})
    params, g = by_reference(np.full_like(RATES, 1e-2), decay=0.9, eps=1e-2)
    params, grads = ({"a": x[:, :24], "b": x[:, 24:]} for x in (params, g))
    other = compare(tx, params, grads, 1e-2)
    assert not other.same
    assert (other.step, other.leaf) == (0, "['b']")


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_gradients_that_are_accumulated():
    """Between its steps the parameters stand still, and nothing was skipped."""
    steps = optax.MultiSteps(rmsprop(1e-2, 0.9), 2)
    tx = optax.GradientTransformation(steps.init, steps.update)
    assert compare(tx, recording(tx, G), G, 1e-2).same


def test_a_run_in_float64_is_judged_by_the_rounding_of_the_optimizer():
    params = recording(rmsprop(1e-2, 0.9, 1e-3), G).astype(np.float64)
    assert compare(rmsprop(1e-2, 0.9, 1e-3), params, G, 1e-2).same


@pytest.mark.slow
def test_a_recording_of_another_optimizer():
    other = compare(rmsprop(1e-2), recording(optax.adam(1e-2), G), G, 1e-2)
    assert not other.same
    assert other.causes == ()
    assert not other.found
    assert "Adam" in str(other)


def test_bad_input():
    with pytest.raises(TypeError, match="GradientTransformation"):
        compare(rmsprop, TORCH, G)
    with pytest.raises(ValueError, match="T \\+ 1"):
        compare(rmsprop(1e-2), TORCH[1:], G)
