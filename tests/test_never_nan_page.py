"""docs/never_nan.md quotes sizes and numbers of steps; here they are counted."""

import re
import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from optax_rmsprop import rmsprop

DOCS = Path(__file__).parent.parent / "docs"
PAGE = " ".join((DOCS / "never_nan.md").read_text().split())


@pytest.fixture(scope="module")
def cases():
    return runpy.run_path(str(DOCS / "figures" / "never_nan.py"))


def quoted(pattern):
    """The only number, or numbers, of the page's only sentence like this."""
    found = re.findall(pattern, PAGE)
    assert len(found) == 1, f"{pattern} is {len(found)} times in the page"
    return np.array(found[0], float)


def test_centered_is_nan_after_so_many_steps(cases):
    steps = cases["first_nan"](cases["centered"](cases["theirs"]))
    # How sums are rounded depends on the processor: the size is what is claimed.
    assert steps == pytest.approx(
        quoted(r"In the figure it takes (\d+) steps"), rel=0.5
    )
    assert cases["first_nan"](cases["centered"](rmsprop)) is None


def test_float16_is_right_between_two_sizes(cases):
    low, high = quoted(r"within a tenth, for gradients from (\S+) to (\d+);")
    infinite = quoted(r"; below (\S+) it is infinite")
    sizes, steps = cases["SIZES"], cases["float16_steps"](cases["theirs"])
    within = np.abs(steps - 1) < 0.1
    assert np.all(within[(sizes > low) & (sizes < high)])
    assert not np.all(within[(sizes > low / 2) & (sizes < low)])
    assert np.all(np.isinf(steps[sizes < infinite]))
    assert np.all(np.isfinite(steps[sizes > 1.5 * infinite]))
    assert np.all(steps[sizes > high] == 0)
    np.testing.assert_allclose(cases["float16_steps"](rmsprop), 1, rtol=0.01)


def test_bfloat16_steps_stay_short(cases):
    ours = cases["bfloat16_steps"](rmsprop)
    theirs = cases["bfloat16_steps"](cases["theirs"])
    ratio = quoted(r"optax's steps are (\d+) times too short, and stay so")
    assert ours[-1] / theirs[-1] == pytest.approx(ratio, rel=0.1)
    assert theirs[-1] == theirs[5000]
    assert ours[-1] == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("decay", "times"), [(0.9, 1), (0.99, 10)])
def test_a_spike_shortens_steps_for_so_long(cases, decay, times):
    steps = times * quoted(r"less than half a learning rate for (\d+) steps")
    assert "with 0.99 for ten times as many" in PAGE
    passed = np.asarray(cases["spike"](rmsprop, decay, int(2 * steps)))
    sizes = np.abs(np.diff(passed)) / cases["LR"]
    short = int(np.sum(sizes[50:] < 0.5))
    assert short == pytest.approx(steps, rel=0.1)
    frozen = np.asarray(cases["spike"](cases["theirs"], decay, int(2 * steps)))
    assert np.all(frozen[50:] == frozen[50])


def test_gradients_are_held_and_zeros_kept_where_the_page_says(cases):
    held = quoted(r"a gradient beyond (\S+) is held")
    assert held == pytest.approx(np.sqrt(float(jnp.finfo("float32").max)) / 2, rel=0.01)
    second = quoted(r"A second epsilon of (\S+) stands")
    update = rmsprop(1.0, 0.9, 0.0)
    g = jnp.float32(1e-20)  # its square is 0, so that the second epsilon decides alone
    step, _ = update.update(g, update.init(g))
    assert float(g / step) ** 2 == pytest.approx(second, rel=0.05)
    unit = cases["dead_unit"]
    assert cases["first_nan"](unit(cases["theirs"])) is not None
    assert cases["first_nan"](unit(rmsprop)) is None


def test_a_learned_rate_is_nan_at_the_batch_without_a_feature(cases):
    step = quoted(r"the batch of step (\d+) lacks a feature")
    assert cases["first_nan"](cases["learned_rates"](cases["theirs"])) == step - 1
    ours = cases["learned_rates"](rmsprop)
    assert cases["first_nan"](ours) is None
    assert ours[-1] > ours[0]
