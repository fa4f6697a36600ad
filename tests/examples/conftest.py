import jax
import pytest

pytest.importorskip("flax")


@pytest.fixture(autouse=True)
def as_for_a_user():
    """The promotions that examples run with, not the strict ones of other tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
