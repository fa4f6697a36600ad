import importlib
from pathlib import Path

import jax
import pytest


@pytest.fixture(scope="module")
def import_example():
    """Imports a module of `examples/`, where one may import another."""
    pytest.importorskip("flax")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "examples")
        yield importlib.import_module


@pytest.fixture(autouse=True)
def as_for_a_user():
    """The promotions of a user's program, and the precision as it was before.

    Other tests run under strict promotion. Examples that compare with torch set the
    precision of products for their whole process.
    """
    precision = jax.config.jax_default_matmul_precision
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_default_matmul_precision", precision)
