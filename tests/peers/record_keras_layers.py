"""Record what Keras' layers compute, to be compared with Flax's.

    pip install keras jax flax .
    KERAS_BACKEND=jax python tests/peers/record_keras_layers.py

recorded/keras_layers.json has, for each layer, its weights, inputs and output; the
layers of models of several kinds, with which a port is made from them; and a run of
recurrent layers, half way and at its end. The run is also carried on the spot, by
`from_keras` with the port of the live model, and goes on beside Keras.
"""

import json
from importlib import metadata

import keras
import numpy as np
from keras import layers
from keras_in_flax import TOLERANCE, end_of, far_from
from record import FOLDER

from optax_rmsprop.carry import from_keras, port_of

HALF = 10
RNG = np.random.default_rng(0)

IMAGE, SERIES, TEXT = (5, 3, 4), (6, 3), (5,)
LAYERS = {
    "dense": (layers.Dense(3), [(4,)]),
    "dense without bias": (layers.Dense(3, use_bias=False), [(4,)]),
    "einsum": (
        layers.EinsumDense("abc,cde->abde", (6, 2, 4), bias_axes="de"),
        [SERIES],
    ),
    "embedding": (layers.Embedding(7, 3), [TEXT]),
    "conv 1d": (layers.Conv1D(2, 2, dilation_rate=2, padding="causal"), [SERIES]),
    "conv 2d": (layers.Conv2D(4, (3, 2), strides=2, padding="same", groups=2), [IMAGE]),
    "conv 3d": (layers.Conv3D(2, (2, 1, 2), use_bias=False), [(3, 2, 3, 2)]),
    "depthwise 1d": (layers.DepthwiseConv1D(2), [SERIES]),
    "depthwise 2d": (
        layers.DepthwiseConv2D((3, 2), strides=2, padding="same", depth_multiplier=2),
        [IMAGE],
    ),
    "separable 1d": (layers.SeparableConv1D(2, 3, use_bias=False), [SERIES]),
    "separable 2d": (layers.SeparableConv2D(3, (3, 2), depth_multiplier=2), [IMAGE]),
    "transposed 1d": (layers.Conv1DTranspose(2, 2, strides=3), [SERIES]),
    "transposed 2d": (
        layers.Conv2DTranspose(2, (3, 2), strides=(1, 2), padding="same"),
        [(3, 2, 4)],
    ),
    "transposed with output_padding": (
        layers.Conv2DTranspose(
            2, (3, 2), strides=2, padding="same", output_padding=(1, 0)
        ),
        [(3, 2, 4)],
    ),
    "transposed 3d": (
        layers.Conv3DTranspose(2, (2, 3, 1), strides=2, use_bias=False),
        [(2, 1, 2, 2)],
    ),
    "batch norm": (layers.BatchNormalization(), [IMAGE]),
    "batch norm without beta": (layers.BatchNormalization(center=False), [(4,)]),
    "layer norm": (layers.LayerNormalization(), [SERIES]),
    "layer norm over two axes": (layers.LayerNormalization(axis=(-2, -1)), [SERIES]),
    "group norm": (layers.GroupNormalization(2), [IMAGE]),
    "rms norm": (layers.RMSNormalization(), [SERIES]),
    "prelu": (layers.PReLU(shared_axes=[1, 2]), [(3, 1)]),
    "prelu of each element": (layers.PReLU(), [(4,)]),
    "lstm": (layers.LSTM(4, return_sequences=True), [SERIES]),
    "lstm without bias": (layers.LSTM(4, use_bias=False), [SERIES]),
    "lstm cell": (layers.RNN(layers.LSTMCell(4, name="mine")), [SERIES]),
    "gru": (layers.GRU(4, return_sequences=True), [SERIES]),
    "gru backwards": (layers.GRU(4, go_backwards=True), [SERIES]),
    "gru without bias": (layers.GRU(4, use_bias=False), [SERIES]),
    "gru with reset before": (layers.GRU(4, reset_after=False), [SERIES]),
    "simple rnn": (layers.SimpleRNN(4), [SERIES]),
    "bidirectional lstm": (
        layers.Bidirectional(layers.LSTM(3, return_sequences=True, name="lstm")),
        [SERIES],
    ),
    "bidirectional gru": (layers.Bidirectional(layers.GRU(3, name="gru")), [SERIES]),
    "attention": (layers.MultiHeadAttention(2, 3), [SERIES, (5, 4), (5, 2)]),
    "attention without bias": (
        layers.MultiHeadAttention(2, 3, use_bias=False, output_shape=5),
        [SERIES, (5, 4)],
    ),
}


def rounded(array):
    """Few digits, which float32 and the record have alike."""
    return np.round(array, 2).astype(np.float32)


def listed(variables):
    return [[v.path, np.asarray(v).tolist()] for v in variables]


def fill(model):
    for variable in model.weights:
        value = rounded(RNG.normal(0, 0.5, variable.shape))
        variable.assign(np.abs(value) + 0.5 if "variance" in variable.path else value)


def layer_record(layer, shapes):
    inputs = [rounded(RNG.normal(size=(2, *shape))) for shape in shapes]
    if isinstance(layer, layers.Embedding):
        inputs = [RNG.integers(0, layer.input_dim, (2, *shapes[0]))]
    model = keras.Model(
        symbols := [keras.Input(shape) for shape in shapes], layer(*symbols)
    )
    fill(model)
    output = np.asarray(model(inputs))
    return {
        "path": layer.path,
        "weights": dict(listed(model.weights)),
        "inputs": [x.tolist() for x in inputs],
        # Digits beyond those that are compared are left out.
        "output": np.round(output.astype(float), 7).tolist(),
    }


