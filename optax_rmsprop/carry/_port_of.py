"""Make a port from a live model of torch, by the classes of its modules.

The model is walked once, and becomes a list of layers. A layer is a module whose class
has a rule, or a parameter that a container has beside its children. For example, this
model of one linear layer and one parameter

    Net(scale=Parameter(()), head=Linear(3, 2))

has the layers "scale" and "head". The port calls their rules one after another, and
puts what they return under the layers' names:

    {"scale": ..., "head": {"kernel": ..., "bias": ...}}

Before that, each rule is called once with the numbers of the arrays instead of their
values: "scale" is filled with 0, "head.weight" with 1, and "head.bias" with 2. So we
know the shapes that it returns, and from which array each comes. This shows parameters
that a rule leaves out, and tied ones, which the port must use once.
"""

from __future__ import annotations  # so that help() shows these types by name

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from optax_rmsprop._errors import bare, kind_of, short, shown, some
from optax_rmsprop.carry._keras_port import keras_port
from optax_rmsprop.carry._port import Port
from optax_rmsprop.carry._port_like import Form, Path, fitted, nested
from optax_rmsprop.carry._port_rules import Rule, cells_known, layers_known, rule_for
from optax_rmsprop.carry._torch_memory import address, has_shape, problem
from optax_rmsprop.carry._torch_read import tensors_of
from optax_rmsprop.carry.torch_layers import Weights, _name

if TYPE_CHECKING:
    import keras
    import torch


class _Layer(NamedTuple):
    """A module with a rule, or a parameter beside a container's children.

    Attributes:
      name: torch's.
      path: in the tree of the port.
      kind: the class, as errors show it.
      rules: functions of torch's arrays, one for each layout that Flax has. The port
        uses the first, unless `like` shows another.
      own: the names of its parameters.
    """

    name: str
    path: Path
    kind: str
    rules: Sequence[Callable[[Weights], Any]]
    own: list[str]


