"""The network of digits.py in torch, trained beside it on the same batches."""

import argparse

import jax
import numpy as np
import optax
import torch
from flax import nnx
from torch import nn
from torch.nn.functional import cross_entropy, silu

# torch keeps a kernel as (out, in, height, width), Flax as (height, width, in, out).
TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.conv3 = nn.Conv2d(64, 64, 3)
        self.dense = nn.Linear(4 * 4 * 64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images[:, None]
        for conv in (self.conv1, self.conv2, self.conv3):
            x = silu(conv(x))
        # Flax has the channels last, and flattens in that order.
        return self.dense(x.permute(0, 2, 3, 1).flatten(1))


class Twin:
    """A torch network and optimizer that start where the Flax model starts."""

    def __init__(
        self, model: nnx.Module, schedule: optax.Schedule, options: argparse.Namespace
    ):
        torch.set_num_threads(1)  # more would fight with JAX's over the cores
        self.network = Network()
        self.schedule = jax.jit(schedule)
        self.steps = 0
        with torch.no_grad():
            for name, weight in self.network.named_parameters():
                value = in_flax(model, name).transpose(TO_TORCH[weight.ndim])
                weight.copy_(torch.tensor(value))
        self.optimizer = torch.optim.RMSprop(
            self.network.parameters(),
            alpha=options.decay,
            eps=options.eps,
            momentum=options.momentum,
            centered=options.centered,
            weight_decay=options.weight_decay,
        )

    def step(self, images: np.ndarray, labels: np.ndarray) -> float:
        self.optimizer.param_groups[0]["lr"] = float(self.schedule(self.steps))
        self.steps += 1
        logits = self.network(torch.from_numpy(images))
        loss = cross_entropy(logits, torch.from_numpy(labels).long())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def difference(self, model: nnx.Module) -> float:
        """The largest difference of any parameter from the Flax model's."""
        return max(
            np.abs(
                weight.detach().numpy().transpose(TO_FLAX[weight.ndim])
                - in_flax(model, name)
            ).max()
            for name, weight in self.network.named_parameters()
        )


def in_flax(model: nnx.Module, name: str) -> np.ndarray:
    layer, kind = name.split(".")
    leaf = {"weight": "kernel", "bias": "bias"}[kind]
    return np.asarray(getattr(getattr(model, layer), leaf)[...])
