"""A port is made from the layers of recorded Keras models, without Keras.

Here the port sees classes that have of Keras' what it asks, with the recorded names,
paths and shapes.
"""

import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
from test_keras_port import Model, RMSprop

from optax_rmsprop.carry import from_keras, keras_layers, port_of
from optax_rmsprop.carry._keras_port import RULES, keras_port
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
        assert not recursive
        return self.inner

    def call(self):
        pass


@pytest.fixture
def keras(monkeypatch):
    """A module with the classes of layers that Keras has."""
    module = types.ModuleType("keras")
    module.Layer = Layer
    module.layers = types.SimpleNamespace()
    for name in RULES:
        setattr(module.layers, name, subclass(Layer, name))
    monkeypatch.setitem(sys.modules, "keras", module)
    return module


def model_of(keras, structure, made=None):
    """The recorded layers; those of equal number are one."""
    made = {} if made is None else made
    number, name = structure["number"], structure["class"]
    if number not in made:
        kind = getattr(keras.layers, name, None) or subclass(Layer, name)
        inner = [model_of(keras, part, made) for part in structure["layers"]]
        of_layer = (structure[key] for key in ("name", "path", "own"))
        made[number] = kind(*of_layer, inner, **structure["options"])
    return made[number]


def subclass(base, name="Mine"):
    """A class with a `call` of its own."""
    return type(name, (base,), {"call": lambda self: None})


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
    with pytest.raises(ValueError, match="`like` must be None for a Keras model"):
        port_of(model, like={})
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
        [np.ravel(leaf) for leaf in jax.tree.leaves(keras_port(model)(arrays))]
    )
    del arrays["standard/count"]
    values = np.concatenate([np.ravel(array) for array in arrays.values()])
    np.testing.assert_array_equal(np.sort(moved), np.sort(values))


REFUSED = {
    "lora": "keras.*Dense at net/dense with kernel, bias, lora_kernel_a",
    "own weights": "Scale at mine with gain; .*rules={Scale: function",
    "renorm": "BatchNormalization at net/norm with gamma, .*renorm_mean",
}


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_weights_are_refused(keras, name):
    model = model_of(keras, RECORD["models"][name])
    with pytest.raises(TypeError, match=REFUSED[name]):
        keras_port(model)


def test_a_rule_for_another_class(keras):
    model = model_of(keras, RECORD["models"]["own weights"])
    layer = model.inner[-1]

    def rule(weights, path, given):
        assert given is layer
        return {"scale": weights[f"{path}/gain"]}

    tree = keras_port(model, {type(layer): rule})(arrays_of(model))
    np.testing.assert_array_equal(tree["mine"]["scale"], np.arange(3))


def dense(kind, name="dense", path="net/dense"):
    own = [(f"{path}/kernel", (3, 2), "float32"), (f"{path}/bias", (2,), "float32")]
    return kind(name, path, own)


def test_a_rule_comes_before_ours(keras):
    model = Layer("net", "net", inner=[dense(keras.layers.Dense)])
    rules = {keras.layers.Dense: lambda weights, path, layer: weights[f"{path}/bias"]}
    assert keras_port(model, rules)(arrays_of(model))["dense"].shape == (2,)


def test_a_subclass_is_known_by_its_call(keras):
    same = type("Same", (keras.layers.Dense,), {"more": 1})
    model = Layer("net", "net", inner=[dense(same)])
    assert keras_port(model)(arrays_of(model))["dense"].keys() == {"kernel", "bias"}
    other = subclass(keras.layers.Dense)
    with pytest.raises(TypeError, match="Mine at net/dense with kernel, bias; say"):
        keras_port(Layer("net", "net", inner=[dense(other)]))


def test_a_class_of_the_same_name_is_not_known(keras):
    model = Layer("net", "net", inner=[dense(subclass(Layer, "Dense"))])
    with pytest.raises(TypeError, match="Dense at net/dense"):
        keras_port(model)


def test_a_known_class_with_weights_of_other_names(keras):
    """As a subclass with a `build` of its own may have."""
    other = keras.layers.Dense("a", "net/a", [("net/a/matrix", (3, 2), "float32")])
    with pytest.raises(TypeError, match="Dense at net/a with matrix"):
        keras_port(Layer("net", "net", inner=[other]))


def test_equal_names(keras):
    layers = [dense(keras.layers.Dense, path=f"net/{n}") for n in (1, 2)]
    with pytest.raises(ValueError, match="got two named 'dense' in net; give the"):
        keras_port(Layer("net", "net", inner=layers))


LONG = "layer" * 300


@pytest.mark.parametrize(
    ("model", "rules", "kind", "text"),
    [
        (Layer("net", "net"), None, ValueError, "must be built, got one without"),
        (LONG, None, TypeError, "must be a keras.Model of Keras 3, got a str"),
        (dense(Layer), LONG, TypeError, "`rules` must be a dict from classes"),
        (dense(Layer), {LONG: print}, TypeError, "`rules` must be a dict from classes"),
        (dense(Layer), {Layer: LONG}, TypeError, "`rules` must be a dict from classes"),
        (dense(subclass(Layer, LONG), LONG, LONG), None, TypeError, "known classes"),
    ],
)
def test_errors_are_short(keras, model, rules, kind, text):
    with pytest.raises(kind, match=text) as raised:
        keras_port(model, rules)
    assert len(str(raised.value)) < 600


def carried_run(keras, changed=lambda half: None):
    run = json.loads(json.dumps(RECORD["run"]))
    port = keras_port(model_of(keras, run["structure"]))
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
