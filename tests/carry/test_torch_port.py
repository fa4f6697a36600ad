"""A run carried from torch to JAX and back goes on as if it had stayed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import update_in_torch
from optax_rmsprop import from_torch, to_torch
from optax_rmsprop.carry._back import SourceArrays
from optax_rmsprop.carry._port import ProbedPort, _joined
from optax_rmsprop.carry._torch._read import read

STEPS = 10
# Relative to the largest value of an array. Observed: 4e-16 and 4e-7.
TOLERANCE = {"float64": 1e-10, "float32": 2e-4}
HIDDEN = 3


class Model(torch.nn.Module):
    """Every kind of layer whose layout differs, a scalar, tied and frozen weights."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 4)
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.norm = torch.nn.BatchNorm2d(2)
        self.lstm = torch.nn.LSTM(4, HIDDEN, batch_first=True)
        self.frozen = torch.nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)
        self.head = torch.nn.Linear(HIDDEN, 4)
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.tied = self.head


def port(weights):
    def dense(name):
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def gates(name):
        return dict(zip("ifgo", np.split(weights[f"lstm.{name}_l0"], 4), strict=True))

    return {
        "embedding": weights["embedding.weight"],
        "conv": weights["conv.weight"].transpose(2, 3, 1, 0),
        "conv_bias": weights["conv.bias"],
        "norm": {"scale": weights["norm.weight"], "bias": weights["norm.bias"]},
        "lstm": {
            "input": jax.tree.map(np.transpose, gates("weight_ih")),
            "hidden": jax.tree.map(np.transpose, gates("weight_hh")),
            "biases": np.stack(
                [weights["lstm.bias_ih_l0"], weights["lstm.bias_hh_l0"]]
            ),
        },
        "frozen": dense("frozen"),
        "head": dense("head"),
        "scale": weights["scale"],
        "statistics": weights["norm.running_mean"],
    }


def torch_run(dtype, **options):
    """A model and an optimizer with three groups."""
    torch.manual_seed(0)
    model = Model().to(getattr(torch, dtype))
    head = [*model.head.parameters(), model.scale]
    recurrent = list(model.lstm.parameters())
    rest = [
        p for m in (model.embedding, model.conv, model.norm) for p in m.parameters()
    ]
    groups = [
        {"params": rest},
        {"params": recurrent, "lr": 3e-3, "alpha": 0.95, "eps": 1e-3},
        {"params": head, "weight_decay": 0.1, "maximize": True},
    ]
    return model, torch.optim.RMSprop(groups, lr=1e-2, alpha=0.9, eps=1e-2, **options)


def gradients_of(model, steps, seed):
    """By name; the same in torch and, through the port, in JAX."""
    rng = np.random.default_rng(seed)
    return [
        {
            name: rng.normal(size=tuple(p.shape)).astype(str(p.dtype).split(".")[1])
            for name, p in model.named_parameters()
        }
        for _ in range(steps)
    ]


def train_in_torch(model, optimizer, gradients):
    for of_names in gradients:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = torch.tensor(of_names[name])
        optimizer.step()


