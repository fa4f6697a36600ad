"""Port a small MobileNet and its RMSprop from torch to Flax, and train both.

    pip install -e ".[examples]" torch
    python examples/port_from_torch.py

starts from the same weights, trains on the same batches, and ends with

    held-out accuracy 98.7% in torch, 98.7% in JAX, parameters within 1e-05
"""

from collections import OrderedDict
from functools import partial
from typing import Any

import _common
import jax
import numpy as np
import optax
import torch
from flax import linen
from torch import nn
from torch.optim.lr_scheduler import StepLR

from optax_rmsprop import dialects
from optax_rmsprop.carry import torch_layers

# torchvision's recipe for MobileNetV3, with a faster decay of the learning rate.
BATCH, RATE = 32, 0.016 * 32 / 256
TWO_EPOCHS = 2 * (_common.TRAINED_ON // BATCH)
RECIPE: Any = {"alpha": 0.9, "eps": 0.0316, "momentum": 0.9, "weight_decay": 1e-5}
# Channels in and out, size and stride of the kernel, groups. A bias before a norm
# would have a gradient of rounding errors only, which RMSprop scales up to whole steps.
# SiLU is smooth: at a ReLU's kink, rounding errors would make the two runs differ.
LAYERS = {
    "stem": (1, 16, 3, 1, 1),
    "depthwise1": (16, 16, 3, 1, 16),
    "pointwise1": (16, 32, 1, 1, 1),
    "depthwise2": (32, 32, 3, 2, 32),
    "pointwise2": (32, 64, 1, 1, 1),
    "depthwise3": (64, 64, 3, 1, 64),
    "pointwise3": (64, 128, 1, 1, 1),
}


def torch_network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict[str, nn.Module](channel=nn.Unflatten(1, (1, 8)))
    for name, (inputs, channels, size, stride, groups) in LAYERS.items():
        shape = inputs, channels, size, stride, size // 2
        conv = nn.Conv2d(*shape, groups=groups, bias=False)
        parts = {"conv": conv, "norm": nn.BatchNorm2d(channels), "silu": nn.SiLU()}
        layers[name] = nn.Sequential(OrderedDict(parts))
    layers["mean"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers["head"] = nn.Linear(128, 10)
    return nn.Sequential(layers)


class Network(linen.Module):
    training: bool

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images[..., None]
        # momentum weights the old statistics; torch's momentum, 0.1, weights the new.
        norm = partial(linen.BatchNorm, not self.training, momentum=0.9, epsilon=1e-5)
        for name, (_, channels, size, stride, groups) in LAYERS.items():
            # With a stride of 2, the padding "SAME" would pad only below and right.
            shape = channels, (size, size), stride, size // 2
            conv = partial(linen.Conv, feature_group_count=groups, use_bias=False)
            x = conv(*shape, name=f"{name}_conv")(x)
            x = linen.silu(norm(name=f"{name}_norm")(x))
        return linen.Dense(10, name="head")(x.mean((1, 2)))


def port(weights: dict[str, np.ndarray]) -> dict[str, dict]:
    """The weights of the torch network as the variables of the Flax network."""
    params, statistics = {"head": torch_layers.linear(weights, "head")}, {}
    for name in LAYERS:
        conv, norm = f"{name}.conv", f"{name}.norm"
        params[f"{name}_conv"] = torch_layers.conv(weights, conv)
        params[f"{name}_norm"] = torch_layers.norm(weights, norm)
        # torch's running variance is n/(n - 1) times Flax's. Only evaluation sees that.
        statistics[f"{name}_norm"] = torch_layers.running_stats(weights, norm)
    return {"params": params, "batch_stats": statistics}


@partial(jax.value_and_grad, has_aux=True)
def gradient(variables: dict, images: jax.Array, labels: jax.Array) -> tuple:
    """The loss and the new running statistics; decorated, also the gradient."""
    network = Network(training=True)
    logits, changed = network.apply(variables, images, mutable="batch_stats")
    return _common.loss_and_accuracy(logits, labels)[0], changed


def optimizers(network: nn.Module) -> tuple[torch.optim.RMSprop, StepLR, Any]:
    """The optimizer and its schedule in torch, and both in JAX."""
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0},
    ]
    optimizer = torch.optim.RMSprop(groups, lr=RATE, **RECIPE)
    schedule = optax.exponential_decay(RATE, TWO_EPOCHS, 0.7, staircase=True)
    kernels = partial(jax.tree.map, lambda p: p.ndim > 1)
    tx = dialects.torch(schedule, **RECIPE, weight_decay_mask=kernels)
    return optimizer, StepLR(optimizer, TWO_EPOCHS, gamma=0.7), tx


def main(argv: list[str] | None = None) -> None:
    options = _common.parse_options(__doc__, argv, epochs=(15, "of training"))
    images, held_out_images, labels, held_out_labels = _common.split_digits()
    jax.config.update("jax_default_matmul_precision", "float32")  # on a GPU too
    network = torch_network()
    *in_torch, tx = network, *optimizers(network)
    variables = port(_common.torch_weights(network))
    state = tx.init(variables["params"])

    @jax.jit
    def train_step(variables: dict, state: optax.OptState, *batch: jax.Array) -> tuple:
        (loss, changed), grads = gradient(variables, *batch)
        params = variables["params"]
        updates, state = tx.update(grads["params"], state, params)
        return {"params": optax.apply_updates(params, updates), **changed}, state, loss

    rng, history, epochs = np.random.default_rng(0), [], range(1, options.epochs + 1)
    for epoch in epochs:
        losses = []
        for batch in _common.shifted_batches(images, labels, BATCH, rng):
            variables, state, loss = train_step(variables, state, *batch)
            losses.append((_common.torch_step(*in_torch, *batch), loss))
        there = port(_common.torch_weights(network))
        apart = _common.largest_difference(variables["params"], there["params"])
        history.append((*np.mean(losses, axis=0), apart))
        print(f"epoch {epoch}: parameters within {_common.bound(apart)}", flush=True)
    torchs = _common.torch_accuracy(network, held_out_images, held_out_labels)
    logits = Network(training=False).apply(variables, held_out_images)
    _, ours = _common.loss_and_accuracy(logits, held_out_labels)
    text = f"held-out accuracy {torchs:.1%} in torch, {ours:.1%} in JAX"
    print(f"{text}, parameters within {_common.bound(apart)}")
    if options.output:
        names = ["loss in torch", "loss in JAX", "largest difference of a parameter"]
        axes = _common.new_figure(3.8).subplots()
        lines = axes.semilogy(epochs, history, marker=".", label=names)
        lines[0].set(linewidth=5, alpha=0.5)
        axes.legend(title="by epoch")
        _common.save_figure(axes.figure, options.output)


if __name__ == "__main__":
    main()
