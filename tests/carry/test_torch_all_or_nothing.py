"""`to_torch` writes everything or nothing, and what a port leaves out is no matter."""

import itertools
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from helpers import update_in_torch
from optax_rmsprop import from_torch, from_torch_checkpoint, to_torch


def torch_run(steps=2):
    """Two groups with other slots, a bfloat16 and a frozen parameter, a buffer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model.narrow = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    model.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    groups = [
        {"params": [*model[0].parameters(), model.narrow], "momentum": 0.9},
        {"params": model[1].parameters(), "centered": True},
    ]
    optimizer = torch.optim.RMSprop(groups)
    update_in_torch(model, optimizer, torch.randn_like, steps)
    return model, optimizer


def port(weights):
    """All but the count of batches, which has 64 bits."""
    return {name: w for name, w in weights.items() if "num_batches" not in name}


def moved(run=None):
    """Arguments of `to_torch`, in which every number is another than in the run."""
    run = run or from_torch(*torch_run(), port)
    numbers = run.params, run.opt_state
    return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), numbers)


def contents(model, optimizer):
    """Every byte of both."""

    def copied(x):
        if isinstance(x, torch.Tensor):
            values = x.detach().clone().contiguous().reshape(-1)
            return str(x.dtype), tuple(x.shape), values.view(torch.uint8).tolist()
        if isinstance(x, dict):
            return {key: copied(value) for key, value in x.items()}
        return [copied(y) for y in x] if isinstance(x, list | tuple) else x

    return copied(dict(model.state_dict())), copied(optimizer.state_dict())


def every_call(patch, fail_at):
    """Lets the k-th call of a function in C, once all is read, run out of memory."""
    calls, seen = itertools.count(1), set()

    def profile(frame, event, _):
        module = frame.f_globals.get("__name__", "")
        seen.add(module)
        ours = module.startswith("optax_rmsprop.")
        is_writing = "optax_rmsprop.carry._torch._write" in seen
        if event == "c_call" and ours and is_writing and next(calls) == fail_at:
            raise MemoryError

    sys.setprofile(profile)


def every_copy(patch, fail_at):
    """Lets the k-th write run out of memory when it is done."""
    calls, copy = itertools.count(1), torch.Tensor.copy_

    def copy_and_fail(self, *args, **kwargs):
        result = copy(self, *args, **kwargs)
        if next(calls) == fail_at:
            raise MemoryError
        return result

    patch.setattr(torch.Tensor, "copy_", copy_and_fail)


# With each the least number of failures: of parameters and buffers there are 8, each
# rehearsed and written.
@pytest.mark.parametrize(
    ("inject", "least", "steps"),
    [
        pytest.param(every_call, 100, 2, id="call", marks=pytest.mark.slow),
        pytest.param(every_copy, 16, 0, id="copy"),
    ],
)
def test_out_of_memory_anywhere(inject, least, steps):
    model, optimizer = torch_run(steps)
    given, before = moved(), contents(model, optimizer)
    for fail_at in itertools.count(1):
        try:
            with pytest.MonkeyPatch.context() as patch:
                inject(patch, fail_at)
                to_torch(*given, model, optimizer, port)
        except MemoryError:
            assert contents(model, optimizer) == before, fail_at
        else:
            break
        finally:
            sys.setprofile(None)
    assert fail_at > least
    after = contents(model, optimizer)
    assert all(after[0][name] != before[0][name] for name in port(before[0]))
    assert after[1]["state"] != before[1]["state"]


class Refuses(torch.Tensor):
    """A tensor that is not written, from the `left`-th time on."""

    left = 0

    def copy_(self, *args, **kwargs):
        if not self.left:
            raise NotImplementedError("read-only")
        self.left -= 1
        return super().copy_(*args, **kwargs)


def refusing(left):
    tensor = torch.ones(2).as_subclass(Refuses)
    tensor.left = left
    return tensor


def inferred():
    with torch.inference_mode():
        return torch.ones(2)


UNWRITABLE = {
    "refuses": (lambda: refusing(0), ValueError, "that torch can write, .*: read-only"),
    "refuses later": (lambda: refusing(1), NotImplementedError, "read-only"),
    "inference": (inferred, ValueError, "`z` must be .* that torch can write, .*Infer"),
    "expanded": (lambda: torch.ones(1).expand(2), ValueError, "`z` must have memory"),
    "windows": (
        lambda: torch.ones(4).unfold(0, 2, 1),
        ValueError,
        "`z` must have memory of its own for each element",
    ),
}


@pytest.mark.parametrize(("make", "error", "text"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_torch_cannot_write(make, error, text):
    model, optimizer = torch_run()
    model.register_buffer("z", make())
    run = from_torch(model, optimizer, port)
    before = contents(model, optimizer)
    with pytest.raises(error, match=text):
        to_torch(*moved(run), model, optimizer, port)
    assert contents(model, optimizer) == before

    def without(weights):
        return {name: w for name, w in port(weights).items() if name != "z"}

    run = from_torch(model, optimizer, without)
    to_torch(run.params, run.opt_state, model, optimizer, without)


# Slots in dtypes that torch does not take from NumPy, but whose values it can store.
@pytest.mark.parametrize(
    "dtype",
    [
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float4_e2m1fn,
        ml_dtypes.bfloat16,
        np.float16,
        np.longdouble,
        ">f4",
        ">f8",
    ],
    ids=str,
)
def test_slots_of_any_dtype(dtype):
    params, state = moved()
    expected = torch_run()
    for_slots = jax.tree.map(
        lambda x: np.full_like(x, 1.5) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
        state,
    )
    to_torch(params, for_slots, *expected, port)
    model, optimizer = torch_run()
    narrow = jax.tree.map(
        lambda x: x.astype(dtype) if isinstance(x, np.ndarray) else x, for_slots
    )
    to_torch(params, narrow, model, optimizer, port)
    assert contents(model, optimizer) == contents(*expected)
    assert (optimizer.state[model.narrow]["momentum_buffer"] == 1.5).all()


BAD_COUNTS = [-1, 2**31, 10**400, 1.0, np.nan, None, "3", jnp.ones(2, jnp.int32), True]


@pytest.mark.parametrize("count", BAD_COUNTS, ids=lambda count: str(count)[:9])
def test_a_count_out_of_range(count):
    params, state = moved()
    inner = state.inner_states["0"]
    first = inner.inner_state[0]._replace(count=count)
    inner = inner._replace(inner_state=(first, *inner.inner_state[1:]))
    state = state._replace(inner_states=state.inner_states | {"0": inner})
    model, optimizer = torch_run()
    before = contents(model, optimizer)
    says = (
        r"`opt_state` must count updates in one integer.*, got .* at "
        r"\.inner_states\['0'\]\.inner_state\[0\]\.count; "
    )
    with pytest.raises((TypeError, ValueError), match=says):
        to_torch(params, state, model, optimizer, port)
    assert contents(model, optimizer) == before


def linear_run():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.RMSprop(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("count", [2**24 + 1, 2**31 - 1])
def test_a_count_that_float32_does_not_hold(count):
    model, optimizer = linear_run()
    run = from_torch(model, optimizer, dict)
    state = (run.opt_state[0]._replace(count=jnp.int32(count)), *run.opt_state[1:])
    to_torch(run.params, state, model, optimizer, dict)
    assert from_torch(model, optimizer, dict).opt_state[0].count == count


def test_slots_written_in_inference_mode_can_be_trained():
    model, optimizer = linear_run()
    run = from_torch(model, optimizer, dict)
    with torch.inference_mode():
        to_torch(run.params, run.opt_state, model, optimizer, dict)
    optimizer.step()


LEFT_OUT = {
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "complex32": lambda: torch.empty(2, dtype=torch.complex32),
    "meta": lambda: torch.ones(2, device="meta"),
    "sparse": lambda: torch.ones(2).to_sparse(),
    "compressed": lambda: torch.ones(2, 2).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
}


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor|The PyTorch API of nested"
)
@pytest.mark.filterwarnings("ignore:Sparse|ComplexHalf")
@pytest.mark.parametrize("kind", LEFT_OUT)
def test_a_buffer_that_numpy_does_not_have(kind):
    """It is carried by no port, and no matter to one that leaves it out."""
    model, optimizer = linear_run()
    expected = from_torch(model, optimizer, dict)
    model.register_buffer("z", LEFT_OUT[kind]())

    def without(weights):
        return {name: w for name, w in weights.items() if name != "z"}

    run = from_torch(model, optimizer, without)
    to_torch(run.params, run.opt_state, model, optimizer, without)
    saved = model.state_dict(), optimizer.state_dict()
    loaded = from_torch_checkpoint(*saved, without, ["weight", "bias"])
    for other in (run, loaded):
        jax.tree.map(np.testing.assert_array_equal, other.params, expected.params)
    with pytest.raises(TypeError, match=r"`z` must .*; "):
        from_torch(model, optimizer, dict)


def test_a_parameter_without_values():
    model = torch.nn.Linear(3, 2, device="meta")
    with pytest.raises(
        TypeError, match="must have its values, got one on the meta dev"
    ):
        from_torch(model, torch.optim.RMSprop(model.parameters()), dict)


def test_a_state_dict_with_extra_state():
    class WithExtraState(torch.nn.Linear):
        def get_extra_state(self):
            return {"any": "thing"}

    model = torch.nn.Sequential(WithExtraState(3, 2))
    optimizer = torch.optim.RMSprop(model.parameters())
    saved = model.state_dict(), optimizer.state_dict()
    run = from_torch_checkpoint(*saved, dict, ["0.weight", "0.bias"])
    assert run.params.keys() == {"0.weight", "0.bias"}