def port_of(
    model: torch.nn.Module | keras.Model,
    *,
    like: Any = None,
    rules: Mapping[type, Rule] | None = None,
) -> Port:
    """Make the port of a model of torch, from the classes of its modules; or of Keras.

    The tree is a nested dict with the names of the modules, such as
    {"features": {"0": {"kernel": ..., "bias": ...}}}. Each layer has the names and
    layouts of Flax (see `torch_layers`). An RNN, LSTM or GRU has a cell for each layer
    and direction, "l0", "l0_reverse", "l1" and so on, with both biases of torch. A
    batch norm has its running mean and var beside scale and bias. Weight norm and
    spectral norm keep the trained array in the layout of the layer's kernel; g is
    beside it as scale, in one dimension, and u and v in torch's layout.

    A parameter that a container has beside its children, such as the cls_token of a
    vision transformer, keeps its name and layout. So do those of ParameterList and
    ParameterDict. Other buffers are left out, and so are all but the first name of a
    tied parameter, since a port must use it once: tie it in JAX, too.

    The port does not know how the layers are called. A Linear after a flattened image
    needs a rule with `flattened`, as below, since Flax flattens in another order.

    The port of a Keras model is for `from_keras`. Its tree is named and nested as the
    layers are, which become what `keras_layers` makes of them. A layer of another class
    must have no weights of its own, and becomes a dict of the layers in it.

    Args:
      model: a live model, of Keras a built one. It is not changed. A port of torch does
        not need it any more.
      like: for torch, a tree of Flax, whose structure and names the port shall return:
        variables of Linen ({"params": ...}, with or without batch_stats, or the
        parameters alone), an `nnx.Module`, an `nnx.State`, or a pure dict of one. Only
        its shapes are used. Layers are matched to layers with the same leaves of the
        same shapes.
        If several layers have the same, their names must decide: layers.0 is layers_0,
        and numbers alone count by their order. If `like` has no running statistics,
        the port leaves them out. A cell of NNX must have both biases
        (`torch_layers.both_biases`). A cell of Linen gets both, for
        `torch_layers.one_bias` in the loss; name two directions "l0" and "l0_reverse".
      rules: for each class that is not known, a function from torch's arrays, the
        module's name and the module to a dict of arrays, nested or not, or to one
        array. It must use all parameters of the module and its children. Rules come
        before the built-in ones. As those, they apply to subclasses without a forward
        (in Keras a `call`) of their own. A rule for Keras gets Keras' arrays, the path
        that its weights have, and the layer.

    Returns:
      The port: a function from a dict of torch's arrays to the tree.

    Raises:
      KeyError: a module lacks an array that its rule asks for.
      TypeError: the model, `like` or a rule is of another kind; a module without
        children, or an extension of a known layer, has parameters and an unknown class.
      ValueError: a rule leaves out parameters of its module, or changes arrays; Flax
        has no such layer (an LSTM with proj_size, attention with add_bias_kv); a
        parameter is not initialized; layers of the model or of `like` have no match,
        or several.

    Example:
      >>> import torch
      >>> from optax_rmsprop.carry import from_torch, port_of, torch_layers
      >>> conv, head = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(4 * 6 * 6, 2)
      >>> model = torch.nn.Sequential(conv, torch.nn.Flatten(), head)
      >>> def flattened(weights, name, module):
      ...     return torch_layers.linear(weights, name, flattened=(4, 6, 6))
      >>> port = port_of(model, rules={torch.nn.Linear: flattened})
      >>> run = from_torch(model, torch.optim.RMSprop(model.parameters()), port)
      >>> run.params["0"]["kernel"].shape, run.params["2"]["kernel"].shape
      ((3, 3, 1, 4), (144, 2))

    References:
      torch/nn/modules, torch/nn/utils (2.13.0); flax/linen and flax/nnx/nn (0.12.8);
      transformers/pytorch_utils.py: Conv1D (4.57).
    """
    keras_layer = getattr(sys.modules.get("keras"), "Layer", ())
    if isinstance(model, keras_layer):
        if like is not None:
            raise ValueError(
                "`like` must be None for a Keras model, got a tree; rename the leaves "
                "of the tree that the port returns"
            )
        return keras_port(model, rules)

    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module or a keras.Model, got {kind_of(model)};"
            " give the live model"
        )
    _check_rules(rules)
    numbered = _Numbered(tensors_of(model))
    layers, forms = [], []
    for layer in _layers("", model, rules or {}):
        found = [numbered.read(layer, rule) for rule in layer.rules]
        if found[0].shapes:
            layers.append(layer)
            forms.append(found)
    if like is None:
        # Each layer's first form, under the layer's own path.
        targets = [
            (0, {path: (*layer.path, *path) for path in found[0].shapes})
            for layer, found in zip(layers, forms, strict=True)
        ]
        build: Callable[[dict[Path, Any]], Any] = nested
    else:
        targets, build = fitted([layer.name for layer in layers], forms, like)
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

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        import torch

        self._names = list(tensors)
        self._arrays: dict[str, np.ndarray] = {}
        self._further: set[str] = set()  # all but the first names of tied tensors
        first: dict[Any, str] = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            if first.setdefault(address(tensor), name) != name:
                self._further.add(name)
            if has_shape(tensor):
                # All elements are the same one in memory.
                self._arrays[name] = np.broadcast_to(
                    np.float32(number), tuple(tensor.shape)
                )
            elif isinstance(tensor, torch.nn.Parameter):  # such buffers are left out
                raise ValueError(f"`{bare(name)}` must {problem(tensor)}")

    def read(self, layer: _Layer, rule: Callable[[Weights], Any]) -> Form:
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
            tied = sources & self._further
            if tied and tied != sources:
                raise ValueError(
                    f"the rule for {where} must keep {some(tied, most=120)} apart "
                    "from other arrays, since it is tied to an earlier one; untie it "
                    "in torch, or give a rule that returns it in a leaf of its own"
                )
            if not tied:
                shapes[path] = leaf.shape
                if sources and sources.isdisjoint(layer.own):
                    buffers.add(path)
        missing = [n for n in layer.own if self._arrays[n].size and n not in used]
        if missing:
            raise ValueError(
                f"the rule for {where} must use all of its parameters, but leaves out "
                f"{some(missing, most=120)}; add rules={{{layer.kind.split()[-1]}: f}}"
                ", where f(weights, name, module) returns all of them"
            )
        return Form(shapes, buffers)

    def _sources(self, leaf: Any, where: str) -> set[str]:
        """The names of the arrays from which a leaf is made."""
        if not np.size(leaf):
            return set()
        low, high = np.min(leaf), np.max(leaf)
        numbers = [low] if low == high else np.unique(np.asarray(leaf))
        found = list(map(float, numbers))
        if not all(n.is_integer() and 0 <= n < len(self._names) for n in found):
            raise ValueError(
                f"the rule for {where} must only move elements, but changes some; "
                "let it rename, reshape, transpose, split, concatenate and stack"
            )
        return {self._names[int(number)] for number in found}


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
    usage = "give {MyLayer: f} with a function f(weights, name, module)"
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"`rules` must be a dict from classes to functions, got {kind_of(rules)}; "
            + usage
        )
    for kind, rule in rules.items():
        if not isinstance(kind, type) or isinstance(rule, type) or not callable(rule):
            raise TypeError(
                "`rules` must have classes for keys and functions for values, got "
                f"{shown(kind)}: {shown(rule)}; {usage}"
            )


