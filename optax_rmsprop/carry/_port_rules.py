"""The classes of torch that `port_of` knows, with a rule for each.

A rule is a function from torch's arrays, a module's name and the module to a dict of
arrays. It calls the function of `torch_layers` with the options that it reads from the
module, such as groups and heads. The classes are compared by identity, never by name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from optax_rmsprop._errors import bare, shown, some
from optax_rmsprop.carry import torch_layers
from optax_rmsprop.carry.torch_layers import Weights, _name

if TYPE_CHECKING:
    import torch

Rule = Callable[[Weights, str, Any], Any]


def rule_for(module: torch.nn.Module, rules: Mapping[type, Any]) -> Any:
    """The rule of a module's class, or of a base class whose computation it has."""
    own = type(module)
    for kind in own.__mro__:
        if kind in rules and all(
            getattr(own, method, None) is getattr(kind, method, None)
            for method in ("forward", "_conv_forward", "__call__")
        ):
            return rules[kind]
    return None


@functools.cache
def cells_known() -> dict[type, list[Any]]:
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


def layers_known() -> dict[type, Rule]:
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
