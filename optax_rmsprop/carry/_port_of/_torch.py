"""The layers of a model of torch, and the rules of its classes.

A layer is a module whose class has a rule, or a parameter that a container has beside
its children. For example, this model of one linear layer and one parameter

    Net(scale=Parameter(()), head=Linear(3, 2))

has the layers "scale" and "head". A rule calls the function of `torch_layers` with the
options that it reads from the module, such as groups and heads. The classes are
compared by identity, never by name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optax_rmsprop._errors import bare, kind_of, shown, some
from optax_rmsprop.carry import torch_layers
from optax_rmsprop.carry._port_of._layer import (
    Layer,
    Model,
    Path,
    Rule,
    Weights,
    bound,
    unknown,
)
from optax_rmsprop.carry._torch._memory import address, has_shape, problem
from optax_rmsprop.carry._torch._read import tensors_of
from optax_rmsprop.carry.torch_layers import _name

if TYPE_CHECKING:
    import torch


def torch_layers_of(model: Any, rules: Mapping[type, Rule]) -> Model:
    """Walk a model of torch.

    Raises:
      TypeError: `model` is no module; a module without children, or an extension of a
        known layer, has parameters and an unknown class.
      ValueError: a parameter is not initialized.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module or a keras.Model, got {kind_of(model)};"
            " give the live model"
        )
    shapes, tied = {}, set()
    first: dict[Any, str] = {}
    for name, tensor in tensors_of(model).items():
        if first.setdefault(address(tensor), name) != name:
            tied.add(name)
        if has_shape(tensor):
            shapes[name] = tuple(tensor.shape)
        elif isinstance(tensor, torch.nn.Parameter):  # such buffers are left out
            raise ValueError(f"`{bare(name)}` must {problem(tensor)}")
    return Model(list(_layers("", model, rules)), shapes, tied)


def _layers(
    name: str, module: torch.nn.Module, rules: Mapping[type, Rule]
) -> Iterator[Layer]:
    """Yield the layers of a module and its children, in torch's order."""
    import torch

    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"`model` must be of modules of Python, got {kind_of(module)} at "
            f"{shown(name) if name else 'the root'}; give the model before torch.jit"
        )
    path = tuple(name.split(".")) if name else ()
    kind = f"of class {bare(type(module).__name__)}"
    inside = [_name(name, n) for n, _ in module.named_parameters()]
    built_in = _layers_known()
    rule = _rule_for(module, rules)
    if rule is None:
        if (cells := _rule_for(module, _cells_known())) is not None:
            yield from _recurrent(name, path, kind, module, cells)
            return
        rule = _rule_for(module, built_in)
    if rule is not None:
        yield Layer(name, name, path, kind, bound([rule], name, module), inside)
        return
    own = [n for n, p in module._parameters.items() if p is not None]
    lists = torch.nn.ParameterList, torch.nn.ParameterDict
    is_leaf = not module._modules and not isinstance(module, lists)
    if own and (is_leaf or isinstance(module, (*built_in, *_cells_known()))):
        raise unknown(module, name, [*own, *module._buffers], ".")
    for own_name in own:
        whole = _name(name, own_name)
        take = functools.partial(_taken, name=whole)
        yield Layer(whole, whole, (*path, own_name), "a parameter", [take], [whole])
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _layers(_name(name, child_name), child, rules)


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


def _taken(weights: Weights, name: str) -> Any:
    return weights[name]


def _recurrent(
    name: str, path: Path, kind: str, module: Any, rules: list[Any]
) -> Iterator[Layer]:
    """Yield a layer for each cell of an RNN, LSTM or GRU, or for the module itself."""
    import torch

    if isinstance(module, torch.nn.RNNCellBase):
        own = [_name(name, n) for n, _ in module.named_parameters()]
        calls = [functools.partial(rule, name=name, layer=None) for rule in rules]
        yield Layer(name, name, path, kind, calls, own)
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
        whole = _name(name, cell)
        yield Layer(whole, whole, (*path, cell), kind, calls, owned[cell])


@functools.cache
def _cells_known() -> dict[type, list[Any]]:
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


def _layers_known() -> dict[type, Rule]:
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
