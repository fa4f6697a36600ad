"""Layers ported from Keras give Flax, Linen and NNX, what Keras has computed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen, nnx

from optax_rmsprop.carry import keras_layers

RECORD = json.loads(
    (
        Path(__file__).parent.parent / "peers" / "recorded" / "keras_layers.json"
    ).read_text()
)["layers"]
TOLERANCE = 5e-6  # of outputs of size 1; observed: below 1e-6


def recorded(name):
    """Weights by path, the layer's path, its inputs and its output."""
    case = RECORD[name]
    weights = {
        path: np.asarray(value, np.float32) for path, value in case["weights"].items()
    }
    dtype = np.int32 if name == "embedding" else np.float32
    inputs = [np.asarray(x, dtype) for x in case["inputs"]]
    return weights, case["path"], inputs, np.asarray(case["output"], np.float32)


def loaded(make, tree, *sizes, **options):
    """A new NNX module with these values, which must be all that it has."""
    # Initial values would only cost time.
    module = nnx.eval_shape(lambda: make(*sizes, **options, rngs=nnx.Rngs(0)))
    state = nnx.state(module, nnx.Not(nnx.RngState))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    assert jax.tree.map(np.shape, tree) == shapes
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, tree))
    nnx.update(module, state)
    return module


def applied(module, tree, *inputs, **collections):
    """The output of a Linen module, all of whose parameters must be in the tree."""
    wanted = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    shapes = jax.tree.map(jnp.shape, wanted)
    assert jax.tree.map(np.shape, tree) == shapes
    return module.apply({"params": tree, **collections}, *inputs)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


