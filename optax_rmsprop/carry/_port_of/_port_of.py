"""Make a port from a live model of torch or Keras, by the classes of its layers.

The model is walked once, and becomes a list of layers. The port calls their rules one
after another, and puts what they return under the layers' names. The layers "scale" and
"head" of a model become, for example,

    {"scale": ..., "head": {"kernel": ..., "bias": ...}}

Before that, each rule is called once with the numbers of the arrays instead of their
values: "scale" is filled with 1, "head.weight" with 2, and "head.bias" with 3. So we
know the shapes that it returns, and from which array each comes. This shows parameters
that a rule leaves out, and tied ones, which the port must use once.
"""

from __future__ import annotations  # so that help() shows these types by name

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from optax_rmsprop._errors import kind_of, shown, some
from optax_rmsprop.carry._port import Port
from optax_rmsprop.carry._port_of._keras import keras_layers_of
from optax_rmsprop.carry._port_of._layer import Layer, Model, Path, Rule, Weights
from optax_rmsprop.carry._port_of._like import Form, fitted, nested
from optax_rmsprop.carry._port_of._torch import torch_layers_of

if TYPE_CHECKING:
    import keras
    import torch


def port_of(
    model: torch.nn.Module | keras.Model,
    *,
    like: Any = None,
    rules: Mapping[type, Rule] | None = None,
) -> Port:
    """Make the port of a live model of torch or Keras, from the classes of its layers.

    The tree is a nested dict with the names of the modules, such as
    {"features": {"0": {"kernel": ..., "bias": ...}}}. Each layer has the names and
    layouts of Flax (see `torch_layers` and `keras_layers`). The port does not know how
    the layers are called. A Linear after a flattened image needs a rule with
    `flattened`, as below, since Flax flattens in another order than torch.

    Of torch, an RNN, LSTM or GRU has a cell for each layer and direction, "l0",
    "l0_reverse", "l1" and so on, with both biases. A batch norm has its running mean
    and var beside scale and bias. Weight norm and spectral norm keep the trained array
    in the layout of the layer's kernel; g is beside it as scale, in one dimension, and
    u and v in torch's layout. A parameter that a container has beside its children,
    such as the cls_token of a vision transformer, keeps its name and layout. So do
    those of ParameterList and ParameterDict. Other buffers are left out, and so are all
    but the first name of a tied parameter, since a port must use it once: tie it in
    JAX, too.

    Of Keras, a layer without a rule becomes a dict of the layers in it, and must not
    have weights of its own. A shared layer is in the tree where the model has it first.
    The count of a Normalization, which only its `adapt` needs, is left out.

    Args:
      model: a live model, of Keras a built one. It is not changed. A port of torch does
        not need it any more.
      like: a tree of Flax, whose structure and names the port shall return: variables
        of Linen ({"params": ...}, with or without batch_stats, or the parameters
        alone), an `nnx.Module`, an `nnx.State`, or a pure dict of one. Only its shapes
        are used. Layers are matched to layers with the same leaves of the same shapes.
        If several layers have the same, their names must decide: layers.0 is layers_0,
        and numbers alone count by their order. So do the numbers of Keras' automatic
        names in a Sequential or functional model, if the layers were made in the order
        of the calls; elsewhere these numbers do not decide. If `like` has no running
        statistics, the port leaves them out. Where a cell has two biases, one of NNX
        must have both, too (`torch_layers.both_biases`). One of Linen gets both, for
        `torch_layers.one_bias` in the loss; name two directions "l0" and "l0_reverse".
      rules: for each class that is not known, a function from the model's arrays, the
        layer's name and the live layer to a dict of arrays, nested or not, or to one
        array. The names of Keras are paths. A rule must use all parameters of the layer
        and its children. Rules come before the built-in ones. As those, they apply to
        subclasses without a forward of their own; in Keras to those without any method
        but for construction, configuration and shapes.

    Returns:
      The port: a function from a dict of the model's arrays to the tree.

    Raises:
      KeyError: a layer lacks an array that its rule asks for.
      TypeError: the model, `like` or a rule is of another kind; a layer of an unknown
        class, or an extension of a known one, has parameters of its own.
      ValueError: a rule leaves out parameters of its layer, or changes arrays; Flax
        has no such layer (an LSTM with proj_size, attention with add_bias_kv); a
        parameter is not initialized, or a Keras model is not built; layers of the model
        or of `like` have no match, or several.

    Example:
      >>> import torch
      >>> from optax_rmsprop.carry import from_torch, port_of, torch_layers
      >>> conv, head = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(4 * 6 * 6, 2)
      >>> model = torch.nn.Sequential(conv, torch.nn.Flatten(), head)
      >>> def flattened(weights, name, layer):
      ...     return torch_layers.linear(weights, name, flattened=(4, 6, 6))
      >>> port = port_of(model, rules={torch.nn.Linear: flattened})
      >>> run = from_torch(model, torch.optim.RMSprop(model.parameters()), port)
      >>> run.params["0"]["kernel"].shape, run.params["2"]["kernel"].shape
      ((3, 3, 1, 4), (144, 2))

    References:
      torch/nn/modules, torch/nn/utils (2.13.0); flax/linen and flax/nnx/nn (0.12.8);
      transformers/pytorch_utils.py: Conv1D (4.57).
    """
    _check_rules(rules)
    keras_layer = getattr(sys.modules.get("keras"), "Layer", ())
    walk = keras_layers_of if isinstance(model, keras_layer) else torch_layers_of
    found = walk(model, rules or {})
    numbered = _Numbered(found)
    layers, forms = [], []
    for layer in found.layers:
        of_layer = [numbered.read(layer, rule) for rule in layer.rules]
        if of_layer[0].shapes:
            layers.append(layer)
            forms.append(of_layer)
    if like is None:
        # Each layer's first form, under the layer's own path.
        targets = [
            (0, {path: (*layer.path, *path) for path in of_layer[0].shapes})
            for layer, of_layer in zip(layers, forms, strict=True)
        ]
        build: Callable[[dict[Path, Any]], Any] = nested
    else:
        targets, build = fitted(layers, forms, like)
    steps = [
        (layer.rules[number], paths)
        for layer, (number, paths) in zip(layers, targets, strict=True)
    ]

    def port(weights: Weights) -> Any:
        leaves = {}
        for rule, paths in steps:
            arrays = _flat(rule(weights))
            leaves.update({target: arrays[path] for path, target in paths.items()})
        return build(leaves)

    return port