def train_in_jax(run, model, gradients):
    params, state = run.params, run.opt_state
    buffers = {name: np.zeros(b.shape) for name, b in model.named_buffers()}
    update = jax.jit(run.tx.update)
    for of_names in gradients:
        g = jax.tree.map(
            lambda x, p: jnp.asarray(x, p.dtype), port(of_names | buffers), params
        )
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def everything(model, optimizer):
    """Parameters, buffers and every slot, by name."""
    found = {name: t.numpy().copy() for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {slot}"] = value.numpy().copy()
    return found


def largest_difference(actual, expected):
    assert actual.keys() == expected.keys()
    return max(
        np.max(np.abs(actual[key] - value)) / max(np.max(np.abs(value)), 1e-3)
        for key, value in expected.items()
    )


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield request.param
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize(("momentum", "centered"), [(0.0, False), (0.9, True)])
def test_there_and_back_equals_staying(dtype, momentum, centered):
    options = {"momentum": momentum, "centered": centered}
    model, optimizer = torch_run(dtype, **options)
    gradients = gradients_of(model, 3 * STEPS, seed=1)
    train_in_torch(model, optimizer, gradients)
    expected = everything(model, optimizer)

    model, optimizer = torch_run(dtype, **options)
    train_in_torch(model, optimizer, gradients[:STEPS])
    run = from_torch(model, optimizer, port)
    carried = train_in_jax(run, model, gradients[STEPS : 2 * STEPS])
    with torch.no_grad():  # what is written back must not be there already
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    to_torch(*carried, model, optimizer, port)
    train_in_torch(model, optimizer, gradients[2 * STEPS :])
    actual = everything(model, optimizer)
    assert largest_difference(actual, expected) <= TOLERANCE[dtype]


def zeroed(state, slot):
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if slot in jax.tree_util.keystr(path) else x, state
    )


@pytest.mark.parametrize("slot", ["mu", "var", "trace"])
def test_a_lost_slot_shows(slot):
    model, optimizer = torch_run("float32", momentum=0.9, centered=True)
    gradients = gradients_of(model, 2 * STEPS, seed=1)
    train_in_torch(model, optimizer, gradients[:STEPS])
    run = from_torch(model, optimizer, port)
    expected, _ = train_in_jax(run, model, gradients[STEPS:])
    run = run._replace(opt_state=zeroed(run.opt_state, slot))
    lost, _ = train_in_jax(run, model, gradients[STEPS:])
    difference = np.max(np.abs(lost["embedding"] - expected["embedding"]))
    assert difference > 10 * TOLERANCE["float32"]


def linear_port(weights):
    return {"kernel": weights["weight"].T, "bias": weights["bias"]}


