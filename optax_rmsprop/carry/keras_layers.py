"""The usual layers of Keras 3 in the names and layouts of Flax, for ports of runs.

Each function takes Keras' arrays by path, as `from_keras` gives them to a port, and the
path of one layer, and returns that layer's parameters as Flax Linen and NNX call them:

    from optax_rmsprop.carry import from_keras, keras_layers

    def port(weights):
        return {
            "conv": keras_layers.conv(weights, "sequential/conv2d"),
            "norm": keras_layers.norm(weights, "sequential/batch_normalization"),
            "head": keras_layers.dense(weights, "sequential/dense"),
        }

A layer's path is `layer.path`; `[v.path for v in model.weights]` lists the arrays. The
two layers of a Bidirectional are ported one by one, by paths that end, for example, in
"bidirectional/forward_lstm" and "bidirectional/backward_lstm".

These functions only move elements. A layer without a bias (or without gamma or beta)
has none in Flax either. Options that are not parameters must be set in Flax by hand:

Keras | Flax
---|---
epsilon of Batch-, Layer- and GroupNormalization, 1e-3 | 1e-5 in BatchNorm, else 1e-6
epsilon=1e-6 of RMSNormalization; momentum=0.99 | the same
a variance without cancellation | use_fast_variance=False in every norm
LayerNormalization over several axes | reduction_axes and feature_axes, both
rms_scaling=True of LayerNormalization | none
padding="valid" of a convolution, the default | padding="VALID"; "SAME" by default
groups of a convolution | feature_group_count
DepthwiseConv of n channels with depth_multiplier=m | n * m features in n groups
output_padding of a transposed convolution | padding: see `conv_transpose`
data_format="channels_first" | inputs with the channels last
activation of any layer | a call after the layer
activation and recurrent_activation of LSTM, GRU | activation_fn and gate_fn
go_backwards=True | reverse=True of RNN
return_sequences=False, the default | the last output of RNN, `outputs[:, -1]`
merge_mode of Bidirectional | merge_fn
mask_zero=True of Embedding | seq_lengths of RNN, if the padding is at the end
num_heads=n, key_dim=d of MultiHeadAttention | num_heads=n, qkv_features=n * d
its call with query, value, key | a call with query, key, value

unit_forget_bias of LSTM is only an initial value.
"""

from __future__ import annotations  # so that help() shows these types by name

from collections.abc import Mapping
from typing import Any

import numpy as np

from optax_rmsprop._errors import bare, shown
from optax_rmsprop.carry.torch_layers import both_biases, one_bias

__all__ = [
    "both_biases",
    "conv",
    "conv_transpose",
    "dense",
    "depthwise_conv",
    "einsum_dense",
    "embedding",
    "gru",
    "lstm",
    "multi_head_attention",
    "nnx_fused",
    "nnx_lstm",
    "norm",
    "one_bias",
    "prelu",
    "running_stats",
    "separable_conv",
    "simple_rnn",
]

Weights = Mapping[str, np.ndarray]
# In the order in which Keras joins them, in Flax's letters. It writes c for LSTM's g
# and h for GRU's n.
GATES = {"lstm": ("i", "f", "g", "o"), "gru": ("z", "r", "n"), "simple_rnn": ("",)}


def dense(weights: Weights, path: str) -> dict[str, np.ndarray]:
    """`Dense`, whose kernel is (in, out) in Flax too.

    Args:
      weights: Keras' arrays by path.
      path: of the layer.
    """
    return _layer(weights, path)


def einsum_dense(weights: Weights, path: str) -> dict[str, np.ndarray]:
    """`EinsumDense` as `Einsum` with the same equation.

    Flax's bias has all axes that the kernel and the output have in common. Keras' must
    have the same, which its bias_axes say.
    """
    return _layer(weights, path)


def conv(weights: Weights, path: str) -> dict[str, np.ndarray]:
    """`Conv1D`, 2D, 3D, whose kernel is (..., in, out) in Flax too.

    In a grouped convolution both count the input channels of one group.
    """
    return _layer(weights, path)


def depthwise_conv(weights: Weights, path: str) -> dict[str, np.ndarray]:
    """`DepthwiseConv1D`, 2D as `Conv` with a group for each input channel.

    Keras' kernel (..., in, multiplier) becomes (..., 1, in * multiplier).
    """
    return _layer(weights, path, kernel=_depthwise(_at(weights, path, "kernel")))


def separable_conv(weights: Weights, path: str) -> dict[str, Any]:
    """`SeparableConv1D`, 2D as two layers `Conv`: "depthwise", then "pointwise".

    The first has no bias, and a group for each input channel. The second has kernels of
    size 1, and strides of 1.
    """
    kernel = _at(weights, path, "pointwise_kernel")
    return {
        "depthwise": {"kernel": _depthwise(_at(weights, path, "depthwise_kernel"))},
        "pointwise": _layer(weights, path, kernel=kernel),
    }


