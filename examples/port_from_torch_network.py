"""The network of port_from_torch.py in torch, and how its weights come to Flax."""

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

# torch keeps a kernel as (out, in, height, width), Flax as (height, width, in, out);
# in a depthwise one "in" is 1 in both.
TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}


class ConvNorm(nn.Module):
    def __init__(self, channels: tuple[int, int], size: int, **kinds: int):
        super().__init__()
        padding = size // 2
        self.conv = nn.Conv2d(*channels, size, padding=padding, bias=False, **kinds)
        self.norm = nn.BatchNorm2d(channels[1], eps=1e-5, momentum=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.norm(self.conv(x)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = ConvNorm((1, 16), 3)
        self.depthwise1 = ConvNorm((16, 16), 3, groups=16)
        self.pointwise1 = ConvNorm((16, 32), 1)
        self.depthwise2 = ConvNorm((32, 32), 3, stride=2, groups=32)
        self.pointwise2 = ConvNorm((32, 64), 1)
        self.depthwise3 = ConvNorm((64, 64), 3, groups=64)
        self.pointwise3 = ConvNorm((64, 128), 1)
        self.head = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images[:, None])
        x = self.pointwise1(self.depthwise1(x))
        x = self.pointwise2(self.depthwise2(x))
        x = self.pointwise3(self.depthwise3(x))
        return self.head(x.mean((2, 3)))


def pairs(
    network: nn.Module, model: nnx.Module
) -> Iterator[tuple[nnx.Variable, np.ndarray]]:
    """The variables of the Flax model, each with torch's value in Flax's layout."""
    for name, tensor in network.state_dict().items():
        *layers, kind = name.split(".")
        if kind == "num_batches_tracked":
            continue  # Flax keeps no count: torch needs it only for momentum=None
        weight = "scale" if layers[-1] == "norm" else "kernel"
        names = {"weight": weight, "running_mean": "mean", "running_var": "var"}
        variable = functools.reduce(getattr, [*layers, names.get(kind, kind)], model)
        yield variable, tensor.numpy().transpose(TO_FLAX[tensor.ndim])


def port(network: nn.Module, model: nnx.Module) -> None:
    """Copy parameters and running statistics from torch to Flax."""
    for variable, value in pairs(network, model):
        variable[...] = jnp.array(value)  # a copy: torch goes on writing into its own


def largest_difference(network: nn.Module, model: nnx.Module) -> float:
    """Of any parameter; the running variances differ, as port_from_torch.py says."""
    differences = [
        np.abs(np.asarray(variable[...]) - value).max()
        for variable, value in pairs(network, model)
        if isinstance(variable, nnx.Param)
    ]
    return np.max(differences)  # which keeps a NaN, unlike Python's max