def linear_run(steps=3, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.RMSprop(model.parameters(), **options)
    train_in_torch(model, optimizer, gradients_of(model, steps, seed=0))
    return model, optimizer


@pytest.mark.parametrize(
    ("of_weight", "of_bias", "says"),
    [
        ("float64", "float64", "of `weight`, float64, got float32; 64 bits need"),
        ("float32", "float16", "of `bias`, float16, got float32"),
    ],
)
def test_a_dtype_that_a_leaf_cannot_keep(of_weight, of_bias, says):
    model = torch.nn.Linear(3, 2)
    model.weight.data = model.weight.data.to(getattr(torch, of_weight))
    model.bias.data = model.bias.data.to(getattr(torch, of_bias))
    optimizer = torch.optim.RMSprop(model.parameters())

    def in_one_leaf(weights):
        return np.concatenate([np.ravel(w) for w in weights.values()])

    with pytest.raises(ValueError, match=f"must keep the dtype {says}"):
        from_torch(model, optimizer, in_one_leaf)


def test_one_group_is_a_plain_rmsprop():
    run = from_torch(*linear_run(steps=3, momentum=0.9), linear_port)
    average, trace, _ = run.opt_state
    assert average.count == 3
    assert average.nu["kernel"].shape == trace.trace["kernel"].shape == (3, 2)


def test_an_optimizer_that_has_not_stepped():
    model, optimizer = linear_run(steps=0, momentum=0.9)
    run = from_torch(model, optimizer, linear_port)
    assert run.opt_state[0].count == 0
    to_torch(run.params, run.opt_state, model, optimizer, linear_port)
    assert not optimizer.state


def test_an_empty_parameter():
    model, _ = linear_run()
    model.empty = torch.nn.Parameter(torch.zeros(0, 3))
    optimizer = torch.optim.RMSprop(model.parameters(), momentum=0.9)
    train_in_torch(model, optimizer, gradients_of(model, 2, seed=0))

    def port(weights):
        return linear_port(weights) | {"empty": weights["empty"].T}

    run = from_torch(model, optimizer, port)
    assert run.opt_state[0].nu["empty"].shape == (3, 0)
    before = everything(model, optimizer)
    to_torch(run.params, run.opt_state, model, optimizer, port)
    assert everything(model, optimizer).keys() == before.keys()


def test_what_is_carried_is_a_copy():
    model, optimizer = linear_run()
    run = from_torch(model, optimizer, linear_port)
    before = np.array(run.params["bias"])
    with torch.no_grad():
        model.bias.add_(1)
    np.testing.assert_array_equal(run.params["bias"], before)


@pytest.mark.parametrize(
    "rate", [0.5, [0.5], lambda count: jnp.float32(0.5)], ids=["number", "list", "f"]
)
def test_another_learning_rate(rate):
    run = from_torch(*linear_run(), linear_port, learning_rate=rate)
    usual = from_torch(*linear_run(), linear_port)  # torch's default, 0.01
    g = jax.tree.map(jnp.ones_like, run.params)
    updates, _ = run.tx.update(g, run.opt_state, run.params)
    slow, _ = usual.tx.update(g, usual.opt_state, usual.params)
    np.testing.assert_allclose(updates["bias"], 50 * slow["bias"], rtol=1e-5)


def test_a_schedule_goes_on_with_torchs_steps():
    rates = jnp.array([9.0, 9.0, 9.0, 0.0, 9.0])
    run = from_torch(*linear_run(steps=3), linear_port, rates.__getitem__)
    g = jax.tree.map(jnp.ones_like, run.params)
    updates, _ = run.tx.update(g, run.opt_state, run.params)
    assert not jax.tree.leaves(updates)[0].any()


def test_a_group_added_later_counts_its_own_steps():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.RMSprop(model[0].parameters())
    train_in_torch(model, optimizer, gradients_of(model, 2, seed=0))
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.5})
    run = from_torch(model, optimizer, lambda weights: weights)
    inner = run.opt_state.inner_states
    assert inner["0"].inner_state[0].count == 2
    assert inner["1"].inner_state[0].count == 0
    g = jax.tree.map(jnp.ones_like, run.params)
    updates, _ = run.tx.update(g, run.opt_state, run.params)
    np.testing.assert_allclose(updates["1.bias"], -0.5 / np.sqrt(0.01), rtol=1e-5)


def test_what_has_no_gradient_stays_put():
    model, _ = linear_run()
    optimizer = torch.optim.RMSprop(model.parameters(), weight_decay=0.1)
    model.weight.grad, model.bias.grad = torch.ones(2, 3), None
    optimizer.step()
    with pytest.warns(RuntimeWarning, match="do not train") as record:
        run = from_torch(model, optimizer, linear_port)
    assert record[0].filename == __file__
    g = jax.tree.map(jnp.ones_like, run.params)
    updates, _ = run.tx.update(g, run.opt_state, run.params)
    assert not updates["bias"].any()
    assert updates["kernel"].all()


def narrow_run(dtype):
    model = torch.nn.Linear(3, 2, dtype=dtype)
    optimizer = torch.optim.RMSprop(model.parameters())
    update_in_torch(model, optimizer, torch.ones_like)
    return model, optimizer


def test_bfloat16():
    model, optimizer = narrow_run(torch.bfloat16)
    weight = model.weight.detach().clone()
    average = optimizer.state[model.weight]["square_avg"].clone()
    run = from_torch(model, optimizer, linear_port)
    assert run.params["kernel"].dtype == jnp.bfloat16
    assert run.opt_state[0].nu["kernel"].dtype == jnp.float32
    to_torch(run.params, run.opt_state, model, optimizer, linear_port)
    assert torch.equal(model.weight, weight)
    assert torch.equal(optimizer.state[model.weight]["square_avg"], average)


def moved(change):
    return lambda w: {"w": change(w["weight"]), "b": w["bias"]}


