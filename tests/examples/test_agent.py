"""The actor-critic example: its pole is gym's, and its targets."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

RNG = np.random.default_rng(0)
TOLERANCE = 1e-6  # of states near 1, one float32 step; observed: 1.2e-7


@pytest.fixture(scope="module")
def example(import_example):
    return import_example("a2c_cartpole")


def gyms_step(state, action, gravity=9.8):
    """CartPoleEnv.step of gym 0.26, which takes speeds before it changes them."""
    _, x_dot, theta, theta_dot = state
    masspole, total_mass, length, force_mag, tau = 0.1, 1.1, 0.5, 10.0, 0.02
    polemass_length = masspole * length
    force = force_mag if action == 1 else -force_mag
    costheta, sintheta = math.cos(theta), math.sin(theta)
    temp = (force + polemass_length * theta_dot**2 * sintheta) / total_mass
    thetaacc = (gravity * sintheta - costheta * temp) / (
        length * (4.0 / 3.0 - masspole * costheta**2 / total_mass)
    )
    xacc = temp - polemass_length * thetaacc * costheta / total_mass
    changes = x_dot, xacc, theta_dot, thetaacc
    return np.array([s + tau * c for s, c in zip(state, changes, strict=True)])


def is_over(state):
    return abs(state[0]) > 2.4 or abs(state[2]) > 12 * 2 * math.pi / 360


def test_the_pole_is_gyms(example):
    play = jax.jit(example.play)
    pole, age, falls = example.begin(jax.random.key(0)), jnp.int32(0), 0
    apart, control = 0.0, 0.0
    for key in jax.random.split(jax.random.key(1), 200):
        action = int(RNG.integers(2))
        expected = gyms_step(np.asarray(pole, np.float64), action)
        other = gyms_step(np.asarray(pole, np.float64), action, gravity=9.81)
        before = int(age)
        (pole, age), (reached, fell, ended, reward) = play(pole, age, action, key)
        apart = max(apart, np.abs(reached - expected).max())
        control = max(control, np.abs(reached - other).max())
        assert bool(fell) == bool(ended) == is_over(expected)
        assert int(reward) == before + 1
        if fell:
            falls += 1
            assert int(age) == 0
            assert np.abs(pole).max() <= 0.05
        else:
            np.testing.assert_array_equal(pole, reached)
    assert falls >= 5
    assert apart < TOLERANCE < control / 20  # observed: 6.6e-5


def test_an_episode_ends_after_500_steps(example):
    at_rest, play = jnp.zeros(4), jax.jit(example.play)
    for age, over in ((498, False), (499, True)):
        now, (_, fell, ended, steps) = play(
            at_rest, jnp.int32(age), 1, jax.random.key(0)
        )
        assert int(steps) == age + 1
        assert not fell
        assert bool(ended) == over
        assert int(now[1]) == (0 if over else age + 1)


def test_targets(example):
    values = RNG.normal(size=(5, 64)).astype(np.float32)
    fell = RNG.random((5, 64)) < 0.2
    timed_out = RNG.random((5, 64)) < 0.2
    ended = fell | timed_out
    expected = np.empty((5, 64))
    for n in range(64):
        later = values[-1, n]
        for t in reversed(range(5)):
            if fell[t, n]:
                later = 0.0
            elif timed_out[t, n]:
                later = values[t, n]
            later = 1 + 0.99 * later
            expected[t, n] = later
    targets = example.targets_of(values, fell, ended)
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    as_failures = example.targets_of(values, ended, ended)
    assert np.abs(as_failures - expected).max() > 0.1
