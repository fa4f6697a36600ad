"""A port made from the classes of a live model gives Flax torch's numbers."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")
import torch
from flax import linen, nnx
from torch import nn
from torch.nn.utils import parametrizations, prune

from helpers import random
from optax_rmsprop.carry import from_torch, port_of, torch_layers

TOLERANCE = 1e-10  # of outputs of size 1, in float64; observed: 4e-15
BATCH, TIME = 3, 4

# Flax makes float32 at first.
pytestmark = pytest.mark.usefixtures("x64", "standard_promotion", "same_weights")


def filled(module):
    """The module in float64, with norms that have seen something."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, buffer in module.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 2)
    return module.double().eval()


def carried(model, **options):
    return from_torch(
        model, torch.optim.RMSprop(model.parameters()), port_of(model, **options)
    ).params


def outputs(module, *inputs):
    with torch.no_grad():
        output = module(*map(torch.from_numpy, inputs))
    return (output[0] if isinstance(output, tuple) else output).numpy()


def to_last(x):
    return np.moveaxis(x, 1, -1)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


class HuggingFaceConv1D(nn.Module):
    """As transformers has it."""

    def __init__(self, n_out, n_in):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class NamedLinear(nn.Linear):
    """A subclass that computes what its base does."""


def lazy_linear():
    layer = nn.LazyLinear(5)
    layer(torch.zeros(1, 3))
    return layer


IMAGE = (BATCH, 4, 6, 5)
# A layer of torch, one of Linen, and the shape of the input.
LAYERS = {
    "Linear": (lambda: nn.Linear(3, 5), linen.Dense(5), (BATCH, 3)),
    "no bias": (
        lambda: nn.Linear(3, 5, bias=False),
        linen.Dense(5, use_bias=False),
        (BATCH, 3),
    ),
    "subclass": (lambda: NamedLinear(3, 5), linen.Dense(5), (BATCH, 3)),
    "NonDynamicallyQuantizableLinear": (
        lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(3, 5),
        linen.Dense(5),
        (BATCH, 3),
    ),
    "LazyLinear": (lazy_linear, linen.Dense(5), (BATCH, 3)),
    "Conv1D": (lambda: HuggingFaceConv1D(5, 3), linen.Dense(5), (BATCH, 3)),
    "Conv1d": (
        lambda: nn.Conv1d(4, 8, 3),
        linen.Conv(8, (3,), padding=0),
        (BATCH, 4, 6),
    ),
    "Conv2d": (
        lambda: nn.Conv2d(4, 8, (3, 2), groups=2),
        linen.Conv(8, (3, 2), padding=0, feature_group_count=2),
        IMAGE,
    ),
    "Conv3d": (
        lambda: nn.Conv3d(4, 8, (3, 2, 1)),
        linen.Conv(8, (3, 2, 1), padding=0),
        (BATCH, 4, 6, 5, 3),
    ),
    "ConvTranspose1d": (
        lambda: nn.ConvTranspose1d(4, 8, 3, stride=2),
        linen.ConvTranspose(8, (3,), strides=(2,), padding=[(2, 2)]),
        (BATCH, 4, 6),
    ),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2),
        linen.Conv(8, (3, 3), input_dilation=2, padding=2, feature_group_count=2),
        IMAGE,
    ),
    "ConvTranspose3d": (
        lambda: nn.ConvTranspose3d(4, 8, (3, 2, 1)),
        linen.ConvTranspose(8, (3, 2, 1), padding=[(2, 2), (1, 1), (0, 0)]),
        (BATCH, 4, 6, 5, 3),
    ),
    "LayerNorm": (
        lambda: nn.LayerNorm(5),
        linen.LayerNorm(epsilon=1e-5, use_fast_variance=False),
        (BATCH, 5),
    ),
    "RMSNorm": (
        lambda: nn.RMSNorm(5, eps=1e-5),
        linen.RMSNorm(epsilon=1e-5),
        (BATCH, 5),
    ),
    "GroupNorm": (
        lambda: nn.GroupNorm(2, 4),
        linen.GroupNorm(2, epsilon=1e-5, use_fast_variance=False),
        IMAGE,
    ),
    "InstanceNorm2d": (
        lambda: nn.InstanceNorm2d(4, affine=True),
        linen.InstanceNorm(epsilon=1e-5, use_fast_variance=False),
        IMAGE,
    ),
    "PReLU": (lambda: nn.PReLU(), linen.PReLU(), (BATCH, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name, monkeypatch):
    hugging_face = types.SimpleNamespace(Conv1D=HuggingFaceConv1D)
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", hugging_face)
    make, module, shape = LAYERS[name]
    layer = filled(make())
    params = carried(nn.ModuleDict({"a": layer}))
    x = random(*shape)
    expected = outputs(layer, x)
    wanted = jax.eval_shape(module.init, jax.random.key(0), to_last(x))["params"]
    assert jax.tree.map(jnp.shape, params["a"]) == jax.tree.map(jnp.shape, wanted)
    close(module.apply({"params": params["a"]}, to_last(x)), to_last(expected))
    like = {"params": {"Other_0": wanted}}
    again = carried(nn.ModuleDict({"a": layer}), like=like)
    assert jax.tree.structure(again) == jax.tree.structure(like)
    jax.tree.map(np.testing.assert_array_equal, again["params"]["Other_0"], params["a"])


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings(kind):
    layer = filled(kind(7, 3))
    x = np.array([[0, 6], [2, 2]])
    ours = linen.Embed(7, 3, param_dtype=float).apply({"params": carried(layer)}, x)
    ours = ours.mean(1) if kind is nn.EmbeddingBag else ours
    close(ours, outputs(layer, x))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4)],
    ids=lambda layer: type(layer).__name__,
)
def test_batch_norms(layer):
    shape = (BATCH, 4, 5, 3, 2)[: 5 if isinstance(layer, nn.BatchNorm3d) else 4]
    x = random(*shape[: 3 if isinstance(layer, nn.BatchNorm1d) else None])
    layer = filled(layer)
    tree = carried(layer)
    assert tree.keys() == {"scale", "bias", "mean", "var"}
    stats = {key: tree.pop(key) for key in ("mean", "var")}
    module = linen.BatchNorm(use_running_average=True, epsilon=1e-5)
    ours = module.apply({"params": tree, "batch_stats": stats}, to_last(x))
    close(ours, to_last(outputs(layer, x)))


