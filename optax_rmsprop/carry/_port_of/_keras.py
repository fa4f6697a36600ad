"""The layers of a live Keras model, and the rules of their classes.

For example, this model

    keras.Sequential([keras.Input((4, 3)), layers.LSTM(5), layers.Dense(2)])

has the layers "sequential/lstm" and "sequential/dense", whose rules are functions of
`keras_layers`. A layer of a class without a rule is a container of the layers in it. It
must not have weights of its own, because nothing says what they become in Flax.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optax_rmsprop._errors import bare, shown
from optax_rmsprop.carry import keras_layers
from optax_rmsprop.carry._keras import check_paths
from optax_rmsprop.carry._port_of._layer import (
    Layer,
    Model,
    Path,
    Rule,
    Weights,
    bound,
    unknown,
)

# Methods that a subclass may have of its own, and still compute what its base does.
HARMLESS = {"__init__", "build", "get_config", "from_config", "compute_output_shape"}


def keras_layers_of(model: Any, rules: Mapping[type, Rule]) -> Model:
    """Walk a Keras model.

    Layers without weights are left out. A shared layer is in it once, where the model
    has it first.

    Raises:
      TypeError: a layer of an unknown class has weights of its own.
      ValueError: the model is not built; two layers beside each other have one name,
        or two variables one path.
    """
    import keras

    if not model.weights:
        raise ValueError(
            "`model` must be built, got one without weights; call it on a batch first"
        )
    known = {
        getattr(keras.layers, name): rule
        for name, rule in RULES.items()
        if hasattr(keras.layers, name)  # an older Keras 3 lacks some
    }
    layers = list(_layers(model, (), (), rules, known, seen=set()))
    check_paths(model)
    return Model(layers, {v.path: tuple(v.shape) for v in model.weights}, set())


def _layers(
    layer: Any,
    path: Path,
    aliases: Path,
    rules: Mapping[type, Rule],
    known: Mapping[type, list[Rule]],
    seen: set[int],
) -> Iterator[Layer]:
    """Yield the layers with a rule in a layer, in Keras' order."""
    rule = _rule_for(layer, rules)
    found = [rule] if rule else _rule_for(layer, known)
    inner = () if rule else _inner(layer, recursive=True)
    if not all(type(part).__module__.startswith("keras.") for part in inner):
        found = None
    if found:
        name = _path(layer)
        kind = f"of class {bare(type(layer).__name__)}"
        # LoRA, quantization and options such as renorm add weights, and change the
        # function that a layer computes. So a rule must use all, but for counts.
        own = [v.path for v in layer.weights if "int" not in str(v.dtype)]
        moving = [at for at in own if at.endswith(("/moving_mean", "/moving_variance"))]
        calls = bound(found, name, layer)
        yield Layer(name, ".".join(aliases), path, kind, calls, own, moving)
        return
    if own := _own(layer):
        names = [variable.path.rpartition("/")[2] for variable in own]
        raise unknown(layer, _path(layer), names, "/")
    parts = []
    for part in _inner(layer):
        if id(part) not in seen and part.weights:
            seen.add(id(part))
            parts.append(part)
    names = [part.name for part in parts]
    for part, alias in zip(parts, _aliases(layer, parts), strict=True):
        if names.count(part.name) > 1:
            raise ValueError(
                "`model` must have a name of its own for each layer, got two named "
                f"{shown(part.name)} in {bare(layer.name)}; give the layers names"
            )
        names_of = (*path, part.name), (*aliases, alias)
        yield from _layers(part, *names_of, rules, known, seen)


def _rule_for(layer: Any, rules: Mapping[type, Any]) -> Any:
    """The rule of a layer's class, or of a base class that it leaves as it is."""
    for kind in type(layer).__mro__:
        if kind in rules:
            return rules[kind]
        if any(callable(x) and name not in HARMLESS for name, x in vars(kind).items()):
            return None
    return None


def _aliases(layer: Any, parts: Sequence[Any]) -> list[str]:
    """The names of the layers in a layer, as Flax numbers them.

    Keras has conv2d, conv2d_1 and conv2d_2 where Linen has Conv_0, Conv_1 and Conv_2.
    Keras numbers them as they are made, and Linen as they are called. In a Sequential
    or functional model, Keras' order of the layers is that of the calls. Where these
    orders differ, or Keras does not know that of the calls, the number is left out.
    Then no layers of Flax have the same names, and `like` does not match.
    """
    import keras

    if hasattr(layer, "backward_layer"):  # a Bidirectional; named as torch's directions
        return ["l0_reverse" if p is layer.backward_layer else "l0" for p in parts]
    is_ordered = isinstance(layer, keras.Sequential | keras.Function)
    numbers: dict[str, list[int]] = {}
    for part in parts:
        if (found := _automatic(part)) is not None:
            numbers.setdefault(found[0], []).append(found[1])
    aliases, counts = [], collections.Counter[str]()
    for part in parts:
        alias = part.name
        if (found := _automatic(part)) is not None:
            alias, _ = found
            if is_ordered and numbers[alias] == sorted(numbers[alias]):
                counts[alias] += 1
                alias += f"_{counts[alias] - 1}"
        aliases.append(re.sub(r"\dd", "", alias))
    return aliases


