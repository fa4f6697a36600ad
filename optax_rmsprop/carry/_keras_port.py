"""A port made from a live Keras model, by the classes of its layers.

For example, take

    model = keras.Sequential([keras.Input((4, 3)), layers.LSTM(5), layers.Dense(2)])

Its port returns

    {"lstm": keras_layers.lstm(weights, "sequential/lstm"),
     "dense": keras_layers.dense(weights, "sequential/dense")}

A layer of a known class is ported by its rule, which is a function of `keras_layers`.
Any other layer is a container: a dict of the layers in it, by their names. It must not
have weights of its own, because nothing says what they become in Flax.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from optax_rmsprop._errors import bare, kind_of, shown, some
from optax_rmsprop.carry import keras_layers
from optax_rmsprop.carry._port import Port

if TYPE_CHECKING:
    import keras

    # From Keras' arrays by path, and a layer and its path, to that layer's tree.
    Rule = Callable[[Mapping[str, np.ndarray], str, keras.Layer], Any]


def keras_port(
    model: keras.Model, rules: Mapping[type[keras.Layer], Rule] | None = None
) -> Port:
    """Make the port of a Keras model.

    Args:
      model: built, so that its weights exist.
      rules: for layers of further classes, functions (weights, path, layer) -> tree.
        They come before our own. Like those, they are for the class and for its
        subclasses with the same `call`. The rule of a layer that contains others may
        call `keras_port(other)(weights)`.

    Returns:
      A function from Keras' arrays by path to a dict, named and nested as the layers
      are. Layers without weights are not in it. A shared layer is in it once, where it
      is first. The count of a Normalization, which only its `adapt` needs, is left out.

    Raises:
      TypeError: a layer of another class has weights, or one of a known class has more
        than that class has by itself, as with LoRA; `model` or `rules` is of another
        kind.
      ValueError: the model is not built; two layers beside each other have one name.
    """
    import keras

    if not isinstance(model, keras.Layer):
        raise TypeError(
            f"`model` must be a keras.Model of Keras 3, got {kind_of(model)}; write "
            "the port by hand"
        )
    if not model.weights:
        raise ValueError(
            "`model` must be built, got one without weights; call it on a batch first"
        )
    known = {
        getattr(keras.layers, name): rule
        for name, rule in RULES.items()
        if hasattr(keras.layers, name)  # an older Keras 3 lacks some
    }
    plan = _plan(model, _checked(rules), known, seen=set())
    return functools.partial(_tree, plan)


def _checked(rules: Any) -> Mapping[Any, Any]:
    if rules is None:
        return {}
    pairs = rules.items() if isinstance(rules, Mapping) else [(rules, None)]
    for kind, rule in pairs:
        if not isinstance(kind, type) or not callable(rule):
            raise TypeError(
                "`rules` must be a dict from classes of layers to functions (weights, "
                f"path, layer) -> tree, got {shown(rules)}; give the class, not a name"
            )
    return rules


def _plan(
    layer: Any, rules: Mapping[Any, Any], known: Mapping[Any, Any], seen: set[int]
) -> Any:
    """A function of Keras' arrays for a layer with a rule, a dict for a container."""
    rule = _rule_for(layer, rules)
    if rule is None:
        rule = _rule_for(layer, known)
        if rule is not None and not _moves_all(rule, layer):
            raise _unknown(layer, layer.weights)
    if rule is not None:
        return functools.partial(_call, rule, layer)
    if own := _own(layer):
        raise _unknown(layer, own)
    plan: dict[str, Any] = {}
    for part in _inner(layer):
        if id(part) in seen or not part.weights:
            continue
        seen.add(id(part))
        if part.name in plan:
            raise ValueError(
                "`model` must have a name of its own for each layer, got two named "
                f"{shown(part.name)} in {bare(layer.name)}; give the layers names"
            )
        plan[part.name] = _plan(part, rules, known, seen)
    return {name: part for name, part in plan.items() if part != {}}


def _inner(layer: Any) -> list[Any]:
    """The layers in a layer; Keras has no public method for one that is no Model."""
    return layer._flatten_layers(include_self=False, recursive=False)


def _own(layer: Any) -> list[Any]:
    """The weights of a layer that are not those of a layer in it."""
    of_inner = {id(variable) for part in _inner(layer) for variable in part.weights}
    return [variable for variable in layer.weights if id(variable) not in of_inner]


