"""Checkpoints of torch, Lightning, timm and others are recognised, and go on."""

import argparse
import collections
import io
import itertools
import json
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
import torch

from helpers import update_in_torch
from optax_rmsprop.carry import from_torch, from_torch_checkpoint, names_of, port_of
from optax_rmsprop.carry._torch._checkpoints import recognise, wrapped_optimizer
from optax_rmsprop.carry._torch._names import _only_assignment
from peers.record_checkpoints import MORE_STEPS, gradient

RECORDED = Path(__file__).parent.parent / "peers" / "recorded"
ENDS = json.loads((RECORDED / "checkpoints.json").read_text())["ends"]
# For parameters near 1, after five steps in float64; observed: 5e-16.
TOLERANCE = 1e-10
KINDS = {
    "torch.pt": "a torch checkpoint",
    "distributed.pt": "a torch.distributed checkpoint",
    "fsdp.pt": "a torch checkpoint",
    "lightning.ckpt": "a Lightning checkpoint",
    "transformers.pt": "files of HF Trainer",
    "accelerate.pt": "files of accelerate",
    "timm.pth.tar": "a timm checkpoint, without its state_dict_ema",
    "a2c.zip": "a Stable-Baselines3 zip",
    "dqn.zip": "a Stable-Baselines3 zip",
}


# Their programs chose the order of the parameters.
LAYERS_3 = [f"{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")]
CHOSEN = {
    "torch.pt": LAYERS_3,
    "lightning.ckpt": [f"net.{name}" for name in LAYERS_3],
    "accelerate.pt": ["0.weight", "2.weight", "0.bias", "1.weight", "1.bias", "2.bias"],
}


def load(file):
    path = RECORDED / "checkpoints" / file
    if not file.endswith(".zip"):
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's arguments
            return torch.load(path, weights_only=True)
    with zipfile.ZipFile(path) as members:
        return {
            name: torch.load(io.BytesIO(members.read(name)), weights_only=True)
            for name in members.namelist()
        }


def finished(file, saved, names=None):
    """The parameters of a carried run after more steps."""

    def port(weights):
        return {name: weights[name] for name in ENDS[file]}

    run = from_torch_checkpoint(saved, port=port, names=names)
    params, state = run.params, run.opt_state
    for step in range(MORE_STEPS):
        grads = {n: jnp.asarray(gradient(n, p.shape, step)) for n, p in params.items()}
        updates, state = run.tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def distance(file, params):
    return max(np.abs(p - np.array(ENDS[file][n])).max() for n, p in params.items())


@pytest.mark.parametrize("file", KINDS)
def test_a_checkpoint_goes_on(file, x64, caplog):
    with caplog.at_level("INFO", "optax_rmsprop"):
        params = finished(file, load(file), CHOSEN.get(file))
    assert caplog.messages == [f"the checkpoint is read as {KINDS[file]}"]
    assert distance(file, params) < TOLERANCE


def test_names_in_another_order_end_elsewhere(x64):
    saved = load("torch.pt")
    names = list(ENDS["torch.pt"])
    a, b = (names.index(name) for name in ("1.weight", "1.bias"))
    names[a], names[b] = names[b], names[a]
    assert distance("torch.pt", finished("torch.pt", saved, names)) > 1e-4


def tensors(**shapes):
    return {k: torch.ones(s) for k, s in shapes.items()}


def of_shapes(*groups, **options):
    """The state_dict of an optimizer, with slots of these shapes."""
    numbers = itertools.count()
    state, param_groups = {}, []
    for group in groups:
        own = {next(numbers): shape for shape in group}
        state |= {
            n: {"step": 1, "square_avg": torch.ones(shape)}
            for n, shape in own.items()
            if shape is not None
        }
        param_groups.append({"params": list(own), **options})
    return {"state": state, "param_groups": param_groups}


