"""`single_pass` without XLA's pass; `joined_loops.py` has the tests with it."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_rmsprop import rmsprop
from optax_rmsprop.wrappers import joins_loops, single_pass
from optax_rmsprop.wrappers._single_pass import _warn

FLAG = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"
QUICK = "plain or momentum or (all and options) or adam or joins"


@pytest.mark.parametrize(
    "chosen", [QUICK, pytest.param(f"not ({QUICK})", marks=pytest.mark.slow)]
)
def test_where_loops_are_joined(chosen):
    if jax.__version_info__ < (0, 10):
        pytest.skip("XLA of this jaxlib has no pass that joins loops")
    tests = pathlib.Path(__file__).with_name("joined_loops.py")
    command = [sys.executable, "-m", "pytest", "-n0", "-q", tests, "-k", chosen]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
    run = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout


@pytest.fixture
def traced():
    """The program of an update, as text."""
    params = {"w": jnp.ones((512, 512))}
    return lambda tx: str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))


def test_where_they_are_not_it_is_tx_and_warns_once(traced):
    assert not joins_loops()
    tx = rmsprop(1e-2, momentum=0.9)
    _warn.cache_clear()
    with pytest.warns(UserWarning, match="single_pass changes nothing"):
        assert traced(single_pass(tx)) == traced(tx)
    assert traced(single_pass(tx)) == traced(tx)


def test_without_a_compiled_step_there_is_nothing_to_warn_of():
    _warn.cache_clear()
    params = {"w": jnp.ones((512, 512))}
    tx = single_pass(rmsprop(1e-2))
    tx.update(params, tx.init(params))


def test_other_devices_have_the_program_of_tx(traced, monkeypatch):
    _warn.cache_clear()
    tx = rmsprop(1e-2, momentum=0.9)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert traced(single_pass(tx)) == traced(tx)


@pytest.mark.parametrize(
    "tx",
    [optax.adam, None, optax.MultiSteps(optax.adam(0.1), 2)],
    ids=["function", "None", "MultiSteps"],
)
def test_what_is_no_transformation_is_refused(tx):
    with pytest.raises(TypeError, match="`tx` must be an optax"):
        single_pass(tx)