def _call(rule: Rule, layer: Any, weights: Mapping[str, np.ndarray]) -> Any:
    return rule(weights, _path(layer), layer)


def _path(layer: Any) -> str:
    """The path of a layer as its own weights have it.

    `layer.path` is set when the layer is built. Weights that it made before, in its
    __init__, have a shorter one.
    """
    own = _own(layer)
    return own[0].path.rpartition("/")[0] if own else layer.path


def _tree(plan: Any, weights: Mapping[str, np.ndarray]) -> Any:
    if callable(plan):
        return plan(weights)
    return {name: _tree(part, weights) for name, part in plan.items()}


def _rule_for(layer: Any, rules: Mapping[Any, Any]) -> Any:
    """The rule of its class, or of a base class whose `call` it has kept."""
    bases: Any = type(layer).__mro__
    for base in bases:
        if base in rules and type(layer).call is base.call:
            return rules[base]
    return None


def _moves_all(rule: Rule, layer: Any) -> bool:
    """Whether a rule uses each weight of a layer, except for integers, which count.

    LoRA, quantization and options such as renorm add weights, and change the function
    that the layer computes. So may a subclass.
    """
    # Views of one zero, which need no memory.
    zeros = {v.path: np.broadcast_to(np.float32(0), v.shape) for v in layer.weights}
    try:
        leaves = jax.tree.leaves(_call(rule, layer, zeros))
    except KeyError:
        return False
    sizes = [math.prod(v.shape) for v in layer.weights if "int" not in str(v.dtype)]
    return sum(map(np.size, leaves)) == sum(sizes)


def _unknown(layer: Any, weights: Any) -> TypeError:
    kind = type(layer)
    names = (variable.path.rpartition("/")[2] for variable in weights)
    return TypeError(
        "`model` must have layers of known classes and with the weights of their "
        f"class, got {bare(f'{kind.__module__}.{kind.__qualname__}')} at "
        f"{bare(_path(layer))} with {some(names)}; say what it becomes by "
        f"rules={{{bare(kind.__name__)}: function(weights, path, layer) -> tree}}"
    )


def _batch_norm(weights: Mapping[str, np.ndarray], path: str, layer: Any) -> Any:
    stats = keras_layers.running_stats(weights, path)
    has_parameters = layer.scale or layer.center
    return stats | (keras_layers.norm(weights, path) if has_parameters else {})


def _gru(weights: Mapping[str, np.ndarray], path: str, layer: Any) -> Any:
    return keras_layers.gru(weights, path, layer.reset_after)


def _normalization(weights: Mapping[str, np.ndarray], path: str, layer: Any) -> Any:
    return {kind: weights[f"{path}/{kind}"] for kind in ("mean", "variance")}


def _by_path(function: Callable[[Mapping[str, np.ndarray], str], Any]) -> Rule:
    return lambda weights, path, layer: function(weights, path)


# By the class's name in keras.layers.
RULES: dict[str, Rule] = {
    name: _by_path(function)
    for function, names in {
        keras_layers.conv: ["Conv1D", "Conv2D", "Conv3D"],
        keras_layers.conv_transpose: [f"Conv{n}DTranspose" for n in (1, 2, 3)],
        keras_layers.dense: ["Dense"],
        keras_layers.depthwise_conv: ["DepthwiseConv1D", "DepthwiseConv2D"],
        keras_layers.einsum_dense: ["EinsumDense"],
        keras_layers.embedding: ["Embedding", "ReversibleEmbedding"],
        keras_layers.lstm: ["LSTM", "LSTMCell"],
        keras_layers.multi_head_attention: ["MultiHeadAttention"],
        keras_layers.norm: [
            f"{kind}Normalization" for kind in ("Group", "Layer", "RMS")
        ],
        keras_layers.prelu: ["PReLU"],
        keras_layers.separable_conv: ["SeparableConv1D", "SeparableConv2D"],
        keras_layers.simple_rnn: ["SimpleRNN", "SimpleRNNCell"],
    }.items()
    for name in names
}
RULES |= {
    "BatchNormalization": _batch_norm,
    "GRU": _gru,
    "GRUCell": _gru,
    "Normalization": _normalization,
}