NO_BIAS = {"use_bias": False}
# A class of Linen and of NNX takes the same options, but NNX needs sizes, too.
SIMPLE = {
    "dense": ("dense", "Dense", "Linear", (4, 3), {}),
    "dense without bias": ("dense", "Dense", "Linear", (4, 3), NO_BIAS),
    "embedding": ("embedding", "Embed", "Embed", (7, 3), {}),
    "conv 1d": (
        "conv",
        "Conv",
        "Conv",
        (3, 2),
        {"kernel_size": (2,), "kernel_dilation": 2, "padding": "CAUSAL"},
    ),
    "conv 2d": (
        "conv",
        "Conv",
        "Conv",
        (4, 4),
        {"kernel_size": (3, 2), "strides": 2, "feature_group_count": 2},
    ),
    "conv 3d": (
        "conv",
        "Conv",
        "Conv",
        (2, 2),
        {"kernel_size": (2, 1, 2), "padding": "VALID", "use_bias": False},
    ),
    "depthwise 1d": (
        "depthwise_conv",
        "Conv",
        "Conv",
        (3, 3),
        {"kernel_size": (2,), "padding": "VALID", "feature_group_count": 3},
    ),
    "depthwise 2d": (
        "depthwise_conv",
        "Conv",
        "Conv",
        (4, 8),
        {"kernel_size": (3, 2), "strides": 2, "feature_group_count": 4},
    ),
    "transposed 1d": (
        "conv_transpose",
        "ConvTranspose",
        "ConvTranspose",
        (3, 2),
        {"kernel_size": (2,), "strides": 3, "padding": "VALID"},
    ),
    "transposed 2d": (
        "conv_transpose",
        "ConvTranspose",
        "ConvTranspose",
        (4, 2),
        {"kernel_size": (3, 2), "strides": (1, 2)},
    ),
    # Before and after: 3 + 1 - 2 + 1 = 3 = 2 + 1, and 2 + 0 - 2 + 0 = 0.
    "transposed with output_padding": (
        "conv_transpose",
        "ConvTranspose",
        "ConvTranspose",
        (4, 2),
        {"kernel_size": (3, 2), "strides": (2, 2), "padding": ((2, 1), (0, 0))},
    ),
    "transposed 3d": (
        "conv_transpose",
        "ConvTranspose",
        "ConvTranspose",
        (2, 2),
        {"kernel_size": (2, 3, 1), "strides": (2, 2, 2), "padding": "VALID"} | NO_BIAS,
    ),
    "layer norm": (
        "norm",
        "LayerNorm",
        "LayerNorm",
        (3,),
        {"epsilon": 1e-3, "use_fast_variance": False},
    ),
    "rms norm": ("norm", "RMSNorm", "RMSNorm", (3,), {"epsilon": 1e-6}),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_layer(name):
    function, in_linen, in_nnx, sizes, options = SIMPLE[name]
    weights, path, inputs, expected = recorded(name)
    tree = getattr(keras_layers, function)(weights, path)
    # Linen is given the number of features alone, and Embed both of its sizes.
    features = sizes if in_linen == "Embed" else sizes[1:]
    close(
        applied(getattr(linen, in_linen)(*features, **options), tree, *inputs), expected
    )
    ours = loaded(getattr(nnx, in_nnx), tree, *sizes, **options)
    close(ours(*inputs), expected)


def test_einsum():
    weights, path, (x,), expected = recorded("einsum")
    tree = keras_layers.einsum_dense(weights, path)
    close(applied(linen.Einsum((3, 2, 4), "abc,cde->abde"), tree, x), expected)
    ours = loaded(nnx.Einsum, tree, "abc,cde->abde", (3, 2, 4), (2, 4))
    close(ours(x), expected)


@pytest.mark.parametrize(
    ("name", "channels", "size", "features", "bias"),
    [("separable 1d", 3, (3,), 2, False), ("separable 2d", 4, (3, 2), 3, True)],
)
def test_separable(name, channels, size, features, bias):
    weights, path, (x,), expected = recorded(name)
    tree = keras_layers.separable_conv(weights, path)
    between = tree["depthwise"]["kernel"].shape[-1]
    first = {"kernel_size": size, "padding": "VALID", "use_bias": False}
    first["feature_group_count"] = channels
    then = {"kernel_size": (1,) * len(size), "use_bias": bias}
    depthwise = applied(linen.Conv(between, **first), tree["depthwise"], x)
    close(applied(linen.Conv(features, **then), tree["pointwise"], depthwise), expected)
    depthwise = loaded(nnx.Conv, tree["depthwise"], channels, between, **first)
    pointwise = loaded(nnx.Conv, tree["pointwise"], between, features, **then)
    close(pointwise(depthwise(x)), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm(bias):
    name = "batch norm" if bias else "batch norm without beta"
    weights, path, (x,), expected = recorded(name)
    tree = keras_layers.norm(weights, path)
    stats = keras_layers.running_stats(weights, path)
    options = {"use_running_average": True, "epsilon": 1e-3, "use_bias": bias}
    close(applied(linen.BatchNorm(**options), tree, x, batch_stats=stats), expected)
    close(loaded(nnx.BatchNorm, tree | stats, 4, **options)(x), expected)


def test_layer_norm_over_two_axes():
    weights, path, (x,), expected = recorded("layer norm over two axes")
    options = {"reduction_axes": (-2, -1), "feature_axes": (-2, -1), "epsilon": 1e-3}
    tree = keras_layers.norm(weights, path)
    close(applied(linen.LayerNorm(**options), tree, x), expected)


def test_group_norm():
    weights, path, (x,), expected = recorded("group norm")
    tree = keras_layers.norm(weights, path)
    options = {"num_groups": 2, "epsilon": 1e-3, "use_fast_variance": False}
    close(applied(linen.GroupNorm(**options), tree, x), expected)
    close(loaded(nnx.GroupNorm, tree, 4, **options)(x), expected)


def test_prelu():
    weights, path, (x,), expected = recorded("prelu")
    tree = keras_layers.prelu(weights, path)
    close(applied(linen.PReLU(), tree, x), expected)
    if hasattr(nnx, "PReLU"):  # flax 0.11 has none
        close(loaded(lambda rngs: nnx.PReLU(), tree)(x), expected)


def test_a_slope_for_each_element():
    weights, path, (x,), expected = recorded("prelu of each element")
    slope = keras_layers.prelu(weights, path)["negative_slope"]
    close(np.where(x >= 0, x, slope * x), expected)


LINEN = {
    "lstm": ("lstm", linen.LSTMCell),
    "lstm without bias": ("lstm", linen.OptimizedLSTMCell),
    "lstm cell": ("lstm", linen.OptimizedLSTMCell),
    "gru": ("gru", linen.GRUCell),
    "gru backwards": ("gru", linen.GRUCell),
    "simple rnn": ("simple_rnn", linen.SimpleCell),
}
NNX = {
    "lstm": ("nnx_lstm", nnx.LSTMCell),
    "lstm cell": ("nnx_fused", nnx.OptimizedLSTMCell),
    "gru": ("nnx_fused", nnx.GRUCell),
    "gru backwards": ("nnx_fused", nnx.GRUCell),
    "simple rnn": ("nnx_fused", nnx.SimpleCell),
}


def cell_path(name, path):
    """RNN says its cell's name, other layers do not."""
    return f"{path}/mine" if name == "lstm cell" else path


def kept(outputs, expected):
    """All outputs or, as Keras does by default, the last one."""
    return outputs if outputs.ndim == expected.ndim else outputs[:, -1]


@pytest.mark.parametrize("name", LINEN)
def test_recurrent_in_linen(name):
    function, cell_class = LINEN[name]
    weights, path, (x,), expected = recorded(name)
    tree = getattr(keras_layers, function)(weights, cell_path(name, path))
    if function != "simple_rnn":
        tree = keras_layers.one_bias(tree)
    rnn = linen.RNN(cell_class(4), reverse="backwards" in name)
    close(kept(applied(rnn, {"cell": tree}, x), expected), expected)


def test_an_lstm_needs_no_second_bias():
    weights, path, (x,), expected = recorded("lstm")
    tree = {"cell": keras_layers.lstm(weights, path)}
    close(applied(linen.RNN(linen.LSTMCell(4)), tree, x), expected)


@pytest.mark.parametrize("name", NNX)
def test_recurrent_in_nnx(name):
    function, cell_class = NNX[name]
    weights, path, (x,), expected = recorded(name)
    tree = getattr(keras_layers, function)(weights, cell_path(name, path))

    def make(rngs):
        cell = cell_class(3, 4, rngs=rngs)
        is_gru = cell_class is nnx.GRUCell
        return keras_layers.both_biases(cell) if is_gru else cell

    rnn = nnx.RNN(loaded(make, tree), reverse="backwards" in name, rngs=nnx.Rngs(0))
    outputs = rnn(x)
    close(kept(outputs, expected), expected)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_bidirectional(kind):
    weights, path, (x,), expected = recorded(f"bidirectional {kind}")
    cell_class = {"lstm": linen.LSTMCell, "gru": linen.GRUCell}[kind]
    tree = {
        f"{side}_rnn": {
            "cell": keras_layers.one_bias(
                getattr(keras_layers, kind)(weights, f"{path}/{side}_{kind}")
            )
        }
        for side in ("forward", "backward")
    }
    both = linen.Bidirectional(linen.RNN(cell_class(3)), linen.RNN(cell_class(3)))
    outputs = applied(both, tree, x)
    if kind == "gru":  # which keeps the last output of each direction
        outputs = jnp.concatenate([outputs[:, -1, :3], outputs[:, 0, 3:]], -1)
    close(outputs, expected)


def test_gru_without_biases():
    weights, path, (x,), expected = recorded("gru without bias")
    with pytest.raises(ValueError, match="must be Keras', True or False, in gru"):
        keras_layers.gru(weights, path)
    tree = {"cell": keras_layers.one_bias(keras_layers.gru(weights, path, True))}
    close(applied(linen.RNN(linen.GRUCell(4)), tree, x)[:, -1], expected)
    fused = keras_layers.nnx_fused(weights, path, True)
    assert all(layer.keys() == {"kernel"} for layer in fused.values())


def test_gru_with_the_reset_before():
    weights, path, (x,), expected = recorded("gru with reset before")
    cell = keras_layers.gru(weights, path, reset_after=False)

    def layer(name, x):
        return x @ cell[name]["kernel"] + cell[name].get("bias", 0)

    h = np.zeros((len(x), 4), np.float32)
    for now in np.moveaxis(x, 1, 0):
        r, z = (jax.nn.sigmoid(layer("i" + k, now) + layer("h" + k, h)) for k in "rz")
        h = z * h + (1 - z) * jnp.tanh(layer("in", now) + layer("rn", r * h))
    close(h, expected)
    # No cell of Flax takes it by mistake.
    rnn = linen.RNN(linen.GRUCell(4))
    with pytest.raises(Exception, match="hn"):
        rnn.apply({"params": {"cell": keras_layers.one_bias(cell)}}, x)
    with pytest.raises(ValueError, match=r"gru.* must have reset_after=True, .*False"):
        keras_layers.nnx_fused(weights, path)
    with pytest.raises(ValueError, match=r"must be Keras', False, in gru.*, got True"):
        keras_layers.gru(weights, path, reset_after=True)


ATTENTION = {
    "attention": {"qkv_features": 6, "out_features": 3},
    "attention without bias": {"qkv_features": 6, "out_features": 5} | NO_BIAS,
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    weights, path, inputs, expected = recorded(name)
    query, value, *key = inputs
    key = key or [value]
    tree = keras_layers.multi_head_attention(weights, path)
    module = linen.MultiHeadDotProductAttention(2, **ATTENTION[name])
    close(applied(module, tree, query, *key, value), expected)
    if key[0] is value:  # NNX has one size for both
        sizes = {"in_features": 3, "in_kv_features": 4, "decode": False}
        ours = loaded(nnx.MultiHeadAttention, tree, 2, **sizes, **ATTENTION[name])
        close(ours(query, value), expected)


def test_another_recurrent_class_is_refused():
    weights, path, _, _ = recorded("lstm cell")
    with pytest.raises(ValueError, match="recurrent_kernel must be of Keras' gru, got"):
        keras_layers.gru(weights, f"{path}/mine")
    with pytest.raises(KeyError, match="lstm_cell/recurrent_kernel"):
        keras_layers.lstm(weights, path)


def attention_weights(path, **sizes):
    return {
        f"{path}/{name}/kernel": np.ones((3, 2, sizes.get(name, 4)))
        for name in ("query", "key", "value", "attention_output", *sizes)
    }


LONG = "layer" * 200
ERRORS = {
    "must have value_dim=key_dim, as all attention of Flax, got 5 and 4": lambda: (
        keras_layers.multi_head_attention(attention_weights(LONG, value=5), LONG)
    ),
    "must be without use_gate, which Flax does not have": lambda: (
        keras_layers.multi_head_attention(attention_weights(LONG, gate=4), LONG)
    ),
    "must be of Keras' lstm": lambda: keras_layers.lstm(
        {f"{LONG}/recurrent_kernel": np.ones((2, 6))}, LONG
    ),
    "`reset_after` must be Keras'": lambda: keras_layers.gru(
        {f"{LONG}/{kind}": np.ones((2, 6)) for kind in ("kernel", "recurrent_kernel")},
        LONG,
    ),
}


@pytest.mark.parametrize(("text", "call"), ERRORS.items(), ids=ERRORS)
def test_errors_are_short(text, call):
    with pytest.raises(ValueError, match=text) as raised:
        call()
    assert len(str(raised.value)) < 600


def test_a_norm_that_is_not_there():
    with pytest.raises(KeyError, match="net/norm/gamma"):
        keras_layers.norm({"net/nrom/gamma": np.ones(3)}, "net/norm")
