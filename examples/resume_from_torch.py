"""Resume a torch run in Flax from its checkpoint, and take it back to torch.

    pip install -e ".[examples]" torch
    python examples/resume_from_torch.py

trains the network of port_from_torch.py for five epochs in torch, saves a checkpoint,
goes on from it in Flax for five, and for the last five in torch again; and beside it a
run that stays in torch. It ends with lines like

    held-out accuracy 99.1% of the run that moved, 99.1% of the other
    parameters within 1e-06, losses within 8e-07
"""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import _common
import jax
import numpy as np
import optax
import torch
from port_from_torch import gradient, port, torch_network
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from optax_rmsprop.carry import from_torch_checkpoint, to_torch

BATCH, RATE = 32, 0.01
RECIPE: dict[str, Any] = {"alpha": 0.9, "eps": 0.0316, "momentum": 0.9}
Batches = list[tuple[np.ndarray, np.ndarray]]


def start_in_torch() -> tuple[nn.Sequential, torch.optim.RMSprop]:
    network = torch_network()
    # The parameters are given with their names, so that the checkpoint has them.
    named = list(network.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [(n, p) for n, p in named if p.ndim <= 1]},
    ]
    return network, torch.optim.RMSprop(groups, lr=1.0, **RECIPE)


def train_in_torch(
    network: nn.Module,
    optimizer: torch.optim.RMSprop,
    schedule: optax.Schedule,
    batches: Batches,
) -> list[float]:
    scheduler = LambdaLR(optimizer, lambda step: float(schedule(step)))
    run = network, optimizer, scheduler
    return [_common.torch_step(*run, *batch) for batch in batches]


def train_in_flax(
    saved: dict, schedule: optax.Schedule, batches: Batches
) -> tuple[dict, optax.OptState, list[float]]:
    # The state counts on from torch's steps, so the schedule goes on from there.
    run = from_torch_checkpoint(
        saved["model"], saved["optimizer"], port, learning_rate=schedule
    )

    @jax.jit
    def train_step(
        variables: dict, state: optax.OptState, *batch: jax.Array
    ) -> tuple[dict, optax.OptState, jax.Array]:
        (loss, changed), grads = gradient(variables, *batch)
        # The optimizer leaves the running statistics, which the forward pass changed.
        updates, state = run.tx.update(grads, state, variables)
        return {**optax.apply_updates(variables, updates), **changed}, state, loss

    variables, state, losses = run.params, run.opt_state, []
    for batch in batches:
        variables, state, loss = train_step(variables, state, *batch)
        losses.append(float(loss))
    return variables, state, losses


def run_that_moves(
    schedule: optax.Schedule, batches: Batches
) -> tuple[nn.Module, list[float]]:
    """Three legs: in torch, in Flax, and in torch again."""
    leg = len(batches) // 3
    legs = batches[:leg], batches[leg : 2 * leg], batches[2 * leg :]
    network, optimizer = start_in_torch()
    first = train_in_torch(network, optimizer, schedule, legs[0])
    checkpoint = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryFile() as file:
        torch.save(checkpoint, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    variables, state, second = train_in_flax(saved, schedule, legs[1])

    # As in a new process. What the port leaves out comes from the checkpoint.
    network, optimizer = start_in_torch()
    network.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    to_torch(variables, state, network, optimizer, port)
    third = train_in_torch(network, optimizer, lambda n: schedule(2 * leg + n), legs[2])
    return network, first + second + third


def draw(moved: list[float], stayed: list[float], path: Path) -> None:
    figure, steps = _common.new_figure(5.2), np.arange(len(moved))
    losses, differences = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    losses.semilogy(stayed, "C5", alpha=0.5, linewidth=4, label="stays in torch")
    legs = ("C1", "moves: torch"), ("C0", "moves: Flax"), ("C1", "moves: torch again")
    for part, (color, label) in zip(np.split(steps, 3), legs, strict=True):
        there = np.array(moved)[part]
        losses.plot(part, there, color, linewidth=1, label=label)
        differences.plot(part, np.abs(there - np.array(stayed)[part]), color)
    losses.set(ylabel="cross-entropy loss")
    losses.legend()
    differences.set(xlabel="step", ylabel="|difference|")
    _common.save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    options = _common.parse_options(__doc__, argv, epochs=(5, "of each leg"))
    jax.config.update("jax_default_matmul_precision", "float32")  # on a GPU too
    images, held_out_images, labels, held_out_labels = _common.split_digits()
    data = images, labels, BATCH, np.random.default_rng(0)
    epochs = [list(_common.shifted_batches(*data)) for _ in range(3 * options.epochs)]
    batches = list(itertools.chain(*epochs))
    schedule = optax.cosine_decay_schedule(RATE, len(batches))
    moved, losses = run_that_moves(schedule, batches)
    stayed, optimizer = start_in_torch()
    losses_there = train_in_torch(stayed, optimizer, schedule, batches)
    if options.output:
        draw(losses, losses_there, options.output)

    held_out = held_out_images, held_out_labels
    ours, theirs = (_common.torch_accuracy(n, *held_out) for n in (moved, stayed))
    print(
        f"held-out accuracy {ours:.1%} of the run that moved, {theirs:.1%} of the other"
    )
    params = [port(_common.torch_weights(n))["params"] for n in (moved, stayed)]
    apart = _common.largest_difference(*params)
    losses_apart = np.abs(np.subtract(losses, losses_there)).max()
    print(f"parameters within {apart:.0e}, losses within {losses_apart:.0e}")


if __name__ == "__main__":
    main()
