"""Runs of sweep.py in torch: one run, and how they compare."""

import time

import numpy as np
import torch
from torch.nn.functional import cross_entropy

# Relative, of torch's held-out loss from ours, but for runs with long steps. There each
# step enlarges what rounding does: even in float64 the two part, though not at once.
PROMISED_DIFFERENCE = 1e-3  # observed: 4.4e-5; with long steps 0.4
LONG_STEP = 0.35


def run(
    setting: dict[str, float],
    first_params: dict[str, np.ndarray],
    digits: list[np.ndarray],
    batches: np.ndarray,
) -> tuple[float, float]:
    """Seconds of training, and the held-out loss. `digits` as `split_digits` has it."""
    torch.set_num_threads(1)  # at this size more are slower
    images, held_out_images, labels, held_out_labels = map(torch.from_numpy, digits)
    labels, held_out_labels = labels.long(), held_out_labels.long()
    layers = []
    for name in ("in", "out"):
        kernel = torch.from_numpy(first_params[name])
        layer = torch.nn.Linear(*kernel.shape)
        layer.weight.data = kernel.T.contiguous()
        layer.bias.data = torch.from_numpy(first_params[f"{name}_bias"].copy())
        layers.append(layer)
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
    optimizer = torch.optim.RMSprop(
        model.parameters(),
        lr=setting["learning_rate"],
        alpha=setting["decay"],
        eps=setting["eps"],
        momentum=setting["momentum"],
    )
    begin = time.perf_counter()
    for batch in torch.from_numpy(batches).flatten(0, 1):
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        return seconds, cross_entropy(model(held_out_images), held_out_labels).item()


def longest_step(setting: dict[str, float]) -> float:
    """The bound of a step, of a gradient that spikes, summed over its momentum."""
    rate, momentum = setting["learning_rate"], setting["momentum"]
    return rate / ((1 - momentum) * (1 - setting["decay"]) ** 0.5)


def report(
    seconds: dict,
    losses: np.ndarray,
    torch_losses: dict[tuple[int, int], float],
    settings: list[dict[str, float]],
) -> None:
    """Print what was measured, and check that torch's losses are ours.

    `losses` are JAX's, [seed, setting]; `torch_losses` are {(setting, seed): loss}.
    """
    ours, sampled = np.array(seconds["jax"]), np.array(seconds["torch"])
    torchs = sampled * losses.size / len(torch_losses)
    with_compilation = ours + seconds["compilation"]
    print(
        f"JAX: {losses.size} runs in {spread(ours)} s, and "
        f"{seconds['compilation']:.2f} s of compilation\n"
        f"torch: {len(torch_losses)} of these runs, chosen evenly, one after another, "
        f"in {spread(sampled)} s; scaled to {losses.size} runs: {spread(torchs)} s\n"
        f"torch's time over JAX's: {spread(torchs / ours)}; with compilation "
        f"{spread(torchs / with_compilation)}"
    )
    differences = {False: [0.0], True: [0.0]}
    for (number, seed), loss in torch_losses.items():
        is_long = longest_step(settings[number]) > LONG_STEP
        differences[is_long].append(abs(float(losses[seed, number]) / loss - 1))
    for is_long, apart in differences.items():
        kind = "with long steps, which rounding parts" if is_long else "runs"
        print(
            f"held-out losses of {len(apart) - 1} {kind}: within {np.max(apart):.0e} "
            "of torch's"
        )
    if not np.max(differences[False]) <= PROMISED_DIFFERENCE:  # nor NaN
        raise SystemExit(f"expected {PROMISED_DIFFERENCE:.0e}: please report it")


def spread(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"
