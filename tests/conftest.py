import collections
import gc
import os

import jax
import pytest

# A worker runs on each core, and inherits this. With more threads, matrix products of
# NumPy and torch spin while they wait, a third of the processor time of identify.
os.environ.setdefault("OMP_NUM_THREADS", "1")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # of which all but shardings use the first
jax.config.update("jax_traceback_in_locations_limit", 0)  # no stack for each operation


def pytest_collection_finish():
    """Let the garbage collector leave out what was imported, and come less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


# The extras that bring what a test may miss.
EXTRAS = {
    "torch": "parity",
    "py_mini_racer": "browser",
    "playwright": "browser",
    "sphinx": "docs",
}


def pytest_terminal_summary(terminalreporter):
    """Say in a line for each reason what was left out; pytest says only how many."""
    files = collections.defaultdict(set)
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        for module, extra in EXTRAS.items():
            if f"'{module}" in reason:
                reason += f" (pip install -e '.[{extra}]' brings it)"
                break
        files[reason].add(report.nodeid.partition("::")[0])
    for reason, where in sorted(files.items()):
        terminalreporter.write_line(
            f"left out: {reason}, in {', '.join(sorted(where))}"
        )


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """JAX keeps every program; the whole suite's take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """64-bit mode, for this test only."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def same_weights():
    """torch's modules start with the same weights in every test."""
    pytest.importorskip("torch").manual_seed(0)


@pytest.fixture
def standard_promotion():
    """JAX's own promotion. Some parts of optax do not run under the strict one."""
    with jax.numpy_dtype_promotion("standard"):
        yield
