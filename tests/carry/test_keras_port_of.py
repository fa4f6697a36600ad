"""A port is made from the layers of recorded Keras models, without Keras.

Here the port sees classes that have of Keras' what it asks, with the recorded names,
paths and shapes.
"""

import itertools
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen, nnx
from test_keras_port import Model, RMSprop

from optax_rmsprop.carry import from_keras, keras_layers, port_of
from optax_rmsprop.carry._port_of._keras import RULES
from peers.keras_in_flax import TOLERANCE, end_of, far_from

RECORD = json.loads(
    (
        Path(__file__).parent.parent / "peers" / "recorded" / "keras_layers.json"
    ).read_text()
)


SIDES = ("forward", "backward")


class Layer:
    """The part of a keras.Layer that a port asks for."""

    def __init__(self, name, path, own=(), inner=(), **options):
        self.name, self.path = name, path
        self.own = [
            types.SimpleNamespace(path=at, shape=tuple(shape), dtype=dtype)
            for at, shape, dtype in own
        ]
        self.inner = list(inner)
        vars(self).update(options)

    @property
    def weights(self):
        lists = [self.own, *(layer.weights for layer in self.inner)]
        return list({id(v): v for variables in lists for v in variables}.values())

    def _flatten_layers(self, include_self, recursive):
        assert not include_self
        inner = (layer._flatten_layers(False, True) for layer in self.inner)
        return [*self.inner, *(itertools.chain(*inner) if recursive else ())]

    def call(self):
        pass


@pytest.fixture
def keras(monkeypatch):
    """A module with the classes of layers that Keras has."""
    module = types.ModuleType("keras")
    module.Layer = Layer
    module.Sequential, module.Function = subclass(Layer), subclass(Layer)
    module.layers = types.SimpleNamespace()
    for name in RULES:
        setattr(module.layers, name, subclass(Layer, name, "keras.layers"))
    monkeypatch.setitem(sys.modules, "keras", module)
    return module


def model_of(keras, structure, made=None):
    """The recorded layers; those of equal number are one."""
    made = {} if made is None else made
    number, name = structure["number"], structure["class"]
    if number not in made:
        kind = getattr(keras.layers, name, subclass(Layer, name, "keras.layers"))
        inner = [model_of(keras, part, made) for part in structure["layers"]]
        of_layer = (structure[key] for key in ("name", "path", "own"))
        made[number] = kind(*of_layer, inner, **structure["options"])
    return made[number]


def subclass(base, name="Mine", module=__name__):
    """A class with a `call` of its own."""
    return type(name, (base,), {"call": lambda self: None, "__module__": module})


def arrays_of(model):
    """Each weight, with numbers that no other has."""
    start, arrays = 0, {}
    for variable in model.weights:
        size = int(np.prod(variable.shape))
        arrays[variable.path] = np.arange(start, start + size, dtype=np.float32)
        arrays[variable.path] = arrays[variable.path].reshape(variable.shape)
        start += size
    return arrays


def test_the_tree_is_named_and_nested_as_the_layers(keras):
    model = model_of(keras, RECORD["models"]["everything"])
    arrays = arrays_of(model)
    tree = port_of(model)(arrays)
    k = keras_layers
    standard = {kind: arrays[f"standard/{kind}"] for kind in ("mean", "variance")}
    norm = k.norm(arrays, "norm") | k.running_stats(arrays, "norm")
    both = {f"{side}_gru": k.gru(arrays, f"both/{side}_gru") for side in SIDES}
    expected = {
        "standard": standard,
        "conv": k.conv(arrays, "conv"),
        "norm": norm,
        "bare": k.running_stats(arrays, "bare"),
        "groups": k.norm(arrays, "groups"),
        "prelu": k.prelu(arrays, "prelu"),
        "depthwise": k.depthwise_conv(arrays, "depthwise"),
        "separable": k.separable_conv(arrays, "separable"),
        "up": k.conv_transpose(arrays, "up"),
        "embedding": k.embedding(arrays, "embedding"),
        "rms": k.norm(arrays, "rms"),
        "both": both,
        "each": {"inner": k.dense(arrays, "each/inner")},
        "gru": k.gru(arrays, "gru"),
        "simple": k.simple_rnn(arrays, "simple"),
        "to two": k.dense(arrays, "to two"),
        "shared": k.dense(arrays, "nested/shared"),  # where the model has it first
        "einsum": k.einsum_dense(arrays, "einsum"),
    }
    for name, part in expected.items():
        jax.tree.map(np.testing.assert_array_equal, tree.pop(name), part)
    # These have automatic names: an attention and a norm, and two cells.
    (attention, norm), (cells,) = tree.pop("block").values(), tree.pop("stack").values()
    assert attention.keys() == {"query", "key", "value", "out"}
    assert norm.keys() == {"scale", "bias"}
    assert sorted(map(len, cells.values())) == [6, 8]
    assert not tree


