"""The kernels that the GPU compiler makes of a step, on a machine without a GPU.

Needs the extra `gpu`.
"""

import importlib.util
import runpy
from pathlib import Path

import optax
import pytest

from optax_rmsprop import compress_state, rmsprop

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the extra gpu"
)
FOLDER = Path(__file__).parents[2] / "benchmarks"
GPUS = ("A100", "H100", "B200")
OPTIONS = {
    "plain": ({}, 20),
    "momentum": ({"momentum": 0.9}, 28),
    "everything": ({"momentum": 0.9, "centered": True, "weight_decay": 1e-4}, 36),
}


@pytest.fixture(scope="module")
def measure():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield runpy.run_path(str(FOLDER / "gpu.py"))["measure"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("options", "bytes_"), OPTIONS.values(), ids=OPTIONS)
def test_one_kernel_an_array_that_reads_and_writes_everything_once(
    measure, gpu, options, bytes_
):
    row = measure(gpu, rmsprop(**options), [(8192, 8192), (4096, 2048)])
    assert (row["kernels"], row["copies"]) == (3, 0)  # one of them for the count
    assert row["bytes_a_parameter"] == pytest.approx(bytes_, abs=1e-6)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    ("kind", "dtype", "bytes_"),
    [
        ("plain", "bfloat16", 16),
        ("plain", "uint8", 15),
        ("momentum", "bfloat16", 20),
        ("momentum", "uint8", 18),
        ("everything", "bfloat16", 24),
        ("everything", "uint8", 21),
    ],
)
def test_small_states_move_less(measure, gpu, kind, dtype, bytes_):
    """A further kernel reads the codes of each slot, for their extremes."""
    tx = compress_state(rmsprop(**OPTIONS[kind][0]), dtype)
    row = measure(gpu, tx, [(8192, 8192)])
    slots = (OPTIONS[kind][1] - 12) // 8
    assert row["large_kernels"] == 1 + slots * (dtype == "uint8")
    assert row["bytes_a_parameter"] == pytest.approx(bytes_, abs=0.05)
    assert row["scratch_bytes"] < 2**20


def test_a_second_kernel_is_found(measure):
    tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop())
    row = measure("H100", tx, [(8192, 8192)])
    assert row["large_kernels"] > 1
    assert row["bytes_a_parameter"] > 23.9