def conv_transpose(weights: Weights, path: str) -> dict[str, np.ndarray]:
    """`Conv1DTranspose`, 2D, 3D as `ConvTranspose`, which flips no kernel.

    (..., out, in) becomes (..., in, out), reversed in space.

    The padding "VALID" or "SAME" is Keras', unless Keras has an output_padding m. Then
    give it in numbers. For a kernel of the (dilated) size k, "valid" is (k - 1,
    k - 1 + m); "same" is k + k % 2 - 2 + m in sum, and the larger half of it, but at
    most k - 1, comes before.
    """
    kernel = np.swapaxes(_at(weights, path, "kernel"), -1, -2)
    in_space = tuple(range(kernel.ndim - 2))
    return _layer(weights, path, kernel=np.flip(kernel, in_space))


def embedding(weights: Weights, path: str) -> dict[str, np.ndarray]:
    """`Embedding` as `Embed`.

    A `ReversibleEmbedding` with tied weights is the same: `Embed.attend` is its call
    with reverse=True.
    """
    return {"embedding": _at(weights, path, "embeddings")}


def norm(weights: Weights, path: str) -> dict[str, np.ndarray]:
    """Trained parameters of BatchNormalization, Layer-, Group- or RMSNormalization.

    A layer with center=False and scale=False has nothing to port.
    """
    names = {"gamma": "scale", "beta": "bias", "scale": "scale"}
    found = {
        name: weights[_name(path, kind)]
        for kind, name in names.items()
        if _name(path, kind) in weights
    }
    return found or {"scale": _at(weights, path, "gamma")}  # a KeyError, with the path


def running_stats(weights: Weights, path: str) -> dict[str, np.ndarray]:
    """The moving mean and variance of a BatchNormalization.

    Linen keeps them in its collection `batch_stats`; in NNX they are variables beside
    scale and bias: `norm(...) | running_stats(...)`.
    """
    mean, var = (_at(weights, path, f"moving_{kind}") for kind in ("mean", "variance"))
    return {"mean": mean, "var": var}


def prelu(weights: Weights, path: str) -> dict[str, np.ndarray]:
    """`PReLU`; Flax's has one slope for all elements.

    An alpha of one element becomes a scalar. An alpha of more keeps its shape. It is
    for a function of your own, `jnp.where(x >= 0, x, negative_slope * x)`.
    """
    alpha = _at(weights, path, "alpha")
    return {"negative_slope": alpha.reshape(()) if alpha.size == 1 else alpha}


def multi_head_attention(weights: Weights, path: str) -> dict[str, Any]:
    """`MultiHeadAttention` as `MultiHeadDotProductAttention`, or NNX's of Keras' name.

    Raises:
      ValueError: its value_dim is not its key_dim, or it has a gate. Flax has neither.
    """
    names = {"query": "query", "key": "key", "value": "value"}
    names["out"] = "attention_output"
    layers = {
        name: _layer(weights, _name(path, of_keras)) for name, of_keras in names.items()
    }
    key, value = (layers[name]["kernel"].shape[-1] for name in ("key", "value"))
    if key != value:
        raise ValueError(
            f"{bare(path)} must have value_dim=key_dim, as all attention of Flax, got "
            f"{value} and {key}; {_BY_HAND}"
        )
    if _name(path, "gate/kernel") in weights:
        raise ValueError(
            f"{bare(path)} must be without use_gate, which Flax does not have, got "
            f"True; {_BY_HAND}"
        )
    return layers


_BY_HAND = "port its four layers with einsum_dense, to a module of your own"


def lstm(weights: Weights, path: str) -> dict[str, Any]:
    """`LSTM` or its cell as Linen's `LSTMCell` or `OptimizedLSTMCell`.

    Flax needs a bias. If Keras has none, give Flax `one_bias(...)` of the result inside
    the loss; it adds zeros, which are not trained.

    Args:
      weights: Keras' arrays by path.
      path: of the layer, or of its cell, such as "sequential/rnn/my_cell".

    Raises:
      ValueError: the weights are of another class.
    """
    return _gates(weights, path, "lstm")


def gru(weights: Weights, path: str, reset_after: bool | None = None) -> dict[str, Any]:
    """`GRU` or its cell as Linen's `GRUCell`; see `lstm`.

    With reset_after=True, Keras' default, each gate has two biases. Flax has both for
    `in` and hn, but only one for r and z. Both are kept, because each takes steps of
    its own. So hr and hz have a bias, too. In the loss, give Flax `one_bias(...)` of
    the result.

    With reset_after=False, the state is multiplied by the reset gate before it is
    multiplied by its kernel. Flax has no such cell. The result is for one of your own,
    and its layer of r * h is called `rn` instead of hn:

        r = sigmoid(ir(x) + hr(h))
        z = sigmoid(iz(x) + hz(h))
        h = z * h + (1 - z) * tanh(in(x) + rn(r * h))

    Args:
      weights: Keras' arrays by path.
      path: of the layer, or of its cell.
      reset_after: Keras'. It must be given for a layer without biases. For others the
        shape of the bias shows it.

    Raises:
      ValueError: the weights are of another class; reset_after is missing or wrong.
    """
    gates = _gates(weights, path, "gru")
    if not _is_reset_after(gates["ir"], gates["hr"], path, reset_after):
        gates["rn"] = gates.pop("hn")
    return gates