def structure(layer, numbers=None):
    """What a port is made from: the layers in a layer, their classes and weights.

    A layer that occurs twice has the same number.
    """
    numbers = {} if numbers is None else numbers
    inner = layer._flatten_layers(include_self=False, recursive=False)
    options = {
        name: getattr(layer, name)
        for name in ("reset_after", "scale", "center")
        if isinstance(getattr(layer, name, None), bool)
    }
    of_inner = {id(v) for part in inner for v in part.weights}
    return {
        "number": numbers.setdefault(id(layer), len(numbers)),
        "class": type(layer).__name__,
        "name": layer.name,
        "path": layer.path,
        "own": [
            [v.path, list(v.shape), v.dtype]
            for v in layer.weights
            if id(v) not in of_inner
        ],
        "options": options,
        "layers": [structure(part, numbers) for part in inner],
    }


class Block(keras.layers.Layer):
    """A user's container, with layers but no weights of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.attention = layers.MultiHeadAttention(2, 2)
        self.norm = layers.LayerNormalization()

    def build(self, shape):
        self.attention.build(shape, shape)
        self.norm.build(shape)

    def call(self, x):
        return self.norm(x + self.attention(x, x))


class Scale(keras.layers.Layer):
    """A user's layer, with a weight that it makes before its path is known."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gain = self.add_weight(shape=(3,), name="gain")

    def call(self, x):
        return x * self.gain


def everything():
    """A functional model with a layer of each kind, shared and nested ones too."""
    image, text = keras.Input((4, 4, 2), name="image"), keras.Input((5,), name="text")
    x = layers.Normalization(name="standard")(image)
    x = layers.Conv2D(4, 2, name="conv")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.BatchNormalization(center=False, scale=False, name="bare")(x)
    x = layers.GroupNormalization(2, name="groups")(x)
    x = layers.Dropout(0.1, seed=0)(layers.PReLU(name="prelu")(x))
    x = layers.DepthwiseConv2D(2, name="depthwise")(x)
    x = layers.SeparableConv2D(3, 1, name="separable")(x)
    x = layers.Conv2DTranspose(2, 2, name="up")(x)
    x = layers.GlobalAveragePooling2D()(x)
    y = layers.Embedding(7, 4, name="embedding")(text)
    y = Block(name="block")(y)
    y = layers.RMSNormalization(name="rms")(y)
    gru = layers.GRU(2, return_sequences=True, name="gru")
    y = layers.Bidirectional(gru, name="both")(y)
    y = layers.RNN(
        [layers.LSTMCell(3), layers.GRUCell(2)], return_sequences=True, name="stack"
    )(y)
    y = layers.TimeDistributed(layers.Dense(3, name="inner"), name="each")(y)
    y = layers.GRU(2, return_sequences=True, name="gru")(y)
    y = layers.SimpleRNN(3, name="simple")(y)
    nested = keras.Sequential(
        [keras.Input((2,)), layers.Dense(2, name="shared")], name="nested"
    )
    y = nested(nested.layers[0](layers.Dense(2, name="to two")(y)))
    out = layers.EinsumDense("ab,bc->ac", 3, name="einsum")(layers.add([x, y]))
    return keras.Model([image, text], out, name="everything")


def of_kind(layer):
    return keras.Sequential([keras.Input((3,)), layer], name="net")


def lora():
    model = of_kind(layers.Dense(2, name="dense"))
    model.layers[0].enable_lora(1)
    return model


MODELS = {
    "everything": everything,
    "lora": lora,
    "own weights": lambda: of_kind(Scale(name="mine")),
    "renorm": lambda: of_kind(layers.BatchNormalization(renorm=True, name="norm")),
}


def run():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((5, 3)),
            layers.LSTM(4, return_sequences=True, name="lstm"),
            layers.GRU(3, name="gru"),
            layers.Dense(2, name="dense"),
        ],
        name="net",
    )
    optimizer = keras.optimizers.RMSprop(0.02, momentum=0.9, epsilon=1e-3)
    model.compile(optimizer, "mse")
    x = rounded(RNG.normal(size=(4, 5, 3)))
    y = rounded(RNG.normal(size=(4, 2)))
    for step in range(2 * HALF):
        if step == HALF:
            carried = from_keras(model, optimizer, port_of(model))
            half = {
                "config": optimizer.get_config(),
                "iterations": int(optimizer.iterations),
                "variables": listed(optimizer.variables),
                "weights": listed(model.weights),
                "trainable": [v.path for v in model.trainable_variables],
                "excluded": [],
            }
        model.train_on_batch(x, y)
    end = port_of(model)({v.path: np.asarray(v) for v in model.weights})
    apart = far_from(end_of(carried, x, y, HALF), end)
    if not apart <= TOLERANCE:
        raise SystemExit(f"carried, the run ends {apart:.1e} from Keras'")
    return {
        "x": x.tolist(),
        "y": y.tolist(),
        "steps": HALF,
        "half": half,
        "structure": structure(model),
        "end": listed(model.weights),
        "carried": apart,
    }


def main():
    record = {
        "versions": {name: metadata.version(name) for name in ("keras", "jax")},
        "layers": {name: layer_record(*case) for name, case in LAYERS.items()},
        "models": {name: structure(make()) for name, make in MODELS.items()},
        "run": run(),
    }
    path = FOLDER / "keras_layers.json"
    path.write_text(json.dumps(record) + "\n")
    print(f"{len(LAYERS)} layers in {path}, the run is {record['run']['carried']:.1e}")


if __name__ == "__main__":
    main()