W, B, X = (3, 3), (3,), (5,)
LINEAR = tensors(weight=(2, 3), bias=(2,))
LAYERS = {f"{n}.{k}": torch.ones(s) for n in "ab" for k, s in (("w", W), ("b", B))}
TIED = LAYERS | {"c.w": LAYERS["a.w"]}
NAMES = {
    "one order": (LAYERS, [[W, B, W, B]], ["a.w", "a.b", "b.w", "b.b"]),
    "two groups": (LAYERS, [[B, B], [W, W]], ["a.b", "b.b", "a.w", "b.w"]),
    "a frozen layer": (LAYERS, [[W, B]], None),
    "frozen biases": (LAYERS, [[W, W]], ["a.w", "b.w"]),
    "a group a layer, in an unknown order": (LAYERS, [[W, B], [W, B]], None),
    "another order": (LAYERS, [[B, W, W, B]], None),
    "too many": (LAYERS, [[W, B, W, B, B]], None),
    "too few in the model": ({"a": torch.ones(X)}, [[X, X]], None),
    "a tied one": (TIED, [[W, B, W, B]], ["a.w", "a.b", "b.w", "b.b"]),
    "shapes that occur once": (LINEAR, [[(2,), (2, 3)]], ["bias", "weight"]),
    "no state yet": (LAYERS, [[None] * 4], ["a.w", "a.b", "b.w", "b.b"]),
    "no state yet, and a frozen one": (LAYERS, [[None] * 3], None),
    "a state here and there": (LAYERS, [[None, B, W, None]], [*LAYERS]),
    # As safetensors orders them. Three of five shapes occur once.
    "sorted": (dict(sorted(LAYERS.items())), [[B, W, B, W]], None),
    "sorted, each shape once": (dict(sorted(LINEAR.items())), [[(2, 3)]], ["weight"]),
    "sorted within a dtype": (
        {"b": torch.ones(3), "a": torch.ones(3, dtype=torch.float64)},
        [[B, B]],
        None,
    ),
    "a batch norm": (
        LAYERS | {"b.running_var": torch.ones(3), "steps": torch.tensor(0)},
        [[W, B, W, B]],
        ["a.w", "a.b", "b.w", "b.b"],
    ),
    "an unknown buffer of another shape": (
        {"buffer": torch.ones(X), **LAYERS},
        [[W, B, W, B]],
        ["a.w", "a.b", "b.w", "b.b"],
    ),
    "an unknown buffer of the same shape": (
        {"w.mean": torch.ones(W), **LAYERS},
        [[W, B, W, B]],
        None,
    ),
}


@pytest.mark.parametrize(("model", "groups", "names"), NAMES.values(), ids=NAMES)
def test_names_are_given_only_if_there_is_one_order(model, groups, names):
    optimizer = of_shapes(*groups)
    saved = recognise({"policy.pth": model, "policy.optimizer.pth": optimizer})
    assert saved.names == names


@pytest.mark.parametrize("named", [LAYERS, LINEAR], ids=["alike", "each shape once"])
def test_a_program_may_give_its_parameters_in_any_order(named):
    shapes = [tuple(tensor.shape) for tensor in named.values()]
    saved = recognise({"model": named, "optimizer": of_shapes(shapes)})
    assert saved.names == (list(named) if named is LINEAR else None)


def by_trying_all(shapes, wanted):
    """The assignments of names to groups, or to none, that fill all groups in order."""
    found = []
    for chosen in itertools.product((None, *range(len(wanted))), repeat=len(shapes)):
        groups = [
            [name for name, group in zip(shapes, chosen, strict=True) if group == g]
            for g in range(len(wanted))
        ]
        lengths = [len(group) for group in groups]
        if lengths == [len(w) for w in wanted] and all(
            shape in (None, shapes[name])
            for group, w in zip(groups, wanted, strict=True)
            for name, shape in zip(group, w, strict=True)
        ):
            found.append(list(itertools.chain.from_iterable(groups)))
    return found