def test_layers_without_arrays_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2, bias=False))
    model.extend([nn.BatchNorm1d(2, affine=False), nn.LayerNorm(2, bias=False)])
    model.extend([nn.InstanceNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False)])
    model[4].weight = None
    tree = jax.tree.map(jnp.shape, carried(model))
    assert tree == {
        "0": {"kernel": (2, 2), "bias": (2,)},
        "2": {"scale": (2,)},
        "3": {"mean": (2,), "var": (2,)},
        "6": {"scale": (2,), "bias": (2,)},
    }
    assert jax.tree.leaves(carried(nn.PReLU(3)))[0].shape == (3,)


CELLS = {
    "LSTM": (nn.LSTM, nn.LSTMCell, linen.LSTMCell),
    "GRU": (nn.GRU, nn.GRUCell, linen.GRUCell),
    "RNN": (nn.RNN, nn.RNNCell, linen.SimpleCell),
}


@pytest.mark.parametrize("kind", CELLS)
def test_recurrent_layers(kind):
    torch_class, _, cell_class = CELLS[kind]
    layer = filled(torch_class(3, 5, 2, batch_first=True, bidirectional=True))
    params = carried(layer)
    assert params.keys() == {"l0", "l0_reverse", "l1", "l1_reverse"}
    x = y = random(BATCH, TIME, 3)
    for number in range(2):
        x = np.concatenate(
            [
                linen.RNN(
                    cell_class(5, param_dtype=float),
                    reverse=bool(suffix),
                    keep_order=True,
                ).apply({"params": {"cell": torch_layers.one_bias(params[name])}}, x)
                for suffix in ("", "_reverse")
                if (name := f"l{number}{suffix}")
            ],
            -1,
        )
    close(x, outputs(layer, y))


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind):
    _, torch_class, cell_class = CELLS[kind]
    layer = filled(torch_class(3, 5))
    x, state = random(BATCH, 3), random(2, BATCH, 5)
    cell = torch_layers.one_bias(carried(layer))
    states = torch.from_numpy(state)
    if kind != "LSTM":
        state, states = state[0], states[0]
    with torch.no_grad():
        expected = layer(torch.from_numpy(x), states if kind != "LSTM" else (*states,))
    # torch has (hidden, cell), Flax (cell, hidden).
    ours, _ = cell_class(5).apply(
        {"params": cell}, state[::-1] if kind == "LSTM" else state, x
    )
    ours = ours[::-1] if kind == "LSTM" else (ours,)
    expected = expected if kind == "LSTM" else (expected,)
    for actual, wanted in zip(ours, expected, strict=True):
        close(actual, wanted)