def test_each_weight_is_moved_once(keras):
    model = model_of(keras, RECORD["models"]["everything"])
    arrays = arrays_of(model)
    moved = np.concatenate(
        [np.ravel(leaf) for leaf in jax.tree.leaves(port_of(model)(arrays))]
    )
    del arrays["standard/count"]
    values = np.concatenate([np.ravel(array) for array in arrays.values()])
    np.testing.assert_array_equal(np.sort(moved), np.sort(values))


REFUSED = {
    "lora": (ValueError, "'net/dense', of class Dense .* leaves out .*/lora_kernel_a"),
    "own weights": (
        TypeError,
        "'mine' must be .*Scale with gain; .*{Scale: f",
    ),
    "renorm": (ValueError, "'net/norm', of class Batch.* leaves out .*/renorm_mean"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_weights_are_refused(keras, name):
    model = model_of(keras, RECORD["models"][name])
    kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        port_of(model)


def test_a_rule_for_another_class(keras):
    model = model_of(keras, RECORD["models"]["own weights"])
    layer = model.inner[-1]

    def rule(weights, path, given):
        assert given is layer
        return {"scale": weights[f"{path}/gain"]}

    tree = port_of(model, rules={type(layer): rule})(arrays_of(model))
    np.testing.assert_array_equal(tree["mine"]["scale"], np.arange(3))


def dense(kind, name="dense", path="net/dense"):
    own = [(f"{path}/kernel", (3, 2), "float32"), (f"{path}/bias", (2,), "float32")]
    return kind(name, path, own)


def test_a_rule_comes_before_ours(keras):
    model = Layer("net", "net", inner=[dense(keras.layers.Dense)])

    def rule(weights, path, layer):
        return {"w": weights[f"{path}/kernel"], "b": weights[f"{path}/bias"]}

    tree = port_of(model, rules={keras.layers.Dense: rule})(arrays_of(model))
    assert tree["dense"].keys() == {"w", "b"}
    rule = lambda weights, path, layer: weights[f"{path}/bias"]  # noqa: E731
    with pytest.raises(ValueError, match="leaves out net/dense/kernel"):
        port_of(model, rules={keras.layers.Dense: rule})


def test_a_subclass_is_known_by_its_call(keras):
    same = type("Same", (keras.layers.Dense,), {"more": 1})
    model = Layer("net", "net", inner=[dense(same)])
    assert port_of(model)(arrays_of(model))["dense"].keys() == {"kernel", "bias"}
    other = subclass(keras.layers.Dense)
    with pytest.raises(TypeError, match=r"'net/dense' .*Mine with kernel, bias;"):
        port_of(Layer("net", "net", inner=[dense(other)]))


def test_what_a_known_class_does_not_do_is_refused(keras):
    """Keras' convolutions call this method, and a layer of cells its cell."""
    method = {"convolution_op": lambda self, inputs, kernel: None}
    hooked = type("Hooked", (keras.layers.Dense,), method)
    with pytest.raises(TypeError, match=r"Hooked with kernel, bias"):
        port_of(Layer("net", "net", inner=[dense(hooked)]))
    shapes = {"kernel": (3, 20), "recurrent_kernel": (5, 20), "bias": (20,)}
    own = [(f"r/cell/{key}", shape, "float32") for key, shape in shapes.items()]
    cell = subclass(keras.layers.LSTMCell)("cell", "r/cell", own)
    with pytest.raises(TypeError, match=r"'r/cell' must .*Mine with kernel, rec"):
        port_of(Layer("n", "n", inner=[keras.layers.LSTM("r", "r", inner=[cell])]))
    norm = keras.layers.LayerNormalization("n", "n", [("n/gamma", (2,), "float32")])
    norm.rms_scaling = True
    with pytest.raises(ValueError, match="n must be without rms_scaling"):
        port_of(Layer("net", "net", inner=[norm]))


def test_equal_paths_are_refused(keras):
    parts = [Layer(n, n, inner=[dense(keras.layers.Dense)]) for n in "ab"]
    with pytest.raises(ValueError, match="more than one at net/dense/kernel"):
        port_of(Layer("net", "net", inner=parts))


def test_a_class_of_the_same_name_is_not_known(keras):
    model = Layer("net", "net", inner=[dense(subclass(Layer, "Dense"))])
    with pytest.raises(TypeError, match=r"'net/dense' .*Dense with kernel, bias"):
        port_of(model)


def test_a_known_class_with_weights_of_other_names(keras):
    """As a subclass with a `build` of its own may have."""
    other = keras.layers.Dense("a", "net/a", [("net/a/matrix", (3, 2), "float32")])
    with pytest.raises(KeyError, match=r"'net/a/kernel', .* has net/a/matrix; undo"):
        port_of(Layer("net", "net", inner=[other]))


def test_equal_names(keras):
    layers = [dense(keras.layers.Dense, path=f"net/{n}") for n in (1, 2)]
    with pytest.raises(ValueError, match="got two named 'dense' in net; give the"):
        port_of(Layer("net", "net", inner=layers))


class Vision(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(3):
            x = linen.Conv(3, (2, 2))(x)
        x = linen.BatchNorm(use_running_average=True)(x)
        for name in ("forward", "backward"):
            cell = linen.GRUCell(3, name=f"{name}_cell")
            carry = cell.initialize_carry(jax.random.key(0), x[:, 0, 0].shape)
            cell(carry, x[:, 0, 0])
        return linen.Dense(2)(x)


def vision(keras):
    """With the names that Keras gives by itself, from 4 on for its second model."""
    kinds = keras.layers

    def layer(kind, name, options=(), **shapes):
        own = [(f"v/{name}/{key}", shape, "float32") for key, shape in shapes.items()]
        return getattr(kinds, kind)(name, f"v/{name}", own, **dict(options))

    names = "conv2d", "conv2d_1", "conv2d_2"
    convs = [layer("Conv2D", n, kernel=(2, 2, 3, 3), bias=(3,)) for n in names]
    stats = "gamma", "beta", "moving_mean", "moving_variance"
    on, cell = {"scale": True, "center": True}, {"reset_after": True}
    shapes = {"kernel": (3, 9), "recurrent_kernel": (3, 9), "bias": (2, 9)}
    sides = [layer("GRUCell", f"{side}_cell", cell, **shapes) for side in SIDES]
    return keras.Sequential(
        "v",
        "v",
        inner=[
            *convs,
            layer("BatchNormalization", "norm", on, **dict.fromkeys(stats, (3,))),
            *sides,
            layer("Dense", "dense_4", kernel=(3, 2), bias=(2,)),
        ],
    )


def test_like_a_tree_of_linen(keras):
    model = vision(keras)
    arrays, images = arrays_of(model), np.zeros((1, 4, 4, 3))
    like = jax.eval_shape(Vision().init, jax.random.key(0), images)
    tree = port_of(model, like=like)(arrays)
    for name in ("forward_cell", "backward_cell"):  # these keep both biases
        cell = keras_layers.gru(arrays, f"v/{name}")
        got = tree["params"][name]
        jax.tree.map(np.testing.assert_array_equal, got, cell)
        tree["params"][name] = keras_layers.one_bias(got)
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, like)
    for number, name in enumerate(("conv2d", "conv2d_1", "conv2d_2")):
        kernel = tree["params"][f"Conv_{number}"]["kernel"]
        np.testing.assert_array_equal(kernel, arrays[f"v/{name}/kernel"])
    mean = tree["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_array_equal(mean, arrays["v/norm/moving_mean"])
    del like["batch_stats"]
    assert port_of(model, like=like)(arrays).keys() == {"params"}
    with pytest.raises(ValueError, match=r"v/dense_4 .*, net/dense .* and Dense_0"):
        port_of(Layer("w", "w", inner=[model, dense(keras.layers.Dense)]), like=like)


def test_automatic_numbers_that_do_not_say_the_order_of_calls(keras):
    square = [("kernel", (3, 3), "float32")]

    def model(kind, *names):
        layers = [
            keras.layers.Dense(n, n, [(f"{n}/{key}", *rest) for key, *rest in square])
            for n in names
        ]
        return kind("m", "m", inner=layers)

    like = {f"Dense_{n}": {"kernel": np.zeros((3, 3))} for n in range(2)}
    for kind in (keras.Sequential, keras.Function):
        made = model(kind, "dense_7", "dense_10")
        arrays = arrays_of(made)
        tree = port_of(made, like=like)(arrays)
        np.testing.assert_array_equal(
            tree["Dense_1"]["kernel"], arrays["dense_10/kernel"]
        )
    for made in (
        model(keras.Sequential, "dense_1", "dense"),  # made in another order
        model(subclass(Layer), "dense_1", "dense_2"),  # called in any order
    ):
        with pytest.raises(ValueError, match="with several, are dense"):
            port_of(made, like=like)
    like = {name: {"kernel": np.zeros((3, 3))} for name in ("dense_1", "dense")}
    tree = port_of(made := model(subclass(Layer), "dense_1", "dense"), like=like)(
        arrays := arrays_of(made)
    )
    np.testing.assert_array_equal(tree["dense"]["kernel"], arrays["dense/kernel"])
    like = {f"head_{n}": {"kernel": np.zeros((3, 3))} for n in (1, 2)}
    assert port_of(model(subclass(Layer), "head_2", "head_1"), like=like)


@pytest.mark.parametrize(
    ("name", "columns", "cell"),
    [
        pytest.param("LSTM", 4, nnx.LSTMCell, marks=pytest.mark.slow),
        ("LSTM", 4, nnx.OptimizedLSTMCell),
        pytest.param("GRUCell", 3, nnx.GRUCell, marks=pytest.mark.slow),
        pytest.param("SimpleRNN", 1, nnx.SimpleCell, marks=pytest.mark.slow),
    ],
)
def test_like_a_cell_of_nnx(keras, name, columns, cell):
    flax_cell = cell(3, 5, rngs=nnx.Rngs(0))
    if name == "GRUCell":
        flax_cell = keras_layers.both_biases(flax_cell)
    like = nnx.state(nnx.RNN(flax_cell, rngs=nnx.Rngs(0)), nnx.Param)
    width = 5 * columns
    shapes = {"kernel": (3, width), "recurrent_kernel": (5, width), "bias": (width,)}
    if name == "GRUCell":
        shapes["bias"] = (2, width)
    own = [(f"m/r/{key}", shape, "float32") for key, shape in shapes.items()]
    layer = getattr(keras.layers, name)("r", "m/r", own, reset_after=True)
    model = Layer("m", "m", inner=[layer])
    tree = port_of(model, like=like)(arrays_of(model))
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    to_flax = keras_layers.nnx_lstm if cell is nnx.LSTMCell else keras_layers.nnx_fused
    leaves = jax.tree.leaves(to_flax(arrays_of(model), "m/r"))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(tree), leaves)


LONG = "layer" * 300


@pytest.mark.parametrize(
    ("model", "rules", "kind", "text"),
    [
        (Layer("net", "net"), None, ValueError, "must be built, got one without"),
        (dense(Layer), LONG, TypeError, "`rules` must be a dict from classes"),
        (dense(Layer), {LONG: print}, TypeError, "`rules` must have classes for keys"),
        (dense(Layer), {Layer: LONG}, TypeError, "`rules` must have classes for keys"),
        (
            dense(subclass(Layer, LONG), LONG, LONG),
            None,
            TypeError,
            "must be of a class",
        ),
    ],
)
def test_errors_are_short(keras, model, rules, kind, text):
    with pytest.raises(kind, match=text) as raised:
        port_of(model, rules=rules)
    assert len(str(raised.value)) < 600


def carried_run(keras, changed=lambda half: None):
    run = json.loads(json.dumps(RECORD["run"]))
    port = port_of(model_of(keras, run["structure"]))
    changed(run["half"])
    x, y = (np.asarray(run[name], np.float32) for name in "xy")
    carried = from_keras(Model(run["half"]), RMSprop(run["half"]), port)
    end = {path: np.asarray(value, np.float32) for path, value in run["end"]}
    return far_from(end_of(carried, x, y, run["steps"]), port(end))


def test_recurrent_layers_train_on(keras):
    assert carried_run(keras) <= TOLERANCE


def test_real_keras_went_on():
    """By `record_keras_layers.py`, from a keras.Model and its optimizer themselves."""
    assert 0 < RECORD["run"]["carried"] <= TOLERANCE


def test_exchanged_gates_would_show(keras):
    """The slots of two gates of the GRU are exchanged; then the run must differ."""

    def exchange(half):
        for pair in half["variables"]:
            if "gru" in pair[0] and "recurrent" in pair[0]:
                z, r, h = np.split(np.asarray(pair[1]), 3, -1)
                pair[1] = np.concatenate([r, z, h], -1).tolist()

    assert carried_run(keras, exchange) > 10 * TOLERANCE