def test_the_search_finds_what_trying_all_finds():
    rng = np.random.default_rng(0)
    counts = collections.Counter()
    for _ in range(300):
        shapes = {str(i): tuple(rng.integers(1, 4, 1)) for i in range(rng.integers(6))}
        some = [s for s in shapes.values() if rng.random() < 0.8]
        wanted = [[], []]
        for shape in [None if rng.random() < 0.1 else s for s in some]:
            wanted[rng.integers(2)].append(shape)
        found = by_trying_all(shapes, wanted)
        names = _only_assignment(shapes, wanted, lambda name, shape, group: True)
        assert names == (found[0] if len(found) == 1 else None)
        counts[min(len(found), 2)] += 1
    assert min(counts[1], counts[2]) > 50


def test_too_many_orders_are_not_searched():
    model = {f"{i}": torch.ones(()) for i in reversed(range(1000))}
    optimizer = of_shapes(*[[()] * 200 for _ in range(4)])
    saved = {"policy.pth": model, "policy.optimizer.pth": optimizer}
    assert recognise(saved).names is None


RULES = {
    # HF Trainer: all but biases may have decay, the first group.
    "files of HF Trainer": (
        lambda model, optimizer: {"model.bin": model, "optimizer.pt": optimizer},
        tensors(weight=W, norm=B, bias=B),
        [[W, B], [B]],
        ["weight", "norm", "bias"],
    ),
    # timm: what is no bias may have decay, the second group.
    "a timm checkpoint": (
        lambda model, optimizer: {
            "state_dict": model,
            "optimizer": optimizer,
            "arch": "small",
            "version": 2,
        },
        {"a.weight": torch.ones(W), "a.bias": torch.ones(W)},
        [[W], [W]],
        ["a.bias", "a.weight"],
    ),
    # Stable-Baselines3: an optimizer has the parameters of what it belongs to.
    "a Stable-Baselines3 zip": (
        lambda model, optimizer: {
            "policy.pth": model,
            "actor.optimizer.pth": optimizer,
            "pytorch_variables.pth": tensors(log_ent_coef=(1,)),
        },
        {"actor.b": torch.ones(B), "critic.b": torch.ones(B)},
        [[B]],
        ["actor.b"],
    ),
}


@pytest.mark.parametrize("kind", RULES)
def test_the_rule_of_a_kind_decides(kind):
    saved_as, model, groups, names = RULES[kind]
    optimizer = of_shapes(*groups)
    saved = recognise(saved_as(model, optimizer))
    assert (saved.kind, saved.names) == (kind, names)
    assert recognise({"model": model, "optimizer": optimizer}).names is None


def test_names_of_the_checkpoint_itself_lose_their_wrappers():
    """torch has them in param_names, FSDP in params."""
    model = {f"module.{name}": tensor for name, tensor in LINEAR.items()}
    optimizer = of_shapes([(2,), (2, 3)], lr=0.1)
    names = ["module.bias", "module._orig_mod.weight"]
    optimizer["param_groups"][0]["param_names"] = names
    saved = recognise({"inner": {"model": model, "optimizers": [optimizer]}})
    assert list(saved.model) == ["weight", "bias"]
    assert saved.names is None
    assert saved.optimizer["param_groups"][0]["param_names"] == ["bias", "weight"]
    optimizer = {
        "state": dict(zip(names, optimizer["state"].values(), strict=True)),
        "param_groups": [{"params": names, "lr": 0.1}],
    }
    saved = recognise({"model": model, "optimizer": optimizer})
    assert saved.optimizer["param_groups"] == [
        {"params": ["bias", "weight"], "lr": 0.1}
    ]
    assert list(saved.optimizer["state"]) == ["bias", "weight"]


def flattened(**rates):
    """As torch.distributed.checkpoint flattens; each parameter with its own rate."""
    options = {f"param_groups.{name}.lr": rate for name, rate in rates.items()}
    steps = {f"state.{name}.step": torch.tensor(3.0) for name in rates}
    return options | steps


def test_parameters_of_equal_options_are_a_group():
    close = torch.tensor([0.1, 0.1 + 1e-7], dtype=torch.float64)
    flat = flattened(**{"a.w": close[0], "a.b": close[1], "b.w": 0.1, "b.b": 0.5})
    saved = recognise({"a": LAYERS, "b": flat})
    groups = saved.optimizer["param_groups"]
    assert [g["params"] for g in groups] == [["a.w", "b.w"], ["a.b"], ["b.b"]]
    assert saved.optimizer["state"]["a.b"] == {"step": 3}


