"""What a type checker says of a script that uses the package."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """\
import jax
import jax.numpy as jnp
import optax

import optax_rmsprop
from optax_rmsprop import ScaleByRmsState, diagnose, dialects, rmsprop, scale_by_rms
from optax_rmsprop.carry import port_of, to_nnx
from optax_rmsprop.identify import identify
from optax_rmsprop.wrappers import compress_state, single_pass

Params = dict[str, jax.Array]


def mask(params: optax.Params) -> dict[str, bool]:
    return {"w": True}


params: Params = {"w": jnp.zeros((64, 64))}
txs: list[optax.GradientTransformation] = [
    rmsprop(1e-3, momentum=0.9, weight_decay=1e-4, weight_decay_mask=mask),
    rmsprop(optax.linear_schedule(1e-3, 0.0, 100), centered=True),
    rmsprop(jnp.float32(1e-3), decay=jnp.float32(0.9), accumulator_dtype=jnp.float32),
    dialects.tensorflow(0.016, decay=0.9, momentum=0.9, epsilon=1e-3),
    compress_state(dialects.timm(0.016), jnp.uint8),
    single_pass(optax.chain(optax.clip_by_global_norm(1.0), rmsprop())),
]
for tx in txs:
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
rms = scale_by_rms(0.99, eps_in_sqrt=True).init(params)
assert isinstance(rms, ScaleByRmsState)
sizes = diagnose(rms, 1e-3, 1e-8).step_size
found = identify(params, params, 1e-3)
call: str = found[0].call
optax_rmsprop.from_torchh  # wrong
optax_rmsprop.identify.identifyy  # wrong
rmsprop(1e-3, alpha=0.9)  # wrong
rmsprop(1e-3, centered="yes")  # wrong
"""


@pytest.mark.slow
def test_a_strict_type_checker_finds_what_is_wrong_and_no_more(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-pretty", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    wrong = [i for i, line in enumerate(SCRIPT.splitlines(), 1) if "# wrong" in line]
    assert [int(line.split(":")[1]) for line in found] == wrong, done.stdout
