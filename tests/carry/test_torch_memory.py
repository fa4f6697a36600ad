"""Parameters that share their memory in torch are one, or are refused."""

import io

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from helpers import update_in_torch
from optax_rmsprop import from_torch, from_torch_checkpoint, to_torch

NAMES = ["a", "b"]


def shared(view, trained=("a",), steps=1, a=None):
    """A model with `a` and a view on it, two parameters, and its optimizer."""
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3) if a is None else a)
    model.b = torch.nn.Parameter(view(model.a.detach()))
    optimizer = torch.optim.RMSprop([getattr(model, name) for name in trained])
    update_in_torch(model, optimizer, torch.ones_like, steps)
    return model, optimizer


def same(x):
    return x.view(2, 3)


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def live(model, optimizer, port, names):
    return from_torch(model, optimizer, port)


def from_file(model, optimizer, port, names):
    return from_torch_checkpoint(*saved(model, optimizer), port, names)


def only(name):
    return lambda weights: {"w": weights[name]}


BOTH = pytest.mark.parametrize("read", [live, from_file], ids=["live", "file"])


@BOTH
@pytest.mark.parametrize("trained", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_memory_is_one_parameter(read, trained, name):
    """By either name, whichever of the two the optimizer has."""
    model, optimizer = shared(same, [trained])
    run = read(model, optimizer, only(name), [trained])
    assert run.opt_state[0].count == 1
    np.testing.assert_array_equal(run.params["w"], model.a.detach())
    params = {"w": run.params["w"] + 1}
    to_torch(params, run.opt_state, model, optimizer, only(name))
    for parameter in model.parameters():
        np.testing.assert_array_equal(parameter.detach(), params["w"])
    with pytest.raises(ValueError, match=f"uses some of {trained} twice; leave out"):
        read(model, optimizer, dict, [trained])


@BOTH
def test_one_of_the_two_that_has_no_gradient(read):
    """The optimizer has both, but has moved only one."""
    model, optimizer = shared(same, NAMES, steps=0)
    model.b.grad = torch.ones(2, 3)
    optimizer.step()
    run = read(model, optimizer, only("a"), NAMES)
    assert run.opt_state[0].count == 1


@BOTH
@pytest.mark.parametrize("steps", [0, 1])
def test_the_same_memory_trained_twice(read, steps):
    model, optimizer = shared(same, NAMES, steps)
    with pytest.raises(ValueError, match="train a parameter once, but `a`, `b` are"):
        read(model, optimizer, only("a"), NAMES)


OVERLAPS = {
    "flat": lambda x: x.view(6),
    "transposed": lambda x: x.T,
    "a row": lambda x: x[1],
    "a column": lambda x: x[:, 1],
    "other numbers": lambda x: x.view(torch.bfloat16)[:, ::2],
}
READ = {f"{kind}, live": (live, view) for kind, view in OVERLAPS.items()}
del OVERLAPS["other numbers"]  # torch saves no two dtypes of one memory
READ |= {f"{kind}, file": (from_file, view) for kind, view in OVERLAPS.items()}


@pytest.mark.parametrize(("read", "view"), READ.values(), ids=READ)
def test_a_part_of_the_same_memory(read, view):
    model, optimizer = shared(view)
    with pytest.raises(ValueError, match=r"`[ab]` and `[ab]` must be apart in memory"):
        read(model, optimizer, dict, ["a"])
    run = read(model, optimizer, only("a"), ["a"])
    to_torch({"w": run.params["w"] + 1}, run.opt_state, model, optimizer, only("a"))
    expected = view(torch.as_tensor(np.array(run.params["w"] + 1)))
    torch.testing.assert_close(model.b.detach(), expected, rtol=0, atol=0)


@BOTH
def test_neighbours_in_one_memory_are_apart(read):
    """Rows, and columns, which lie between each other, of one array."""
    whole = torch.arange(24.0).reshape(4, 6)
    model = torch.nn.Module()
    parts = {"a": whole[:2, ::2], "b": whole[:2, 1::2], "c": whole[2], "d": whole[3]}
    for name, part in parts.items():
        model.register_parameter(name, torch.nn.Parameter(part))
    optimizer = torch.optim.RMSprop(model.parameters())
    run = read(model, optimizer, dict, list(parts))
    for name, part in parts.items():
        np.testing.assert_array_equal(run.params[name], part)


@BOTH
def test_empty_and_meta_tensors_share_nothing(read):
    model, optimizer = shared(lambda x: x.view(0, 3), NAMES, a=torch.ones(0, 3))
    model.register_buffer("c", torch.ones(2, device="meta"))
    model.register_buffer("d", torch.ones(2, device="meta"))

    def port(weights):
        return {name: weights[name] for name in NAMES}

    assert read(model, optimizer, port, NAMES).params.keys() == {"a", "b"}