def simple_rnn(weights: Weights, path: str) -> dict[str, Any]:
    """`SimpleRNN` or its cell as Linen's `SimpleCell`; see `lstm`.

    Flax needs a bias. If Keras has none, add zeros as the bias of "i" inside the loss.
    """
    return _gates(weights, path, "simple_rnn")


def nnx_lstm(weights: Weights, path: str) -> dict[str, Any]:
    """`LSTM` or its cell as an `nnx.LSTMCell`; see `lstm`.

    The parameters of an `nnx.OptimizedLSTMCell` have other names: see `nnx_fused`.
    """
    return {{"if": "if_"}.get(key, key): v for key, v in lstm(weights, path).items()}


def nnx_fused(
    weights: Weights, path: str, reset_after: bool | None = None
) -> dict[str, Any]:
    """`LSTM`, `GRU`, `SimpleRNN`, or the cell of one, as an NNX cell of two layers.

    These are `nnx.OptimizedLSTMCell`, `nnx.GRUCell` and `nnx.SimpleCell`. Give both
    biases to a GRUCell with `both_biases`.

    Args:
      weights: Keras' arrays by path.
      path: of the layer, or of its cell.
      reset_after: of a GRU, see `gru`; it must be True, because NNX has no other cell.

    Raises:
      ValueError: the weights are of another class; reset_after is missing or wrong.
    """
    kind, (from_input, from_state) = _recurrent(weights, path, *GATES)
    if kind == "gru":
        if not _is_reset_after(from_input, from_state, path, reset_after):
            raise ValueError(
                f"{bare(path)} must have reset_after=True, as NNX's GRUCell, got "
                "False; port it with `gru`, to a cell of your own"
            )
        for layer in (from_input, from_state):
            for key, array in layer.items():
                z, r, n = np.split(array, 3, -1)
                layer[key] = np.concatenate([r, z, n], -1)
    return {"dense_i": from_input, "dense_h": from_state}


def _name(path: str, kind: str) -> str:
    return f"{path}/{kind}" if path else kind


def _at(weights: Weights, path: str, kind: str) -> np.ndarray:
    return weights[_name(path, kind)]


def _layer(
    weights: Weights, path: str, kernel: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The layer's kernel, or this one, with its bias if it has one."""
    layer = {"kernel": _at(weights, path, "kernel") if kernel is None else kernel}
    bias = _name(path, "bias")
    return layer | ({"bias": weights[bias]} if bias in weights else {})


def _depthwise(kernel: np.ndarray) -> np.ndarray:
    """The multiplier of Keras runs faster than its channel, as the groups of Flax."""
    return kernel.reshape(*kernel.shape[:-2], 1, -1)


def _recurrent(
    weights: Weights, path: str, *kinds: str
) -> tuple[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """The kind of a cell, and its layers from the input and from the state.

    Their arrays have the gates of Keras side by side, in the last dimension. A single
    bias is in the layer in which Flax has it.
    """
    paths = [path, *(_name(path, f"{kind}_cell") for kind in kinds)]
    cells = [cell for cell in paths if _name(cell, "recurrent_kernel") in weights]
    cell = cells[0] if cells else paths[1]
    kernel = _at(weights, cell, "recurrent_kernel")
    units, columns = kernel.shape
    kind = {len(GATES[kind]) * units: kind for kind in kinds}.get(columns)
    if kind is None:
        raise ValueError(
            f"{bare(_name(cell, 'recurrent_kernel'))} must be of Keras' "
            f"{' or '.join(kinds)}, got one of shape {(units, columns)}; use the "
            "function for its class"
        )
    from_input, from_state = (
        {"kernel": _at(weights, cell, "kernel")},
        {"kernel": kernel},
    )
    if _name(cell, "bias") in weights:
        bias = _at(weights, cell, "bias")
        if bias.ndim == 2:  # of a GRU with reset_after
            from_input["bias"], from_state["bias"] = bias
        else:
            (from_state if kind == "lstm" else from_input)["bias"] = bias
    return kind, (from_input, from_state)


def _gates(weights: Weights, path: str, kind: str) -> dict[str, Any]:
    _, layers = _recurrent(weights, path, kind)
    gates: dict[str, Any] = {}
    for side, layer in zip("ih", layers, strict=True):
        for key, array in layer.items():
            parts = np.split(array, len(GATES[kind]), -1)
            for gate, part in zip(GATES[kind], parts, strict=True):
                gates.setdefault(side + gate, {})[key] = part
    return gates


def _is_reset_after(
    from_input: Mapping[str, Any],
    from_state: Mapping[str, Any],
    path: str,
    given: bool | None,
) -> bool:
    """Keras' reset_after of a GRU, from its biases, or as it was given."""
    possible = [True, False]
    if "bias" in from_input:
        possible = ["bias" in from_state]
        given = possible[0] if given is None else given
    if given not in possible:
        raise ValueError(
            f"`reset_after` must be Keras', {' or '.join(map(str, possible))}, in "
            f"{bare(path)}, got {shown(given)}; give `layer.reset_after`"
        )
    return bool(given)
