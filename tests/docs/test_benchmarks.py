"""The benchmarks of small states run, and count bytes as they say."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script, *options):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_training_with_small_states(tmp_path):
    pytest.importorskip("sklearn")
    output, figure = tmp_path / "losses.json", tmp_path / "losses.png"
    files = ("--output", output, "--figure", figure)
    ways = ["float32", "uint8 state", "bfloat16 parameters and int8"]
    only = ("--tasks", "probe", "--options", "plain", "--ways", *ways)
    printed = run("small_state.py", "--quick", *only, *files)
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == len(ways)
    assert "probe | plain | uint8 state | " in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_cost_of_small_states(tmp_path):
    output = tmp_path / "cost.json"
    options = ("--quick", "--rounds", 1, "--reps", 1)
    run("small_state_cost.py", *options, "--output", output)
    (row,) = json.loads(output.read_text())["rows"].values()
    bytes_ = row["state_bytes_a_parameter"]
    # A row of 64 codes has 6 bytes for its formats.
    assert list(bytes_.values()) == pytest.approx([8, 4, 2.19], abs=0.02)


PROGRAM = """\
%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4] parameter(0)
  ROOT %x = f32[8,4]{1,0} add(%p, %p)
}

%cut (v: f32[128]) -> f32[16] {
  %v = f32[128] parameter(0)
  ROOT %y = f32[16]{0} slice(%v), slice={[0:16]}
}

ENTRY %main (p: f32[8,4], c: u8[8,4], v: f32[128]) -> (f32[8,4], u8[8,4], f32[16]) {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0), metadata={op_name="p"}
  %c = u8[8,4]{1,0:T(32,128)(4,1)} parameter(1)
  %v = f32[128]{0} parameter(2)
  %s = (u8[8,4]{1,0:S(1)}, u8[8,4]{1,0}, u32[]{:S(2)}) copy-start(%c)
  %d = u8[8,4]{1,0:S(1)} copy-done(%s)
  %f = (f32[8,4]{1,0}, u8[8,4]{1,0:S(1)}) fusion(%p, /*index=1*/%d), calls=%fused
  %g = f32[8,4]{1,0} get-tuple-element(%f), index=0
  %h = f32[16]{0} fusion(%v), kind=kLoop, calls=%cut
  ROOT %t = (f32[8,4]{1,0}, u8[8,4]{1,0}, f32[16]{0}) tuple(%g, %c, %h)
}
"""


def test_bytes_of_a_program(monkeypatch):
    """What stays in a TPU's VMEM is left out, and what a slice does not take."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    compiled = runpy.run_path(str(BENCHMARKS / "compiled.py"))
    # c is copied to VMEM, p is read and its successor written, and 16 numbers of v.
    assert compiled["moved_bytes"](PROGRAM) == 32 * (1 + 4 + 4) + 2 * 64
    assert compiled["large"](PROGRAM, {"fusion"}, least=200) == 1