class _Numbered:
    """The model's arrays, each filled with its number, in which rules are tried out."""

    def __init__(self, model: Model):
        self._names = list(model.shapes)
        self._tied = model.tied
        # All elements of an array are the same one in memory.
        self._arrays = {
            name: np.broadcast_to(np.float32(number), shape)
            for number, (name, shape) in enumerate(model.shapes.items(), start=1)
        }

    def read(self, layer: Layer, rule: Callable[[Weights], Any]) -> Form:
        """The leaves that a rule makes of arrays which the port is to use."""
        where = f"{shown(layer.name)}, {layer.kind}"
        try:
            tree = rule(dict(self._arrays))
        except KeyError as error:
            name = error.args[0] if error.args else None
            if name is None or name in self._arrays:
                raise
            raise KeyError(
                f"the rule for {where} asks for {shown(name)}, which the model does "
                f"not have; it has {some(layer.own, most=120)}; undo what replaced it, "
                "or give a rule that uses these"
            ) from error
        shapes, buffers, used = {}, set(), set()
        for path, leaf in _flat(tree, f"the rule for {where}").items():
            sources = self._sources(leaf, where)
            used |= sources
            tied = sources & self._tied
            if tied and tied != sources:
                raise ValueError(
                    f"the rule for {where} must keep {some(tied, most=120)} apart "
                    "from other arrays, since it is tied to an earlier one; untie it, "
                    "or give a rule that returns it in a leaf of its own"
                )
            if not tied:
                shapes[path] = leaf.shape
                if sources and sources.isdisjoint({*layer.own} - {*layer.statistics}):
                    buffers.add(path)
        missing = [n for n in layer.own if self._arrays[n].size and n not in used]
        if missing:
            raise ValueError(
                f"the rule for {where} must use all of its parameters, but leaves out "
                f"{some(missing, most=120)}; add rules={{{layer.kind.split()[-1]}: f}}"
                ", where f(weights, name, layer) returns all of them"
            )
        return Form(shapes, buffers)

    def _sources(self, leaf: Any, where: str) -> set[str]:
        """The names of the arrays from which a leaf is made."""
        if not np.size(leaf):
            return set()
        low, high = np.min(leaf), np.max(leaf)
        numbers = [low] if low == high else np.unique(np.asarray(leaf))
        found = list(map(float, numbers))
        if not all(n.is_integer() and 0 < n <= len(self._names) for n in found):
            raise ValueError(
                f"the rule for {where} must only move elements, but changes some; "
                "let it rename, reshape, transpose, split, concatenate and stack"
            )
        return {self._names[int(number) - 1] for number in found}


def _flat(tree: Any, what: str = "", path: Path = ()) -> dict[Path, Any]:
    """The leaves of nested dicts, by their paths."""
    if not isinstance(tree, Mapping):
        if what and not isinstance(tree, np.ndarray | np.generic | jax.Array):
            raise TypeError(
                f"{what} must return an array or a dict of arrays, nested or not, got "
                f"{kind_of(tree)} at {some(path) or 'the root'}; make it a dict"
            )
        return {path: tree}
    leaves = {}
    for key, value in tree.items():
        leaves.update(_flat(value, what, (*path, str(key))))
    return leaves


def _check_rules(rules: Any) -> None:
    if rules is None:
        return
    usage = "give {MyLayer: f} with a function f(weights, name, layer)"
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"`rules` must be a dict from classes to functions, got {kind_of(rules)}; "
            + usage
        )
    for kind, rule in rules.items():
        if not isinstance(kind, type) or isinstance(rule, type) or not _is_rule(rule):
            raise TypeError(
                "`rules` must have classes for keys and functions of three arguments "
                f"for values, got {shown(kind)}: {shown(rule)}; {usage}"
            )


def _is_rule(rule: Any) -> bool:
    try:
        inspect.signature(rule).bind("weights", "name", "layer")
    except ValueError:  # a function in C does not tell
        return callable(rule)
    except TypeError:
        return False
    return True