BAD_PORTS = {
    "takes magnitudes": (moved(np.abs), r"only move values, but \['w'\] has others"),
    "rounds": (moved(np.round), "only move values"),
    "sorts": (lambda w: {"b": w["bias"], "w": np.sort(w["weight"])}, "only move"),
    "adds a little": (moved(lambda x: x + np.float32(1e-8)), "only move values"),
    "adds a place": (
        lambda w: {"w": w["weight"][1:], "b": w["bias"], "z": np.ones(3, np.float32)},
        r"only move values, but \['z'\]",
    ),
    "adds a number": (
        lambda w: linear_port(w) | {"step": 5},
        r"\['step'\] must be made of the model's arrays .* got int64",
    ),
    "scales": (lambda w: {"w": 2 * w["weight"], "b": w["bias"]}, "only move values"),
    "overflows": (
        lambda w: {"w": w["weight"] * np.inf, "b": w["bias"]},
        r"only move values, but \['w'\] has others",
    ),
    "adds": (
        lambda w: linear_port(w) | {"z": np.zeros(2, np.float32)},
        r"only move .*\['z'\]",
    ),
    "repeats": (lambda w: linear_port(w) | {"b": w["bias"]}, "bias twice; leave out"),
    "drops": (lambda w: {"w": w["weight"]}, "drops some of bias; keep them in its"),
    "drops a part": (
        lambda w: {"w": w["weight"][:1], "b": w["bias"]},
        "drops some of weight",
    ),
    "casts": (
        lambda w: jax.tree.map(lambda x: x.astype(np.float16), linear_port(w)),
        r"\['b(ias)?'\] must be .* got float16 of float32; do not cast",
    ),
}


@pytest.mark.parametrize(("bad", "text"), BAD_PORTS.values(), ids=BAD_PORTS)
def test_a_port_that_does_more_than_move(bad, text):
    with pytest.raises(ValueError, match=text):
        from_torch(*linear_run(), bad)


def test_a_leaf_of_two_groups():
    model = torch.nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    optimizer = torch.optim.RMSprop(groups)
    text = r"\['all'\] must come from one parameter group, got `weight` \(0\), `bias`"
    with pytest.raises(ValueError, match=text):
        from_torch(
            model,
            optimizer,
            lambda w: {"all": np.concatenate([w["weight"], w["bias"][None]])},
        )


def test_both_names_of_tied_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    optimizer = torch.optim.RMSprop(model.parameters())
    with pytest.raises(ValueError, match=r"uses some of 0\.weight twice"):
        from_torch(model, optimizer, lambda weights: weights)

    def once(weights):
        return {name: w for name, w in weights.items() if name != "1.weight"}

    assert from_torch(model, optimizer, once).params.keys() == {
        "0.weight",
        "0.bias",
        "1.bias",
    }


def test_another_optimizer():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(
        TypeError, match=r"must be a torch\.optim\.RMSprop, .*, got an Adam"
    ):
        from_torch(model, torch.optim.Adam(model.parameters()), linear_port)


def test_a_model_without_the_parameters():
    _, optimizer = linear_run()
    with pytest.raises(ValueError, match=r"`model` must have .* of shape \(2, 3\)"):
        from_torch(torch.nn.Linear(3, 2), optimizer, linear_port)


def test_as_many_learning_rates_as_groups():
    with pytest.raises(ValueError, match="one for each of 1 groups, got 2"):
        from_torch(*linear_run(), linear_port, [0.1, 0.2])