def _automatic(layer: Any) -> tuple[str, int] | None:
    """The parts of a name that Keras has given: of "dense_2", "dense" and 2."""
    stem, number = re.fullmatch(r"(.*?)(?:_(\d+))?", layer.name, re.DOTALL).groups()  # type: ignore[union-attr]
    if stem.replace("_", "") != type(layer).__name__.lower():
        return None
    return stem, int(number or 0)


def _inner(layer: Any, recursive: bool = False) -> list[Any]:
    """The layers in a layer; Keras has no public method for one that is no Model."""
    return layer._flatten_layers(include_self=False, recursive=recursive)


def _own(layer: Any) -> list[Any]:
    """The weights of a layer that are not those of a layer in it."""
    of_inner = {id(variable) for part in _inner(layer) for variable in part.weights}
    return [variable for variable in layer.weights if id(variable) not in of_inner]


def _path(layer: Any) -> str:
    """The path of a layer as its own weights have it.

    `layer.path` is set when the layer is built. Weights that it made before, in its
    __init__, have a shorter one.
    """
    own = _own(layer)
    return own[0].path.rpartition("/")[0] if own else layer.path


def _layer_norm(weights: Weights, path: str, layer: Any) -> Any:
    if getattr(layer, "rms_scaling", False):
        raise ValueError(
            f"{bare(path)} must be without rms_scaling, which Flax does not have, got "
            "True; add rules={LayerNormalization: f}, for a layer of your own"
        )
    return keras_layers.norm(weights, path)


def _batch_norm(weights: Weights, path: str, layer: Any) -> Any:
    stats = keras_layers.running_stats(weights, path)
    has_parameters = layer.scale or layer.center
    return stats | (keras_layers.norm(weights, path) if has_parameters else {})


def _gru(weights: Weights, path: str, layer: Any) -> Any:
    return keras_layers.gru(weights, path, layer.reset_after)


def _nnx_gru(weights: Weights, path: str, layer: Any) -> Any:
    if not layer.reset_after:  # NNX has no such cell
        return _gru(weights, path, layer)
    return keras_layers.nnx_fused(weights, path, True)


def _normalization(weights: Weights, path: str, layer: Any) -> Any:
    return {kind: weights[f"{path}/{kind}"] for kind in ("mean", "variance")}


def _by_path(function: Callable[[Weights, str], Any]) -> Rule:
    return lambda weights, path, layer: function(weights, path)


# By the class's name in keras.layers: a rule for each layout that Flax has.
RULES: dict[str, list[Rule]] = {
    name: [_by_path(function)]
    for function, names in {
        keras_layers.conv: ["Conv1D", "Conv2D", "Conv3D"],
        keras_layers.conv_transpose: [f"Conv{n}DTranspose" for n in (1, 2, 3)],
        keras_layers.dense: ["Dense"],
        keras_layers.depthwise_conv: ["DepthwiseConv1D", "DepthwiseConv2D"],
        keras_layers.einsum_dense: ["EinsumDense"],
        keras_layers.embedding: ["Embedding", "ReversibleEmbedding"],
        keras_layers.multi_head_attention: ["MultiHeadAttention"],
        keras_layers.norm: ["GroupNormalization", "RMSNormalization"],
        keras_layers.prelu: ["PReLU"],
        keras_layers.separable_conv: ["SeparableConv1D", "SeparableConv2D"],
    }.items()
    for name in names
}
RULES |= {
    "BatchNormalization": [_batch_norm],
    "LayerNormalization": [_layer_norm],
    "Normalization": [_normalization],
}
_fused = _by_path(keras_layers.nnx_fused)
RULES |= {
    f"{kind}{suffix}": rules
    for kind, *rules in (
        ("GRU", _gru, _nnx_gru),
        ("LSTM", _by_path(keras_layers.lstm), _by_path(keras_layers.nnx_lstm), _fused),
        ("SimpleRNN", _by_path(keras_layers.simple_rnn), _fused),
    )
    for suffix in ("", "Cell")
}