def test_a_checkpoint_may_contain_itself():
    saved = {"model": LINEAR, "optimizer": flattened(weight=0.1, bias=0.1)}
    saved["history"] = [saved, {"best": saved["model"], "all": saved}]
    assert recognise(saved).model.keys() == {"weight", "bias"}
    saved["best"] = dict(LINEAR)  # which of the two the optimizer trains is not said
    with pytest.raises(ValueError, match=r"one model, got 2: .*\['best'\];"):
        recognise(saved)


SHAPES = of_shapes([(2, 3), (2,)])
BAD = {
    "no dict": ([LINEAR], TypeError, "`model` must be a checkpoint, .* got a list;"),
    "a model alone": (
        LINEAR,
        ValueError,
        "`optimizer` must be given .* got None; give",
    ),
    "nothing": ({}, ValueError, "one model, got none in an empty dict; add"),
    "no model": ({"opt": SHAPES}, ValueError, "one model, got none in opt; add"),
    "no optimizer": (
        {"net": LINEAR, "random": {"torch": torch.arange(3)}},
        ValueError,
        "one optimizer, got none in net, random; add",
    ),
    "two models": (
        {"g": LINEAR, "d": dict(LINEAR), "opt": SHAPES},
        ValueError,
        r"one model, got 2: \['g'\], \['d'\]; .* \{\"model\": saved\['g'\], .*'opt'",
    ),
    "two optimizers of Lightning": (
        {
            "pytorch-lightning_version": "2.5",
            "state_dict": LINEAR,
            "optimizer_states": [SHAPES, dict(SHAPES)],
            "callbacks": {"average": LINEAR},
        },
        ValueError,
        r"one optimizer, got 2: .*; give .* saved\['optimizer_states'\]\[0\]\}",
    ),
    "weights of Lightning alone": (
        {"pytorch-lightning_version": "2.5", "state_dict": LINEAR},
        ValueError,
        "one optimizer, got none in pytorch-lightning_version, state_dict; add",
    ),
    "names that only wrappers tell apart": (
        {"a": {"module.a": torch.ones(2), "a": torch.ones(2)}, "b": SHAPES},
        ValueError,
        "`model` must have names that differ .* got module.a and a; rename",
    ),
    "the same in the optimizer": (
        {
            "a": LINEAR,
            "b": {"state": {}, "param_groups": [{"params": ["module.a.b", "a.b"]}]},
        },
        ValueError,
        "`optimizer` must have names that differ .* got module.a.b and a.b; rename",
    ),
    "a flattened one with a frozen parameter": (
        {"a": LAYERS, "b": flattened(**{"a.w": 0.1}) | {"param_groups.b.w.lr": 0.1}},
        ValueError,
        r"all parameters of equal options.* got none for b.w; .*param_groups.b.w.\*",
    ),
    "groups that are none": (
        {"a": LINEAR, "b": {"state": {}, "param_groups": []}},
        ValueError,
        "`optimizer` must have a list of param_groups",
    ),
}


@pytest.mark.parametrize(("saved", "error", "text"), BAD.values(), ids=BAD)
def test_another_checkpoint(saved, error, text):
    with pytest.raises(error, match=text):
        recognise(saved)


def test_names_of_a_live_optimizer():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model[1].requires_grad_(False)
    # As torch.compile and DistributedDataParallel name what they wrap.
    compiled = torch.nn.ModuleDict({"_orig_mod": model})
    wrapped = torch.nn.ModuleDict({"module": compiled})
    groups = [
        {"params": [model[1].bias]},
        {"params": list(model[0].parameters())[::-1]},
    ]
    optimizer = torch.optim.RMSprop(groups)
    assert names_of(model, optimizer) == ["1.bias", "0.bias", "0.weight"]
    assert names_of(wrapped, optimizer) == ["1.bias", "0.bias", "0.weight"]