def spoiled(run):
    """Arguments of to_torch that are spoiled in one way, and the error's text."""
    bias = {**run.params, "bias": jnp.ones(3)}
    extra = {**run.params, "extra": jnp.ones(3)}
    cast = jax.tree.map(lambda p: p.astype(jnp.float16), run.params)
    other = run.opt_state[1:]
    foreign = jax.tree.map(lambda x: jnp.ones((5, *x.shape)), run.opt_state[0].nu)
    foreign = (run.opt_state[0]._replace(nu=foreign), *run.opt_state[1:])
    fewer = (run.opt_state[0]._replace(nu={"bias": 1.0}), *run.opt_state[1:])
    yield (
        bias,
        run.opt_state,
        r"\['bias'\] of `params` must have the port's shape \(2,\)",
    )
    yield extra, run.opt_state, "`params` must be the port's tree"
    yield cast, run.opt_state, "must keep the dtype of `bias`, float32, got float16"
    yield run.params, other, "must have the averages of torch's options"
    yield run.params, foreign, r"\['bias'\] of `opt_state` must have the port's shape"
    yield run.params, fewer, "`opt_state` must be the port's tree"


@pytest.mark.parametrize("way", range(6))
def test_to_torch_writes_all_or_nothing(way):
    model, optimizer = linear_run()
    params, state, text = list(spoiled(from_torch(model, optimizer, linear_port)))[way]
    train_in_torch(model, optimizer, gradients_of(model, 1, seed=5))
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=text):
        to_torch(params, state, model, optimizer, linear_port)
    assert largest_difference(everything(model, optimizer), before) == 0


def random_port(seed, shapes):
    """One made of renaming, transposing, reshaping, splitting, joining and stacking."""

    def port(weights):
        rng = np.random.default_rng(seed)  # the same moves at every call
        leaves = []
        for name in shapes:
            x = weights[name].transpose(rng.permutation(weights[name].ndim))
            if rng.random() < 0.3:
                x = x.reshape(-1)
            if x.ndim and x.shape[0] > 1 and rng.random() < 0.5:
                leaves += np.split(x, [int(rng.integers(1, x.shape[0]))])
            else:
                leaves.append(x)
        tree = {}
        while leaves:
            x = leaves.pop(int(rng.integers(len(leaves))))
            alike = [i for i, y in enumerate(leaves) if y.shape == x.shape]
            joins = [np.stack, np.concatenate][: 1 + bool(x.ndim)]
            if alike and rng.random() < 0.7:
                x = joins[int(rng.integers(len(joins)))]([x, leaves.pop(alike[0])])
            tree.setdefault(f"layer{rng.integers(3)}", []).append(x)
        return tree

    return port


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(
        st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6
    ),
)
def test_the_way_back_of_any_port_is_exact(seed, shapes):
    shapes = {f"w{i}": shape for i, shape in enumerate(shapes)}
    port = random_port(seed, shapes)
    probed = ProbedPort(port, shapes, shapes)
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    numbers = range(len(probed.paths))
    leaves = [probed.assemble(number, arrays.__getitem__) for number in numbers]
    for leaf, expected in zip(leaves, jax.tree.leaves(port(arrays)), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    back = dict(probed.disassemble(probed.unflatten(leaves)))
    for name, array in arrays.items():
        if array.size:
            np.testing.assert_array_equal(back[name], array)


def test_indices_beyond_the_integers_of_float32():
    shapes = {"big": (2**24 + 3,), "small": (5,)}

    def port(weights):
        return {"all": np.concatenate([weights["small"], weights["big"]])}

    probed = ProbedPort(port, shapes, shapes)
    arrays = {
        "big": np.arange(2**24 + 3, dtype=np.int32),
        "small": np.arange(5, dtype=np.int32),
    }
    back = dict(probed.disassemble(port(arrays)))
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("high", [127, 128, 200])
def test_indices_beyond_the_integers_of_int32(high):
    indices = _joined(np.array([3, -1, 0], np.int32), np.array([high, 1, 0], np.int32))
    assert indices.tolist() == [high * 2**24 + 3, -1, 0]


def test_the_example_of_port_py():
    def port(weights):
        return {"w": np.concatenate([weights["a"].T, weights["b"][:, None]], axis=1)}

    probed = ProbedPort(port, {"a": (2, 3), "b": (3,)}, ["a", "b"])
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.arange(6, 9)}
    leaf = probed.assemble(0, arrays.__getitem__)
    assert leaf.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    back = {name: array.tolist() for name, array in probed.disassemble({"w": leaf})}
    assert back == {"a": [[0, 1, 2], [3, 4, 5]], "b": [6, 7, 8]}