ATTENTION = {
    "plain": {},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 3, "vdim": 5},
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention(kind):
    options = ATTENTION[kind]
    layer = filled(nn.MultiheadAttention(8, 2, batch_first=True, **options))
    sizes = [8, options.get("kdim", 8), options.get("vdim", 8)]
    query, key, value = (random(BATCH, TIME, size) for size in sizes)
    use_bias = options.get("bias", True)
    module = linen.MultiHeadDotProductAttention(2, qkv_features=8, use_bias=use_bias)
    wanted = jax.eval_shape(module.init, jax.random.key(0), query, key, value)
    params = carried(layer, like=wanted)
    ours = module.apply(params, query, key, value)
    close(ours, outputs(layer, query, key, value))
    cross = nnx.MultiHeadAttention(
        2, 8, in_kv_features=8, use_bias=use_bias, decode=False, rngs=nnx.Rngs(0)
    )
    if kind != "other sizes":
        nnx.update(cross, carried(layer, like=cross))
        # NNX's attention computes its weights in float32.
        np.testing.assert_allclose(cross(query), ours, rtol=0, atol=1e-5)


def test_a_weight_norm():
    def expected(layer, x):
        tree = carried(layer)
        v, g = tree["kernel"], tree["scale"]
        norm = np.sqrt(np.sum(np.square(v), tuple(range(v.ndim - 1))))
        kernel = np.asarray(v) * (np.asarray(g) / norm)
        module = linen.Dense(5) if v.ndim == 2 else linen.Conv(5, (2,), padding=0)
        params = {"kernel": kernel, "bias": tree["bias"]}
        return module.apply({"params": params}, to_last(x))

    x = random(BATCH, 3, 4)
    conv = filled(parametrizations.weight_norm(nn.Conv1d(3, 5, 2)))
    close(expected(conv, x), to_last(outputs(conv, x)))
    with pytest.warns(FutureWarning):
        linear = nn.utils.weight_norm(nn.Linear(3, 5))
    linear = filled(linear)
    close(expected(linear, x[:, :, 0]), outputs(linear, x[:, :, 0]))
    whole = filled(parametrizations.weight_norm(nn.Linear(3, 5), dim=None))
    assert carried(whole)["scale"].shape == ()


@pytest.mark.parametrize(
    "norm", [parametrizations.spectral_norm, nn.utils.spectral_norm]
)
def test_a_spectral_norm(norm):
    layer = filled(norm(nn.Conv1d(3, 5, 2)))
    x = random(BATCH, 3, 4)
    tree = carried(layer)
    kernel = tree["kernel"]
    sigma = tree["u"] @ np.transpose(kernel, (2, 1, 0)).reshape(5, -1) @ tree["v"]
    params = {"kernel": kernel / sigma, "bias": tree["bias"]}
    ours = linen.Conv(5, (2,), padding=0).apply({"params": params}, to_last(x))
    close(ours, to_last(outputs(layer, x)))


class Net(nn.Module):
    """Parameters beside children, lists of parameters, a module used twice."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 3))
        self.head = nn.Linear(3, 2)
        self.again = self.head
        self.several = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.ones(1))})
        self.biased = nn.Linear(3, 2)
        self.biased.weight = self.head.weight
        self.register_buffer("counts", torch.ones(3))


def test_parameters_that_are_no_layers():
    tree = carried(filled(Net()))
    assert jax.tree.map(jnp.shape, tree) == {
        "scale": (2, 3),
        "head": {"kernel": (3, 2), "bias": (2,)},
        "several": {"0": (4,)},
        "named": {"a": (1,)},
        "biased": {"bias": (2,)},
    }


def traced(module):
    with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
        return torch.jit.trace(module, torch.ones(1, 2))


class Scaled(nn.Module):
    """A layer that no rule knows."""

    def __init__(self, size=3):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, 2))
        self.gain = nn.Parameter(torch.ones(()))


class Doubled(nn.Linear):
    """A layer that computes something else than its base."""

    def forward(self, x):
        return 2 * super().forward(x)


class DoubledTwice(Doubled):
    """Its subclass."""


class NormAct(nn.BatchNorm1d):
    """timm's, which has children, and keeps running statistics."""

    def __init__(self):
        super().__init__(3)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def both(weights, name, module):
    assert isinstance(module, Scaled)
    return {"w": weights[f"{name}.weight"].T, "more": {"g": weights[f"{name}.gain"]}}


def test_a_rule():
    model = nn.Sequential(Scaled(), nn.ModuleList([DoubledTwice(3, 2)]))
    rules = {
        Scaled: both,
        Doubled: lambda weights, name, module: torch_layers.linear(weights, name),
    }
    tree = jax.tree.map(jnp.shape, carried(model.double(), rules=rules))
    assert tree == {
        "0": {"w": (2, 3), "more": {"g": ()}},
        "1": {"0": {"kernel": (3, 2), "bias": (2,)}},
    }