def test_names_of_go_with_a_checkpoint():
    """Where the orders that are possible are many."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    optimizer = torch.optim.RMSprop([*model[1].parameters(), *model[0].parameters()])
    update_in_torch(model, optimizer, torch.randn_like)
    saved = {"a": model.state_dict(), "b": optimizer.state_dict()}
    run = from_torch_checkpoint(saved, port=dict, names=names_of(model, optimizer))
    for name, parameter in model.named_parameters():
        expected = optimizer.state[parameter]["square_avg"]
        np.testing.assert_array_equal(run.opt_state[0].nu[name], expected)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            lambda m, o: (LINEAR, o),
            TypeError,
            "`model` must be a torch.nn.Module, got a d",
        ),
        (
            lambda m, o: (m, None),
            TypeError,
            "`optimizer` must have a list of param_groups",
        ),
        (lambda m, o: (m[:1], o), ValueError, r"lacks one of shape \(4, 2\); give"),
    ],
)
def test_names_of_another_kind(change, error, text):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    with pytest.raises(error, match=text):
        names_of(*change(model, torch.optim.RMSprop(model.parameters())))


class Wrapper:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_a_wrapped_optimizer():
    inner = torch.optim.RMSprop(torch.nn.Linear(3, 2).parameters())
    zero = {"optim": inner, "consolidate_state_dict": None}
    given = {
        name: wrapped_optimizer(Wrapper(**{name: inner})) for name in ("optim", "base")
    }
    assert given["optim"] == "give the RMSprop in its `.optim`"
    assert given["base"] == "give the RMSprop in its `.base`"
    assert "of one process; of several, call" in wrapped_optimizer(Wrapper(**zero))
    assert wrapped_optimizer(inner) == wrapped_optimizer(None) == ""


def test_a_port_of_a_wrapped_model_names_the_remedy():
    model = torch.nn.DataParallel(torch.nn.Linear(3, 2))
    optimizer = torch.optim.RMSprop(model.parameters())
    update_in_torch(model, optimizer, torch.ones_like)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    port = port_of(model.module)
    assert from_torch_checkpoint(saved, port=port).params["kernel"].shape == (3, 2)
    with pytest.raises(
        KeyError, match=r"module\.weight.*within its wrapper \(model.mod"
    ):
        from_torch_checkpoint(saved, port=port_of(model))


def test_remedies():
    """For a wrapped optimizer, a list, an extra state, a missing module, a wrapper."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.RMSprop(model.parameters())
    wrapper = Wrapper(optimizer=optimizer)
    with pytest.raises(
        TypeError, match=r"got a Wrapper, .*; give the RMSprop in its `\.opt"
    ):
        from_torch(model, wrapper, dict)
    with pytest.raises(TypeError, match="got a list; give the optimizer itself"):
        from_torch(model, [optimizer], dict)
    with pytest.raises(TypeError, match="got a list; give one of its items"):
        from_torch_checkpoint(model.state_dict(), [optimizer.state_dict()], dict)
    with pytest.raises(
        KeyError, match=r"_extra_state'.* it is no tensor: take it from"
    ):
        from_torch(model, optimizer, lambda weights: weights["_extra_state"])
    with pytest.raises(KeyError, match=r"head.weight'.* let the port leave it out, or"):
        from_torch(model, optimizer, lambda weights: weights["head.weight"])
    wrapped = torch.nn.ModuleDict({"module": model}).state_dict()
    with pytest.raises(ValueError, match=r"got weight; .* removes 'module.' and"):
        from_torch_checkpoint(wrapped, optimizer.state_dict(), dict, ["weight", "bias"])


class Distributed(torch.Tensor):
    """As a DTensor, which needs a process group."""

    def full_tensor(self):
        return self


def test_a_distributed_tensor_is_refused():
    model = torch.nn.Linear(3, 2)
    model.weight = torch.nn.Parameter(model.weight.detach().as_subclass(Distributed))
    optimizer = torch.optim.RMSprop(model.parameters())
    with pytest.raises(TypeError, match=r"`weight` must have all its .* got a DTensor"):
        from_torch(model, optimizer, dict)