def _layers(
    name: str, module: torch.nn.Module, rules: Mapping[type, Rule]
) -> Iterator[_Layer]:
    """Yield the layers of a module and its children, in torch's order."""
    import torch

    path = tuple(name.split(".")) if name else ()
    kind = f"of class {bare(type(module).__name__)}"
    inside = [_name(name, n) for n, _ in module.named_parameters()]
    if (rule := rule_for(module, rules)) is not None:
        yield _Layer(name, path, kind, [_bound(rule, name, module)], inside)
        return
    built_in = layers_known()
    if (cells := rule_for(module, cells_known())) is not None:
        yield from _recurrent(name, path, kind, module, cells)
        return
    if (rule := rule_for(module, built_in)) is not None:
        yield _Layer(name, path, kind, [_bound(rule, name, module)], inside)
        return
    own = [n for n, p in module._parameters.items() if p is not None]
    lists = torch.nn.ParameterList, torch.nn.ParameterDict
    is_leaf = not module._modules and not isinstance(module, lists)
    extends = isinstance(module, (*built_in, *cells_known()))
    if own and (is_leaf or extends):
        raise TypeError(
            f"{shown(name)} must be of a class that port_of knows, got "
            f"{short(f'{type(module).__module__}.{type(module).__qualname__}', 100)} "
            f"with {some([*own, *module._buffers], most=60)}; add rules="
            f"{{{bare(type(module).__name__)}: f}}, where f returns its arrays, such "
            "as lambda weights, name, module: "
            f"{{'{short(own[0], 40)}': weights[f'{{name}}.{short(own[0], 40)}']}}"
        )
    for own_name in own:
        whole = _name(name, own_name)
        take = functools.partial(_taken, name=whole)
        yield _Layer(whole, (*path, own_name), "a parameter", [take], [whole])
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _layers(_name(name, child_name), child, rules)


def _taken(weights: Weights, name: str) -> np.ndarray:
    return weights[name]


def _bound(rule: Rule, name: str, module: Any) -> Callable[[Weights], Any]:
    return lambda weights: rule(weights, name, module)


def _recurrent(
    name: str, path: Path, kind: str, module: Any, rules: list[Any]
) -> Iterator[_Layer]:
    """Yield a layer for each cell of an RNN, LSTM or GRU, or for the module itself."""
    import torch

    if isinstance(module, torch.nn.RNNCellBase):
        own = [_name(name, n) for n, _ in module.named_parameters()]
        calls = [functools.partial(rule, name=name, layer=None) for rule in rules]
        yield _Layer(name, path, kind, calls, own)
        return
    directions = (False, True) if module.bidirectional else (False,)
    cells = {
        f"l{number}" + "_reverse" * reverse: (number, reverse)
        for number in range(module.num_layers)
        for reverse in directions
    }
    owned: dict[str, list[str]] = {cell: [] for cell in cells}
    for own_name, _ in module.named_parameters():
        # weight_ih_l0_reverse is of l0_reverse. The first cell gets names that are of
        # no cell, so that its rule is found to leave them out.
        cell = "l" + own_name.partition("_l")[2]
        owned[cell if cell in owned else "l0"].append(_name(name, own_name))
    for cell, (number, reverse) in cells.items():
        calls = [
            functools.partial(rule, name=name, layer=number, reverse=reverse)
            for rule in rules
        ]
        yield _Layer(_name(name, cell), (*path, cell), kind, calls, owned[cell])
