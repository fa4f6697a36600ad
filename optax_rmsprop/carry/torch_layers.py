"""The usual layers of torch in the names and layouts of Flax, for ports of runs.

Each function takes torch's arrays by name, as a port does, and the name of one layer,
and returns that layer's parameters as Flax Linen and NNX call them:

    from optax_rmsprop.carry import from_torch, torch_layers

    def port(weights):
        return {
            "conv": torch_layers.conv(weights, "features.0"),
            "norm": torch_layers.norm(weights, "features.1"),
            "head": torch_layers.linear(weights, "classifier"),
        }

They only move elements. A layer without a bias (or without affine parameters) has none
in Flax either. `port_of` calls them for a whole model. Options that are not parameters
must be set in Flax by hand:

torch | Flax
---|---
eps of BatchNorm, LayerNorm and GroupNorm, 1e-5 | epsilon; 1e-5 in BatchNorm, else 1e-6
eps of RMSNorm, by default the eps of its dtype | epsilon; 1e-6 by default
a variance without cancellation | use_fast_variance=False in every norm
LayerNorm over several dimensions | reduction_axes and feature_axes, both
momentum=0.1 of BatchNorm | momentum=0.9; 0.99 by default
padding=n of a convolution, 0 by default | padding=n; "SAME" by default
groups of a convolution | feature_group_count
padding=n of a transposed one | padding=dilation * (kernel - 1) - n, before and after
output_padding=m of it | m more after
batch_first=False of RNN, LSTM and GRU, the default | time_major=True of RNN
nonlinearity="relu" of RNN | activation_fn=jax.nn.relu of SimpleCell
padding_idx of Embedding, whose row has no gradient | a gradient of 0 for that row
max_norm of Embedding | rows scaled by hand, before each step
mode of EmbeddingBag | a mean, sum or maximum of `Embed`'s outputs

BatchNorm's running variance is the variance of a sample (divided by n - 1) in torch,
and of the population (by n) in Flax. So the carried one is slightly too large for Flax
until training has replaced it.
"""

from __future__ import annotations  # so that help() shows these types by name

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from optax_rmsprop._errors import bare, kind_of, shown

if TYPE_CHECKING:
    from flax import nnx

__all__ = [
    "attention",
    "both_biases",
    "conv",
    "conv_transpose",
    "embedding",
    "gru",
    "hf_conv1d",
    "linear",
    "lstm",
    "nnx_fused",
    "nnx_lstm",
    "norm",
    "one_bias",
    "prelu",
    "rnn",
    "running_stats",
]

Weights = Mapping[str, np.ndarray]
# In the order in which torch stacks them. A simple RNN has one, without a name.
GATES: dict[str, Sequence[str]] = {"lstm": "ifgo", "gru": "rzn", "rnn": ("",)}


def linear(
    weights: Weights, name: str, flattened: tuple[int, ...] | None = None
) -> dict[str, np.ndarray]:
    """`torch.nn.Linear`, (out, in), as `Dense` or `nnx.Linear`, (in, out).

    Args:
      weights: torch's arrays by name.
      name: of the layer.
      flattened: where the input is a flattened image, its (channels, height, width) in
        torch. Flax has the channels last, and so flattens to another order.
    """
    weight = _at(weights, name, "weight")
    if flattened:
        weight = np.moveaxis(weight.reshape(len(weight), *flattened), 1, -1)
    return _layer(weights, name, kernel=weight.reshape(len(weight), -1).T)


def conv(weights: Weights, name: str) -> dict[str, np.ndarray]:
    """`torch.nn.Conv1d`, 2d, 3d as `Conv`: (out, in, ...) becomes (..., in, out).

    In a grouped convolution both count the input channels of one group.
    """
    kernel = np.moveaxis(_at(weights, name, "weight"), (0, 1), (-1, -2))
    return _layer(weights, name, kernel=kernel)


