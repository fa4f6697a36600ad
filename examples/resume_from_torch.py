"""Resume a torch run in Flax from its checkpoint, and take it back to torch.

    pip install -e ".[examples]" torch
    python examples/resume_from_torch.py

trains the network of port_from_torch.py for five epochs in torch, saves a checkpoint,
goes on from it in Flax for five, and for the last five in torch again; and beside it a
run that stays in torch. It ends with lines like

    held-out accuracy 99.1% of the run that moved, 99.1% of the other
    parameters within 1e-05, losses within 1e-06
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
from port_from_torch import Network, gradient, torch_network
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from optax_rmsprop.carry import from_torch_checkpoint, port_of, schedule_of, to_torch

BATCH, RATE = 32, 0.01
RECIPE: dict[str, Any] = {"alpha": 0.9, "eps": 0.0316, "momentum": 0.9}
Batches = list[tuple[np.ndarray, np.ndarray]]
Torch = tuple[nn.Sequential, torch.optim.RMSprop, LRScheduler]


def start_in_torch(steps: int) -> Torch:
    network = torch_network()
    # The parameters are given with their names, so that the checkpoint has them.
    named = list(network.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [(n, p) for n, p in named if p.ndim <= 1]},
    ]
    optimizer = torch.optim.RMSprop(groups, lr=RATE, **RECIPE)
    return network, optimizer, CosineAnnealingLR(optimizer, steps)


def train_in_flax(
    saved: dict, schedule: list[optax.Schedule], batches: Batches
) -> tuple[dict, optax.OptState, list[float]]:
    # The state counts on from torch's steps, and so does the schedule.
    run = from_torch_checkpoint(saved, port=port(), learning_rate=schedule)

    @jax.jit
    def train_step(
        variables: dict, state: optax.OptState, *batch: jax.Array
    ) -> tuple[dict, optax.OptState, jax.Array]:
        (loss, changed), grads = gradient(variables, *batch)
        # The optimizer leaves the running statistics, which the forward pass changed.
        updates, state = run.tx.update(grads, state, variables)
        return {**optax.apply_updates(variables, updates), **changed}, state, loss

    variables, state, losses = run.params, run.opt_state, []
    for batch in _common.shown(batches, "in Flax, step"):
        variables, state, loss = train_step(variables, state, *batch)
        losses.append(float(loss))
    return variables, state, losses


def train_in_torch(run: Torch, batches: Batches) -> list[float]:
    each = _common.shown(batches, "in torch, step")
    return [_common.torch_step(*run, *batch) for batch in each]


def port() -> Any:
    """The function from torch's weights to the variables of the Flax network."""
    image = jax.ShapeDtypeStruct((1, 8, 8), np.float32)
    flax = jax.eval_shape(Network(training=False).init, jax.random.key(0), image)
    return port_of(torch_network(), like=flax)


def run_that_moves(batches: Batches) -> tuple[nn.Module, list[float]]:
    """Three legs: in torch, in Flax, and in torch again."""
    leg = len(batches) // 3
    run = network, optimizer, scheduler = start_in_torch(len(batches))
    first = train_in_torch(run, batches[:leg])
    parts = {"model": network, "optimizer": optimizer, "scheduler": scheduler}
    with tempfile.TemporaryFile() as file:
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)

    # As in a new process.
    run = network, optimizer, scheduler = start_in_torch(len(batches))
    scheduler.load_state_dict(saved["scheduler"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule = schedule_of(scheduler, 2 * leg)
    variables, state, second = train_in_flax(saved, schedule, batches[leg : 2 * leg])

    # What the port leaves out comes from the checkpoint.
    network.load_state_dict(saved["model"])
    to_torch(variables, state, network, optimizer, port())
    for _ in range(leg):
        scheduler.step()
    third = train_in_torch(run, batches[2 * leg :])
    return network, first + second + third


def draw(moved: list[float], stayed: list[float], path: Path) -> None:
    figure, steps = _common.new_figure(5.2), np.arange(len(moved))
    losses, differences = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    losses.semilogy(stayed, "C5", alpha=0.5, linewidth=4, label="stays in torch")
    names = "moves: torch", "moves: Flax", "moves: torch again"
    legs = zip(np.split(steps, 3), ("C1--", "C0-", "C1--"), names, strict=True)
    for part, look, label in legs:
        there = np.array(moved)[part]
        losses.plot(part, there, look, linewidth=1, label=label)
        differences.plot(part, np.abs(there - np.array(stayed)[part]), look)
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
    moved, losses = run_that_moves(batches)
    run = start_in_torch(len(batches))
    losses_there = train_in_torch(run, batches)
    stayed, held_out = run[0], (held_out_images, held_out_labels)
    ours, theirs = (_common.torch_accuracy(n, *held_out) for n in (moved, stayed))
    text = f"held-out accuracy {ours:.1%} of the run that moved"
    print(f"{text}, {theirs:.1%} of the other")
    weights = (_common.torch_weights(network) for network in (moved, stayed))
    apart = _common.largest_difference(*(port()(w)["params"] for w in weights))
    losses_apart = np.abs(np.subtract(losses, losses_there)).max()
    within = map(_common.bound, (apart, losses_apart))
    print("parameters within {}, losses within {}".format(*within))
    if options.output:
        draw(losses, losses_there, options.output)


if __name__ == "__main__":
    main()