def test_the_example_of_run_py_and_back_py():
    def port(weights):
        return {"kernel": weights["weight"].T}

    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.RMSprop(model.parameters(), momentum=0.9, centered=True)
    with torch.no_grad():
        model.weight[:] = torch.tensor([[5.0, 6.0]])
    slots = {
        "grad_avg": [[1.0, 2.0]],
        "square_avg": [[3.0, 4.0]],
        "momentum_buffer": [[7.0, 8.0]],
    }
    state = {slot: torch.tensor(values) for slot, values in slots.items()}
    optimizer.state[model.weight] = {"step": torch.tensor(3.0), **state}
    run = from_torch(model, optimizer, port)
    assert run.params["kernel"].tolist() == [[5], [6]]
    average, trace, *_ = run.opt_state
    assert average.count == 3
    assert average.mu["kernel"].tolist() == [[1], [2]]
    assert average.var["kernel"].tolist() == [[2], [0]]
    assert trace.trace["kernel"].tolist() == [[7], [8]]
    back = SourceArrays(run.params, run.opt_state, read(model, optimizer), port)
    assert [(name, a.tolist()) for name, a in back.arrays()] == [("weight", [[5, 6]])]
    assert [(*rest, array.tolist()) for *rest, array in back.slots()] == [
        ("weight", 3, slot, values) for slot, values in slots.items()
    ]


def test_half_a_buffer_is_not_brought_back():
    model, optimizer = linear_run()
    model.register_buffer("table", torch.arange(4.0))

    def port(weights):
        return linear_port(weights) | {"half": weights["table"][:2]}

    run = from_torch(model, optimizer, port)
    params = run.params | {"half": jnp.ones(2)}
    to_torch(params, run.opt_state, model, optimizer, port)
    assert torch.equal(model.table, torch.arange(4.0))


def test_a_port_that_works_in_place_changes_nothing_in_torch():
    def port(weights):
        weights["weight"][:] = weights["weight"][::-1].copy()
        return linear_port(weights)

    model, optimizer = linear_run(momentum=0.9)
    before = everything(model, optimizer)
    run = from_torch(model, optimizer, port)
    assert largest_difference(everything(model, optimizer), before) == 0
    reversed_rows = model.weight.detach().numpy()[::-1].T
    np.testing.assert_array_equal(run.params["kernel"], reversed_rows)


MIXED = [
    {"momentum": 0.9, "centered": False},
    {"momentum": 0.0, "centered": True},
    {"momentum": 0.5, "centered": True, "maximize": True},
]