def conv_transpose(
    weights: Weights, name: str, groups: int = 1
) -> dict[str, np.ndarray]:
    """`torch.nn.ConvTranspose1d`, 2d, 3d as `ConvTranspose`, which flips no kernel.

    (in, out, ...) becomes (..., in, out), reversed in space. Flax's layer has no
    groups. With groups, the kernel is for `Conv` with input_dilation=stride,
    feature_group_count=groups and the padding of a transposed convolution, which is the
    same function.

    Raises:
      ValueError: the bias shows that torch has another number of groups.
    """
    weight = _at(weights, name, "weight")
    n_in, n_out, *size = weight.shape
    layer = _layer(weights, name)
    if "bias" in layer and layer["bias"].size != n_out * groups:
        raise ValueError(
            f"`groups` must be torch's, {layer['bias'].size // n_out} in "
            f"{shown(name)}, got {shown(groups)}; give those of the layer in torch"
        )
    kernel = np.flip(weight, tuple(range(2, weight.ndim)))
    kernel = kernel.reshape(groups, n_in // groups, n_out, *size)
    kernel = np.moveaxis(kernel, (1, 0, 2), (-3, -2, -1))
    return {"kernel": kernel.reshape(*size, n_in // groups, groups * n_out)} | layer


def hf_conv1d(weights: Weights, name: str) -> dict[str, np.ndarray]:
    """`transformers.pytorch_utils.Conv1D`, (in, out), as `Dense` or `nnx.Linear`."""
    return _layer(weights, name, kernel=_at(weights, name, "weight"))


def embedding(weights: Weights, name: str) -> dict[str, np.ndarray]:
    """`torch.nn.Embedding` or EmbeddingBag as `Embed`."""
    return {"embedding": _at(weights, name, "weight")}


def attention(weights: Weights, name: str, heads: int) -> dict[str, Any]:
    """`torch.nn.MultiheadAttention` as `MultiHeadDotProductAttention`.

    In NNX the class is `MultiHeadAttention`. torch's arrays of query, key and value,
    (out, in), become kernels of shape (in, heads, size of a head), whether torch has
    them in one array or, with kdim or vdim, in three. The output's, (out, in), becomes
    (heads, size of a head, out).

    Args:
      weights, name: torch's arrays, and the name of the layer.
      heads: torch's num_heads.

    Raises:
      ValueError: the layer has add_bias_kv, which Flax does not have, or a size that
        is not a multiple of `heads`.
    """
    if _name(name, "bias_k") in weights:
        raise ValueError(
            "the attention must be without add_bias_kv, which Flax does not have, got "
            f"{bare(_name(name, 'bias_k'))}; port it by hand, to a layer of your own"
        )
    kinds = {"query": "q", "key": "k", "value": "v"}
    if _name(name, "in_proj_weight") in weights:
        kernels = np.split(_at(weights, name, "in_proj_weight"), 3)
    else:
        kernels = [_at(weights, name, f"{kind}_proj_weight") for kind in kinds.values()]
    out = _at(weights, name, "out_proj.weight").T
    if heads < 1 or len(out) % heads:
        raise ValueError(
            f"`heads` must be torch's num_heads, a divisor of {len(out)} in "
            f"{shown(name)}, got {shown(heads)}; give that of the layer in torch"
        )
    tree: dict[str, Any] = {
        kind: {"kernel": kernel.T.reshape(kernel.shape[1], heads, -1)}
        for kind, kernel in zip(kinds, kernels, strict=True)
    }
    tree["out"] = _layer(
        weights, _name(name, "out_proj"), kernel=out.reshape(heads, -1, out.shape[1])
    )
    if _name(name, "in_proj_bias") in weights:
        biases = np.split(_at(weights, name, "in_proj_bias"), 3)
        for kind, bias in zip(kinds, biases, strict=True):
            tree[kind]["bias"] = bias.reshape(heads, -1)
    return tree


def prelu(weights: Weights, name: str) -> dict[str, np.ndarray]:
    """`torch.nn.PReLU` as `PReLU`.

    Flax's layer has one slope. With several, one a channel, they are for a layer of
    your own, and the channels are the last axis there.
    """
    weight = _at(weights, name, "weight")
    return {"negative_slope": weight.reshape(() if weight.size == 1 else -1)}


def norm(weights: Weights, name: str) -> dict[str, np.ndarray]:
    """Trained parameters of a norm of torch.

    It may be `torch.nn.BatchNorm1d`, 2d, 3d, LayerNorm, GroupNorm, RMSNorm or
    `InstanceNorm1d`, 2d, 3d with affine=True. A layer without affine parameters has
    nothing to port.
    """
    return _layer(weights, name, scale=_at(weights, name, "weight"))


def running_stats(weights: Weights, name: str) -> dict[str, np.ndarray]:
    """The running mean and variance of a BatchNorm.

    Linen keeps them in its collection `batch_stats`; in NNX they are variables beside
    scale and bias: `norm(...) | running_stats(...)`.
    """
    mean, var = (_at(weights, name, f"running_{kind}") for kind in ("mean", "var"))
    return {"mean": mean, "var": var}


def lstm(
    weights: Weights, name: str, layer: int | None = 0, reverse: bool = False
) -> dict[str, Any]:
    """A layer of `torch.nn.LSTM` as Linen's `LSTMCell` or `OptimizedLSTMCell`.

    torch has two biases for each gate, and Flax has one. Both are kept, because each
    takes steps of its own. So ii, if, ig and io have a bias, too. In the loss, give
    Flax `one_bias(...)` of the result.

    Args:
      weights, name: torch's arrays, and the name of the LSTM.
      layer: the number of the layer in the LSTM, from 0; None for an LSTMCell.
      reverse: True for the backward direction of a bidirectional LSTM.

    Raises:
      ValueError: the LSTM has proj_size, which Flax does not have.
    """
    return _gates(weights, name, layer, reverse, "lstm")


def gru(
    weights: Weights, name: str, layer: int | None = 0, reverse: bool = False
) -> dict[str, Any]:
    """A layer of `torch.nn.GRU` as Linen's `GRUCell`; see `lstm`.

    In Flax, ir and iz have one bias where torch has two; `in` and hn have both.
    """
    return _gates(weights, name, layer, reverse, "gru")


def rnn(
    weights: Weights, name: str, layer: int | None = 0, reverse: bool = False
) -> dict[str, Any]:
    """A layer of `torch.nn.RNN` as Linen's `SimpleCell`; see `lstm`.

    In Flax, i has a bias; torch has one for h, too.
    """
    return _gates(weights, name, layer, reverse, "rnn")


def one_bias(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of an `lstm`, `gru` or `rnn` as Linen's cells take them.

    Two biases of torch are added to one for Flax. Call this inside the loss: then each
    of the two gets the gradient, and the step, that it gets in torch. If torch has none
    (bias=False), Flax gets 0, which is not trained.
    """
    is_lstm = "ii" in cell
    joined = GATES["lstm"] if is_lstm else "rz" if "ir" in cell else GATES["rnn"]
    layers = {}
    for key, layer in cell.items():
        no_bias = np.zeros(layer["kernel"].shape[-1], layer["kernel"].dtype)
        layers[key] = {"bias": no_bias, **layer}
    for gate in joined:
        from_input, from_state = layers["i" + gate], layers["h" + gate]
        keeps, loses = from_state, from_input
        if not is_lstm:
            keeps, loses = from_input, from_state
        keeps["bias"] = keeps["bias"] + loses.pop("bias")
    return layers


def nnx_lstm(
    weights: Weights, name: str, layer: int | None = 0, reverse: bool = False
) -> dict[str, Any]:
    """A layer of `torch.nn.LSTM` as an `nnx.LSTMCell` with `both_biases`; see `lstm`.

    The parameters of an `nnx.OptimizedLSTMCell` have other names: see `nnx_fused`.
    """
    gates = lstm(weights, name, layer, reverse)
    return {{"if": "if_"}.get(key, key): gate for key, gate in gates.items()}


def nnx_fused(
    weights: Weights, name: str, layer: int | None = 0, reverse: bool = False
) -> dict[str, Any]:
    """A layer of `torch.nn.GRU`, LSTM or RNN as an NNX cell that joins its gates.

    These are `nnx.GRUCell`, `nnx.OptimizedLSTMCell` and `nnx.SimpleCell`. Give both
    biases to the cell with `both_biases`.
    """
    _check_cell(weights, name, layer, "gru", "lstm", "rnn")
    return {
        f"dense_{side[0]}": {
            key: value.T
            for key, value in _recurrent(weights, name, side, layer, reverse).items()
        }
        for side in ("ih", "hh")
    }


def both_biases(cell: nnx.Module) -> nnx.Module:
    """Give each linear layer of an NNX cell a bias, if it has none; return the cell.

    torch has two biases for each gate, and NNX has only one of them. With the other,
    which is 0 at first, the cell trains as torch's does.

    Raises:
      TypeError: the cell has no linear layers of its own, as an `nnx.RNN`.
    """
    from flax import nnx

    layers = [layer for layer in vars(cell).values() if isinstance(layer, nnx.Linear)]
    if not layers:
        raise TypeError(
            f"`cell` must have linear layers, got {kind_of(cell)}; give the cell that "
            "it runs"
        )
    for layer in layers:
        if not layer.use_bias:
            zeros = jnp.zeros(layer.out_features, layer.param_dtype)
            layer.bias, layer.use_bias = nnx.Param(zeros), True
    return cell


def _name(layer: str, kind: str) -> str:
    """torch's name of an array or a module in a layer; the model itself is ""."""
    return f"{layer}.{kind}" if layer else kind


def _at(weights: Weights, layer: str, kind: str) -> np.ndarray:
    return weights[_name(layer, kind)]


def _layer(weights: Weights, name: str, **from_weight: Any) -> dict[str, np.ndarray]:
    """The layer's arrays, with its bias if it has one."""
    bias = _name(name, "bias")
    return from_weight | ({"bias": weights[bias]} if bias in weights else {})


def _recurrent(
    weights: Weights, name: str, side: str, layer: int | None, reverse: bool
) -> dict[str, np.ndarray]:
    """torch's weight and bias of all gates, from the input (ih) or the state (hh)."""
    number = "" if layer is None else f"_l{layer}{'_reverse' if reverse else ''}"
    suffix = side + number
    found = {"kernel": _at(weights, name, f"weight_{suffix}")}
    if _name(name, f"bias_{suffix}") in weights:
        found["bias"] = _at(weights, name, f"bias_{suffix}")
    return found


def _gates(
    weights: Weights, name: str, layer: int | None, reverse: bool, kind: str
) -> dict[str, Any]:
    _check_cell(weights, name, layer, kind)
    gates: dict[str, Any] = {}
    for side in ("ih", "hh"):
        arrays = _recurrent(weights, name, side, layer, reverse)
        for key, array in arrays.items():
            parts = np.split(array, len(GATES[kind]))
            for gate, part in zip(GATES[kind], parts, strict=True):
                gates.setdefault(side[0] + gate, {})[key] = part.T
    return gates


def _check_cell(weights: Weights, name: str, layer: int | None, *kinds: str) -> None:
    """Refuse an LSTM with a projection, and the weights of another class."""
    projection = _name(name, "weight_hr_l0")
    if projection in weights:
        raise ValueError(
            f"the LSTM must be without proj_size, which Flax does not have, got "
            f"{bare(projection)}; port it by hand, to a cell of your own"
        )
    array = "weight_hh" if layer is None else "weight_hh_l0"
    rows, hidden = _at(weights, name, array).shape
    if rows not in [len(GATES[kind]) * hidden for kind in kinds]:
        raise ValueError(
            f"{bare(_name(name, array))} must be of torch's "
            f"{' or '.join(kinds)}, got one of shape {(rows, hidden)}; use the "
            "function for its class"
        )
