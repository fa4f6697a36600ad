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

from optax_rmsprop._errors import bare, kind_of, shown, some
from optax_rmsprop.carry import torch_layers
from optax_rmsprop.carry._port import Port
from optax_rmsprop.carry._port_like import Form, Path, fitted, nested
from optax_rmsprop.carry._torch_memory import address, problem
from optax_rmsprop.carry._torch_read import tensors_of
from optax_rmsprop.carry.torch_layers import Weights, _name

if TYPE_CHECKING:
    import torch

Rule = Callable[[Weights, str, Any], Any]


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
    model: torch.nn.Module,
    *,
    like: Any = None,
    rules: Mapping[type, Rule] | None = None,
) -> Port:
    """Make the port of a model, for `from_torch`, from the classes of its modules.

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

    Args:
      model: a live model. It is not changed, and not needed by the port.
      like: a tree of Flax, whose structure and names the port shall return: variables
        of Linen ({"params": ...}, with or without batch_stats, or the parameters
        alone), an `nnx.Module`, an `nnx.State`, or a pure dict of one. Only its shapes
        are used. Layers are matched to layers with the same leaves of the same shapes.
        If several layers have the same, their names must decide: layers.0 is layers_0,
        and numbers alone count by their order. If `like` has no running statistics,
        the port leaves them out. A cell of NNX must have both biases
        (`torch_layers.both_biases`). A cell of Linen gets both, for
        `torch_layers.one_bias` in the loss; name two directions "l0" and "l0_reverse".
      rules: for each class that is not known, a function from torch's arrays, the
        module's name and the module to a dict of arrays, nested or not, or to one
        array. It must use all parameters of the module and its children. Rules come
        before the built-in ones. As those, they apply to subclasses without a forward
        of their own.

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
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {kind_of(model)}; give the live "
            "model"
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
        self._names = list(tensors)
        self._arrays: dict[str, np.ndarray] = {}
        self._further: set[str] = set()  # all but the first names of tied tensors
        first: dict[Any, str] = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            if first.setdefault(address(tensor), name) != name:
                self._further.add(name)
            reason = problem(tensor)
            if reason is None or tensor.is_meta or tensor.is_sparse:
                # All elements are the same one in memory.
                self._arrays[name] = np.broadcast_to(
                    np.float32(number), tuple(tensor.shape)
                )
            elif tensor.requires_grad:  # no port uses a buffer without a shape
                raise ValueError(f"`{bare(name)}` must {reason}")

    def read(self, layer: _Layer, rule: Callable[[Weights], Any]) -> Form:
        """The leaves that a rule makes of arrays which the port is to use."""
        where = f"`{bare(layer.name)}`, {layer.kind}"
        try:
            tree = rule(self._arrays)
        except KeyError as error:
            name = error.args[0] if error.args else None
            if name is None or name in self._arrays:
                raise
            raise KeyError(
                f"the rule for {where} asks for {shown(name)}, which the model does "
                f"not have; it has {some(layer.own)}; undo what replaced it, or give a "
                "rule that uses these"
            ) from error
        shapes, buffers, used = {}, set(), set()
        for path, leaf in _flat(tree, f"the rule for {where}").items():
            sources = self._sources(leaf, where)
            used |= sources
            tied = sources & self._further
            if tied and tied != sources:
                raise ValueError(
                    f"the rule for {where} must keep {some(tied)} apart from other "
                    "arrays, since it is tied to an earlier one; untie it in torch, or "
                    "give a rule that returns it in a leaf of its own"
                )
            if not tied:
                shapes[path] = leaf.shape
                if sources and sources.isdisjoint(layer.own):
                    buffers.add(path)
        missing = [n for n in layer.own if self._arrays[n].size and n not in used]
        if missing:
            raise ValueError(
                f"the rule for {where} must use all of its parameters, but leaves out "
                f"{some(missing)}; add rules={{{bare(layer.kind.split()[-1])}: f}}, "
                "where f(weights, name, module) returns all of them"
            )
        return Form(shapes, buffers)

    def _sources(self, leaf: Any, where: str) -> set[str]:
        """The names of the arrays from which a leaf is made."""
        if not np.size(leaf):
            return set()
        low, high = np.min(leaf), np.max(leaf)
        numbers = [low] if low == high else np.unique(np.asarray(leaf))
        found = {number: int(number) for number in map(float, numbers)}
        if any(n != i or not 0 <= i < len(self._names) for n, i in found.items()):
            raise ValueError(
                f"the rule for {where} must only move elements, but changes some; "
                "let it rename, reshape, transpose, split, concatenate and stack"
            )
        return {self._names[number] for number in found.values()}


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
    if (rule := _rule_for(module, rules)) is not None:
        yield _Layer(name, path, kind, [_bound(rule, name, module)], inside)
        return
    built_in = _built_in()
    if (cells := _rule_for(module, _cells())) is not None:
        yield from _recurrent(name, path, kind, module, cells)
        return
    if (rule := _rule_for(module, built_in)) is not None:
        yield _Layer(name, path, kind, [_bound(rule, name, module)], inside)
        return
    own = [n for n, p in module._parameters.items() if p is not None]
    lists = torch.nn.ParameterList, torch.nn.ParameterDict
    is_leaf = not module._modules and not isinstance(module, lists)
    extends = isinstance(module, (*built_in, *_cells()))
    if own and (is_leaf or extends):
        raise TypeError(
            f"{shown(name)} must be of a class that port_of knows, got "
            f"{bare(type(module).__module__)}.{bare(type(module).__qualname__)} with "
            f"{some(own)}; add rules={{{bare(type(module).__name__)}: f}}, where f "
            "returns its arrays, such as lambda weights, name, module: "
            "{'kernel': weights[f'{name}." + bare(own[0]) + "'].T}"
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


def _rule_for(module: torch.nn.Module, rules: Mapping[type, Any]) -> Any:
    """The rule of a module's class, or of a base class whose computation it has."""
    own = type(module)
    for kind in own.__mro__:
        if kind in rules and all(
            getattr(own, method, None) is getattr(kind, method, None)
            for method in ("forward", "_conv_forward", "__call__")
        ):
            return rules[kind]
    return None


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