def mixed_run(dtype=None, steps=0, mixed=MIXED):
    """A model whose groups have other slots, and one parameter that comes late."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 3, dtype=dtype) for _ in mixed]
    model = torch.nn.Sequential(*layers)
    groups = [
        {"params": m.parameters(), **o} for m, o in zip(layers, mixed, strict=True)
    ]
    optimizer = torch.optim.RMSprop(groups, lr=1e-2, eps=1e-2)
    train_mixed(model, optimizer, mixed_gradients(model, steps))
    return model, optimizer


def mixed_gradients(model, steps):
    generator = torch.Generator().manual_seed(1)
    gradients = [
        {
            name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for name, p in model.named_parameters()
        }
        for _ in range(steps)
    ]
    for early in gradients[:2]:
        early["0.bias"] = None
    return gradients


def train_mixed(model, optimizer, gradients):
    for of_names in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = of_names[name]
        optimizer.step()


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_groups_with_other_slots(dtype):
    jax.config.update("jax_enable_x64", dtype == "float64")
    kind = getattr(torch, dtype)
    stayed, optimizer = mixed_run(kind)
    gradients = mixed_gradients(stayed, 15)
    train_mixed(stayed, optimizer, gradients)

    model, optimizer = mixed_run(kind)
    train_mixed(model, optimizer, gradients[:5])
    params, tx, state = from_torch(model, optimizer, dict)
    for of_names in gradients[5:10]:
        grads = {name: jnp.asarray(g.numpy()) for name, g in of_names.items()}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    model, optimizer = mixed_run(kind)  # one that has not stepped
    to_torch(params, state, model, optimizer, dict)
    train_mixed(model, optimizer, gradients[10:])
    tolerance = 1e-13 if dtype == "float64" else 2e-6
    for a, b in zip(model.parameters(), stayed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    jax.config.update("jax_enable_x64", False)


def test_a_late_gradient_leaves_the_steps_of_its_group():
    model, optimizer = mixed_run(steps=5)
    assert optimizer.state[model[0].bias]["step"] == 3
    state = from_torch(model, optimizer, dict).opt_state
    assert state.inner_states["0"].inner_state[0].count == 5


def test_a_rate_for_each_group():
    model, optimizer = mixed_run(steps=5)
    once = from_torch(model, optimizer, dict, [1.0, 1.0, 1.0])
    run = from_torch(model, optimizer, dict, [0.0, 2.0, 3.0])
    grads = jax.tree.map(jnp.ones_like, run.params)
    updates, expected = (
        r.tx.update(grads, r.opt_state, r.params)[0] for r in (run, once)
    )
    for name, update in updates.items():
        factor = {"0": 0, "1": 2, "2": 3}[name[0]]
        np.testing.assert_allclose(update, factor * expected[name], rtol=1e-6)


def test_a_variance_that_rounded_below_0_is_0():
    model, optimizer = linear_run(centered=True)
    slots = optimizer.state[model.bias]
    slots["square_avg"].copy_(slots["grad_avg"] ** 2 * (1 - 1e-6))
    run = from_torch(model, optimizer, linear_port)
    assert (run.opt_state[0].var["bias"] == 0).all()
    slots["grad_avg"].fill_(1e25)  # whose square overflows, without a warning
    run = from_torch(model, optimizer, linear_port)
    assert (run.opt_state[0].var["bias"] == 0).all()


def test_buffers_and_frozen_weights_are_brought_back():
    model, optimizer = torch_run("float32")
    train_in_torch(model, optimizer, gradients_of(model, 1, seed=0))
    run = from_torch(model, optimizer, port)
    params = run.params | {"statistics": run.params["statistics"] + 1}
    params["frozen"] = jax.tree.map(lambda p: p + 1, params["frozen"])
    frozen = model.frozen.bias.detach().clone()
    to_torch(params, run.opt_state, model, optimizer, port)
    assert (model.norm.running_mean == 1).all()
    torch.testing.assert_close(model.frozen.bias.detach(), frozen + 1)


def test_a_group_without_leaves_has_any_options():
    model = torch.nn.Linear(3, 2)
    groups = [{"params": model.parameters()}, {"params": [], "centered": True}]
    optimizer = torch.optim.RMSprop(groups)
    train_in_torch(model, optimizer, gradients_of(model, 2, seed=0))
    run = from_torch(model, optimizer, linear_port)
    to_torch(run.params, run.opt_state, model, optimizer, linear_port)
    assert optimizer.state[model.bias]["step"] == 2


def test_no_step_takes_the_state_away():
    run = from_torch(*linear_run(steps=0), linear_port)
    model, optimizer = linear_run(steps=3)
    to_torch(run.params, run.opt_state, model, optimizer, linear_port)
    assert not optimizer.state


def unlike(model):
    """Optimizers whose groups are not those of a run with weight | bias."""
    weight, bias = model.parameters()
    swapped = [{"params": [bias], "weight_decay": 0.1}, {"params": [weight]}]
    yield (
        torch.optim.RMSprop(swapped),
        "have `weight` in group 0, as the run has, got it in group 1",
    )
    yield torch.optim.RMSprop([weight, bias]), "have the optimizer's groups 0, got 0, 1"
    outside = [{"params": [weight]}, {"params": [torch.nn.Parameter(bias.clone())]}]
    yield torch.optim.RMSprop(outside), "`model` must have the optimizer's parameters"


@pytest.mark.parametrize("number", range(3))
def test_an_optimizer_with_other_groups(number):
    model, _ = linear_run()
    weight, bias = model.parameters()
    decaying = {"params": [weight], "weight_decay": 0.1}
    optimizer = torch.optim.RMSprop([decaying, {"params": [bias]}])
    train_in_torch(model, optimizer, gradients_of(model, 2, seed=0))
    run = from_torch(model, optimizer, linear_port)
    other, text = list(unlike(model))[number]
    before = everything(model, other)
    params = jax.tree.map(lambda p: p + 1, run.params)
    with pytest.raises(ValueError, match=text):
        to_torch(params, run.opt_state, model, other, linear_port)
    assert largest_difference(everything(model, other), before) == 0


def broken_states(run):
    nu = run.opt_state[0].nu

    def with_nu(**leaves):
        return (run.opt_state[0]._replace(nu=nu | leaves), *run.opt_state[1:])

    deleted = jnp.ones((3, 2))
    deleted.delete()
    yield with_nu(kernel=deleted), RuntimeError, "deleted"
    whole = with_nu(bias=jnp.ones(2, jnp.int32))
    yield whole, TypeError, r"`opt_state` .*, got int32 at \[0\]\.nu\['bias'\]; give"
    below = with_nu(bias=jnp.array([1.0, -1.0]))
    yield below, ValueError, r"`opt_state` .* a negative one at \[0\]\.nu\['bias'\]; r"
    yield with_nu(bias=jnp.ones(2, jnp.complex64)), ValueError, "got complex64"
    yield None, ValueError, "`opt_state` must be the state of the run's optimizer"


@pytest.mark.parametrize("number", range(5))
def test_a_broken_state_writes_nothing(number):
    model, optimizer = linear_run()
    run = from_torch(model, optimizer, linear_port)
    state, error, text = list(broken_states(run))[number]
    before = everything(model, optimizer)
    params = jax.tree.map(lambda p: p + 1, run.params)
    with pytest.raises(error, match=text):
        to_torch(params, state, model, optimizer, linear_port)
    assert largest_difference(everything(model, optimizer), before) == 0


def test_an_expanded_buffer_writes_nothing():
    model, optimizer = linear_run()
    model.register_buffer("wide", torch.zeros(1).expand(3))
    run = from_torch(model, optimizer, dict)
    before = everything(model, optimizer)
    params = jax.tree.map(lambda p: p + 1, run.params)
    with pytest.raises(ValueError, match="`wide` must have memory of its own for each"):
        to_torch(params, run.opt_state, model, optimizer, dict)
    assert largest_difference(everything(model, optimizer), before) == 0


def test_what_overflows_in_torch_is_reported_before_it_is_written():
    model, optimizer = narrow_run(torch.float16)
    run = from_torch(model, optimizer, linear_port)
    nu = run.opt_state[0].nu | {"bias": jnp.full(2, 9e6)}
    state = (run.opt_state[0]._replace(nu=nu), *run.opt_state[1:])
    says = "infinity: square_avg of `bias`"
    with pytest.warns(RuntimeWarning, match=says) as record:
        to_torch(run.params, state, model, optimizer, linear_port)
    assert record[0].filename == __file__


class WithExtraState(torch.nn.Linear):
    def get_extra_state(self):
        return {"any": "thing"}


def test_extra_state_is_left_alone():
    model = WithExtraState(3, 2)
    optimizer = torch.optim.RMSprop(model.parameters())
    run = from_torch(model, optimizer, linear_port)
    to_torch(run.params, run.opt_state, model, optimizer, linear_port)
