"""Time the 810 runs of examples/sweep.py, and 16 of them in torch, in turns.

Both start from the same parameters and see the same batches. torch's runs go one after
another, on one thread, and their time is scaled to 810 runs. The held-out losses are
compared too. Runs with long steps amplify rounding errors, and the two differ.

    python benchmarks/many_runs.py
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from step import environment

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

import _common
import sweep as example

SEEDS, STEPS, IN_TORCH = 5, 300, 16
LONG_STEP = 0.35  # above it, rounding errors grow until the two runs differ


def longest_step(setting):
    """The longest step that a spike of the gradient makes, summed over its momentum."""
    rate, momentum = setting["learning_rate"], setting["momentum"]
    return rate / ((1 - momentum) * (1 - setting["decay"]) ** 0.5)


def run_in_torch(setting, params, batches, digits):
    """Seconds of training, and the held-out loss. `digits` as from `split_digits`."""
    torch.set_num_threads(1)  # at this size more are slower
    images, held_out_images, labels, held_out_labels = map(torch.from_numpy, digits)
    labels, held_out_labels = labels.long(), held_out_labels.long()
    images, held_out_images = images.flatten(1), held_out_images.flatten(1)
    model = nn.Sequential(
        nn.Linear(64, example.HIDDEN), nn.Tanh(), nn.Linear(example.HIDDEN, 10)
    ).to(images.dtype)
    with torch.no_grad():
        for layer, name in ((model[0], "in"), (model[2], "out")):
            layer.weight.copy_(torch.tensor(params[name].T))
            layer.bias.copy_(torch.tensor(params[f"{name}_bias"]))
    optimizer = torch.optim.RMSprop(
        model.parameters(),
        lr=setting["learning_rate"],
        alpha=setting["decay"],
        eps=setting["eps"],
        momentum=setting["momentum"],
    )
    begin = time.perf_counter()
    for batch in torch.from_numpy(batches):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        logits = model(held_out_images)
        return seconds, nn.functional.cross_entropy(logits, held_out_labels).item()


def measure(seeds, steps, repeats):
    digits = _common.split_digits()
    images, held_out_images, labels, held_out_labels = map(jnp.asarray, digits)
    settings = {
        name: jnp.array([s[name] for s in example.SETTINGS], jnp.float32)
        for name in example.GRID
    }
    first = [example.first_params(seed) for seed in range(seeds)]
    batches = np.stack([example.batches_of(seed, steps) for seed in range(seeds)])
    arguments = settings, jax.tree.map(lambda *p: jnp.stack(p), *first), batches
    begin = time.perf_counter()
    compiled = example.train_all.lower(*arguments, images, labels).compile()
    seconds = {"compilation": time.perf_counter() - begin, "jax": [], "torch": []}
    jax.block_until_ready(compiled(*arguments, images, labels))  # warm up
    run_in_torch(example.SETTINGS[0], first[0], batches[0, :10], digits)

    # Evenly over the grid: with momentum 0, a step is an operation shorter in torch.
    sample = np.linspace(0, len(example.SETTINGS) * seeds - 1, IN_TORCH).round()
    losses = {}
    for _ in range(repeats):
        begin = time.perf_counter()
        params = jax.block_until_ready(compiled(*arguments, images, labels))
        seconds["jax"].append(time.perf_counter() - begin)
        spent = 0.0
        for run in sample.astype(int):
            number, seed = divmod(int(run), seeds)
            one = example.SETTINGS[number], first[seed], batches[seed], digits
            lasted, losses[number, seed] = run_in_torch(*one)
            spent += lasted
        seconds["torch"].append(spent)
    differences = {"short steps": [], "long steps": []}
    for (number, seed), loss in losses.items():
        last = jax.tree.map(lambda p: p[seed, number], params)  # noqa: B023
        ours, _ = example.measure(last, held_out_images, held_out_labels)
        is_long = longest_step(example.SETTINGS[number]) > LONG_STEP
        differences["long steps" if is_long else "short steps"].append(
            abs(float(ours) / loss - 1)
        )
    runs = {"runs": len(example.SETTINGS) * seeds, "torch_runs": len(losses)}
    return {**runs, "seconds": seconds, "loss_difference": differences}


def text(values):
    return f"{np.median(values):.2f} ({np.min(values):.2f} to {np.max(values):.2f})"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="of the measurement")
    parser.add_argument("--quick", action="store_true", help="few and short runs")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "results" / "many_runs.json",
        help="record, JSON",
    )
    options = parser.parse_args()
    size = (1, 10) if options.quick else (SEEDS, STEPS)
    about = environment()
    record = measure(*size, options.repeats)
    options.output.write_text(json.dumps({"about": about, **record}, indent=1) + "\n")

    seconds = record["seconds"]
    ours, theirs = np.array(seconds["jax"]), np.array(seconds["torch"])
    scaled = theirs * record["runs"] / record["torch_runs"]
    both = ours + seconds["compilation"]
    print(
        f"JAX: {record['runs']} runs in {text(ours)} s, and "
        f"{seconds['compilation']:.2f} s of compilation\n"
        f"torch: {record['torch_runs']} of them in {text(theirs)} s; scaled to all "
        f"{text(scaled)} s\n"
        f"torch's time over JAX's: {text(scaled / ours)}; with compilation "
        f"{text(scaled / both)}"
    )
    for kind, apart in record["loss_difference"].items():
        print(f"held-out losses of {len(apart)} runs with {kind}: within", end=" ")
        print(f"{max(apart, default=0):.0e} of torch's")
    print(f"All figures are in {options.output}")


if __name__ == "__main__":
    main()