def pruned():
    return prune.l1_unstructured(nn.Linear(3, 2), "weight", 1)


def with_extra():
    layer = NamedLinear(3, 2)
    layer.extra = nn.Parameter(torch.ones(1))
    return layer


def recurrent_with_extra():
    layer = nn.GRU(3, 2)
    layer.extra = nn.Parameter(torch.ones(1))
    return layer


def tied_in_part():
    model = nn.Sequential(nn.Linear(2, 2), Scaled(2))
    model[1].weight = model[0].weight
    return model


def joined(weights, name, module):
    return np.append(weights[f"{name}.weight"], weights[f"{name}.gain"])


LONG = type("Layer" * 300, (Scaled,), {})
ALL_LONG = nn.ModuleDict({"layer" * 300: LONG()})
ALL_LONG["layer" * 300].register_parameter("gain" * 300, nn.Parameter(torch.ones(1)))
# The model, the options, the error, and what it says.
REFUSED = [
    (lambda: {"a": 1}, {}, TypeError, "must be a torch.nn.Module or .*, got a dict"),
    (Scaled, {}, TypeError, r"`model` must be .*Scaled .* weights\['weight'\]"),
    (lambda: nn.Sequential(Scaled()), {}, TypeError, r"'0' .* add rules=\{Scaled: f\}"),
    (lambda: nn.Sequential(LONG()), {}, TypeError, "must be of a class that port_of"),
    (lambda: ALL_LONG, {}, TypeError, "must be of a class that port_of knows"),
    (
        lambda: ALL_LONG,
        {"rules": {LONG: lambda weights, name, module: weights["more" * 300]}},
        KeyError,
        "which the model does not have",
    ),
    (
        lambda: ALL_LONG,
        {"rules": {LONG: lambda weights, name, module: {}}},
        ValueError,
        "must use all of its parameters",
    ),
    (lambda: Doubled(3, 2), {}, TypeError, "knows, got .*Doubled with weight, bias"),
    (NormAct, {}, TypeError, "NormAct with weight, bias, running_mean, running_var"),
    (lambda: nn.Bilinear(2, 2, 2), {}, TypeError, "Bilinear with weight, bias"),
    (pruned, {}, KeyError, "asks for 'weight', which .* it has bias, weight_orig"),
    (
        with_extra,
        {},
        ValueError,
        "must use all of its parameters, but leaves out extra",
    ),
    (recurrent_with_extra, {}, ValueError, "but leaves out extra"),
    (lambda: nn.LSTM(3, 4, proj_size=2), {}, ValueError, "without proj_size"),
    (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        {},
        ValueError,
        "without add_bias_kv",
    ),
    (
        lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
        {},
        TypeError,
        "one weight_norm or spectral_norm of its weight, got weight: _Orthogonal",
    ),
    (lambda: nn.LazyLinear(3), {}, ValueError, "not initialized; call the model once"),
    (
        lambda: nn.Sequential(traced(nn.Linear(2, 2))),
        {},
        TypeError,
        "got a TopLevelTracedModule at '0'; give the model before torch.jit",
    ),
    (Scaled, {"rules": [both]}, TypeError, "`rules` must be a dict from classes"),
    (Scaled, {"rules": {"Scaled": both}}, TypeError, "must have classes for keys"),
    (Scaled, {"rules": {Scaled: Scaled}}, TypeError, "of three arguments for values"),
    (Scaled, {"rules": {Scaled: lambda weights: {}}}, TypeError, "of three arguments"),
    (
        Scaled,
        {"rules": {Scaled: lambda weights, name, module: [weights["weight"]]}},
        TypeError,
        "must return an array or a dict of arrays, nested or not, got a list",
    ),
    (
        Scaled,
        {"rules": {Scaled: lambda weights, name, module: weights["weight"]}},
        ValueError,
        "but leaves out gain",
    ),
    (
        Scaled,
        {"rules": {Scaled: lambda weights, name, module: weights["gain"] + 0.5}},
        ValueError,
        "must only move elements, but changes some",
    ),
    (
        Scaled,
        {"rules": {Scaled: lambda weights, name, module: weights["other"]}},
        KeyError,
        "asks for 'other', which the model does not have; it has weight, gain",
    ),
    (
        tied_in_part,
        {"rules": {Scaled: joined}},
        ValueError,
        r"must keep 1\.weight apart from other arrays",
    ),
]


@pytest.mark.parametrize(("make", "options", "error", "says"), REFUSED)
def test_refused(make, options, error, says):
    with pytest.raises(error, match=says) as raised:
        port_of(make(), **options)
    assert len(str(raised.value)) < 600