@functools.cache
def _cells() -> dict[type, list[Any]]:
    """The layouts that Flax has for each recurrent class; the first is Linen's."""
    import torch

    lstm = [torch_layers.lstm, torch_layers.nnx_lstm, torch_layers.nnx_fused]
    gru = [torch_layers.gru, torch_layers.nnx_fused]
    rnn = [torch_layers.rnn, torch_layers.nnx_fused]
    return {
        torch.nn.LSTM: lstm,
        torch.nn.LSTMCell: lstm,
        torch.nn.GRU: gru,
        torch.nn.GRUCell: gru,
        torch.nn.RNN: rnn,
        torch.nn.RNNCell: rnn,
    }


def _built_in() -> dict[type, Rule]:
    """The rules of the other classes."""
    hugging_face = sys.modules.get("transformers.pytorch_utils")
    if conv1d := getattr(hugging_face, "Conv1D", None):
        return _of_torch() | {conv1d: _plain(torch_layers.hf_conv1d)}
    return _of_torch()


@functools.cache
def _of_torch() -> dict[type, Rule]:
    from torch import nn

    conv, conv_transpose, embedding = (
        _normed(torch_layers.conv),
        _normed(torch_layers.conv_transpose, "groups"),
        _normed(torch_layers.embedding),
    )
    return {
        nn.Linear: _normed(torch_layers.linear),
        nn.Conv1d: conv,
        nn.Conv2d: conv,
        nn.Conv3d: conv,
        nn.ConvTranspose1d: conv_transpose,
        nn.ConvTranspose2d: conv_transpose,
        nn.ConvTranspose3d: conv_transpose,
        nn.Embedding: embedding,
        nn.EmbeddingBag: embedding,
        nn.BatchNorm1d: _norm,
        nn.BatchNorm2d: _norm,
        nn.BatchNorm3d: _norm,
        nn.SyncBatchNorm: _norm,
        nn.InstanceNorm1d: _norm,
        nn.InstanceNorm2d: _norm,
        nn.InstanceNorm3d: _norm,
        nn.LayerNorm: _norm,
        nn.GroupNorm: _norm,
        nn.RMSNorm: _norm,
        nn.MultiheadAttention: _attention,
        nn.PReLU: _plain(torch_layers.prelu),
    }


def _plain(function: Callable[..., Any]) -> Rule:
    return lambda weights, name, module: function(weights, name)


def _attention(weights: Weights, name: str, module: Any) -> dict[str, Any]:
    return torch_layers.attention(weights, name, module.num_heads)


def _norm(weights: Weights, name: str, module: Any) -> dict[str, Any]:
    tree = {} if module.weight is None else torch_layers.norm(weights, name)
    if getattr(module, "running_mean", None) is not None:
        tree |= torch_layers.running_stats(weights, name)
    return tree


def _normed(function: Callable[..., Any], *options: str) -> Rule:
    """The rule of a class that torch can give a weight norm or a spectral norm.

    These replace `weight` by another array of its shape, which is trained.
    """

    def rule(weights: Weights, name: str, module: Any) -> dict[str, Any]:
        arguments = [getattr(module, option) for option in options]
        trained, beside = _trained(name, module)
        if trained == "weight":
            return function(weights, name, *arguments)
        renamed = {_name(name, "weight"): weights[_name(name, trained)]}
        tree = function({**weights, **renamed}, name, *arguments)
        for key, array in beside.items():
            value = weights[_name(name, array)]
            tree[key] = value.ravel() if value.ndim else value
        return tree

    return rule


def _trained(name: str, module: Any) -> tuple[str, dict[str, str]]:
    """The name of the trained weight, and of further arrays of a norm around it."""
    from torch.nn.utils import parametrizations, parametrize
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    if parametrize.is_parametrized(module):
        kinds = {
            key: [type(step) for step in steps]
            for key, steps in module.parametrizations.items()
        }
        at = "parametrizations.weight"
        if kinds == {"weight": [parametrizations._WeightNorm]}:
            return f"{at}.original1", {"scale": f"{at}.original0"}
        if kinds == {"weight": [parametrizations._SpectralNorm]}:
            return f"{at}.original", {"u": f"{at}.0._u", "v": f"{at}.0._v"}
        found = [f"{key}: {step.__name__}" for key in kinds for step in kinds[key]]
        raise TypeError(
            f"{shown(name)} must have no parametrization, or one weight_norm or "
            f"spectral_norm of its weight, got {some(found)}; add rules="
            f"{{{bare(type(module).__mro__[1].__name__)}: f}}, where f(weights, name, "
            "module) returns its trained arrays"
        )
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return "weight_v", {"scale": "weight_g"}
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return "weight_orig", {"u": "weight_u", "v": "weight_v"}
    return "weight", {}
