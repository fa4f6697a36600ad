"""Try 162 settings of RMSprop, with five seeds each, at once under `jax.vmap`.

    pip install -e ".[examples]" torch
    python examples/sweep.py

trains 810 small networks on scikit-learn's digits, and 16 of them in torch, one after
another. It prints how long either takes, and ends with a line like

    best: learning_rate 0.003, decay 0.999, momentum 0.5, eps 1e-08; held-out loss
    0.0868 ± 0.0047, accuracy 97.5% ± 0.3% over 5 seeds; figure in [...]/sweep.png

The table of all settings is written beside the figure, as JSON. Without torch there is
no comparison.
"""

import argparse
import importlib.util
import itertools
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import (
    TRAINED_ON,
    between,
    make_folder_of_figure,
    new_figure,
    split_digits,
)
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

import optax_rmsprop

GRID = {
    "learning_rate": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "decay": (0.9, 0.99, 0.999),
    "momentum": (0.0, 0.5, 0.9),
    "eps": (1e-8, 1e-4, 1e-2),
}
SETTINGS = [
    dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())
]
HIDDEN = 32
STEPS_A_ROUND = 30


def first_params(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kernels = {"in": rng.normal(size=(64, HIDDEN)) / 8}
    kernels["out"] = rng.normal(size=(HIDDEN, 10)) / HIDDEN**0.5
    biases = {"in_bias": np.zeros(HIDDEN), "out_bias": np.zeros(10)}
    return {name: p.astype(np.float32) for name, p in (kernels | biases).items()}


def batches_of(options: argparse.Namespace) -> np.ndarray:
    """Which digits are in a batch: (rounds, seeds, steps of a round, batch size)."""
    shape = (options.rounds, STEPS_A_ROUND, options.batch_size)
    seeds = [np.random.default_rng([s, 1]) for s in range(options.seeds)]
    return np.stack([rng.integers(TRAINED_ON, size=shape) for rng in seeds], axis=1)


def loss_and_accuracy(
    params: dict[str, jax.Array], images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Smooth: at a ReLU's kink, rounding would part these runs from torch's.
    hidden = jnp.tanh(images @ params["in"] + params["in_bias"][None])
    logits = hidden @ params["out"] + params["out_bias"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(-1) == labels).mean()


def step(setting, params, state, images, labels):
    """One step of one run. The four numbers of its setting may be traced."""
    gradient = jax.value_and_grad(loss_and_accuracy, has_aux=True)
    (loss, _), grads = gradient(params, images, labels)
    updates, state = optax_rmsprop.rmsprop(**setting).update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


@jax.jit
def one_round(settings, runs, images, labels, batches):
    """All runs by one round. Also returns the training losses of the last step."""

    def with_one_seed(runs_and_batches):
        def one_step(runs, batch):
            every_setting = jax.vmap(step, (0, 0, 0, None, None))
            *runs, loss = every_setting(settings, *runs, images[batch], labels[batch])
            return tuple(runs), loss

        runs, losses = jax.lax.scan(one_step, *runs_and_batches)
        return runs, losses[-1]

    # Not a second vmap: the settings share a seed's batches, so that their first
    # layers are one large product. Over seeds too a step takes 1.2 to 1.4 times as
    # long. Smaller groups of settings than all 162 gain little.
    return jax.lax.map(with_one_seed, (runs, batches))


def start(settings: dict[str, jax.Array], seeds: int) -> tuple:
    """First parameters and optimizer states, stacked: (seeds, settings, ...)."""
    params = jax.tree.map(lambda *p: np.stack(p), *map(first_params, range(seeds)))
    count = len(settings["eps"])
    params = jax.tree.map(lambda p: np.repeat(p[:, None], count, axis=1), params)
    init = jax.vmap(lambda setting, p: optax_rmsprop.rmsprop(**setting).init(p))
    return jax.device_put(params), jax.vmap(init, (None, 0))(settings, params)


def train(compiled, settings, runs, images, labels, batches):
    """Seconds, and the trained parameters."""
    begin = time.perf_counter()
    for number, batch in enumerate(batches, start=1):
        runs, losses = compiled(settings, runs, images, labels, batch)
        losses, seconds = np.asarray(losses), time.perf_counter() - begin
        print(
            f"round {number:2} of {len(batches)}, {seconds:5.2f} s: training loss "
            f"{np.nanmin(losses):.4f} (best), {np.nanmedian(losses):.4f} (median)",
            flush=True,
        )
    jax.block_until_ready(runs)
    return time.perf_counter() - begin, runs[0]


def table(losses: np.ndarray, accuracies: np.ndarray) -> list[dict]:
    """A row a setting: means and standard deviations over the seeds, no NaN."""
    rows = []
    for setting, loss, accuracy in zip(SETTINGS, losses.T, accuracies.T, strict=True):
        finite = np.isfinite(loss).all()
        row = {
            "loss": float(loss.mean()) if finite else None,
            "loss_std": float(loss.std()) if finite else None,
            "accuracy": float(accuracy.mean()),
            "accuracy_std": float(accuracy.std()),
        }
        rows.append(setting | row)
    return rows


def best_of(rows: list[dict]) -> dict:
    """The smallest mean loss; a setting with a run that is not finite loses."""
    return min(rows, key=lambda r: np.inf if r["loss"] is None else r["loss"])


def draw(rows: list[dict], seeds: int, path: Path) -> None:
    rates, decays, momenta, epses = GRID.values()
    shape = tuple(map(len, GRID.values()))
    losses = np.array([np.nan if r["loss"] is None else r["loss"] for r in rows])
    rate, *panel, eps = np.unravel_index(rows.index(best_of(rows)), shape)
    norm = LogNorm(np.nanmin(losses), np.nanmax(losses))
    losses = losses.reshape(shape)
    accuracies = np.reshape([r["accuracy"] for r in rows], shape)
    figure = new_figure(5.6)
    figure.suptitle(f"Held-out loss and accuracy (%), means over {seeds} seeds")
    panels = figure.subplots(len(decays), len(momenta), sharex=True, sharey=True)
    for (d, m), axes in np.ndenumerate(panels):
        shown = losses[:, d, m].T
        axes.grid(visible=False)
        image = axes.imshow(shown, norm=norm, cmap="viridis_r", aspect="auto")
        for (e, r), loss in np.ndenumerate(shown):
            text = f"{100 * accuracies[r, d, m, e]:.1f}"
            color = "white" if norm(loss) > 0.4 else "black"
            axes.text(r, e, text, ha="center", va="center", color=color, fontsize=8)
        if [d, m] == panel:
            corner = (rate - 0.5, eps - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, color="red", lw=2))
        axes.set_title(f"decay {decays[d]}, momentum {momenta[m]}", fontsize=9)
        axes.set_xticks(range(len(rates)), [f"{x:g}" for x in rates], fontsize=6.5)
        axes.set_yticks(range(len(epses)), [f"{x:g}" for x in epses], fontsize=6.5)
    figure.supxlabel("learning rate")
    figure.supylabel("eps")
    figure.colorbar(image, ax=panels, label="held-out loss")
    figure.savefig(path, dpi=150)


def compare(options, settings, digits, batches):
    """Time JAX and torch in turns.

    Returns the parameters, the seconds and torch's losses {(setting, seed): loss}.
    """
    images, _, labels, _ = map(jnp.asarray, digits)
    runs = jax.block_until_ready(start(settings, options.seeds))
    begin = time.perf_counter()
    compiled = one_round.lower(settings, runs, images, labels, batches[0]).compile()
    seconds = {"compilation": time.perf_counter() - begin, "jax": [], "torch": []}
    jax.block_until_ready(compiled(settings, runs, images, labels, batches[0]))
    # Evenly over the grid: with momentum 0, a step is an operation shorter in torch.
    sample = np.linspace(0, len(SETTINGS) * options.seeds - 1, options.torch_runs)
    sample = [divmod(round(number), options.seeds) for number in sample]
    if sample:
        from sweep_torch import run

        run(SETTINGS[0], first_params(0), digits, batches[:1, 0])  # warm up
    losses = {}
    for _ in range(options.repeats):
        spent, params = train(compiled, settings, runs, images, labels, batches)
        seconds["jax"].append(spent)
        spent = 0.0
        for number, seed in sample:
            first, chosen = first_params(seed), batches[:, seed]
            one, loss = run(SETTINGS[number], first, digits, chosen)
            spent, losses[number, seed] = spent + one, loss
        seconds["torch"].append(spent)
    return params, seconds, losses


def write(path: Path, record: dict, rows: list[dict]) -> None:
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps(record, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "settings": [\n{lines}\n ]\n}}\n')


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    figure = os.path.relpath(Path(__file__).with_name("output") / "sweep.png")
    torch_runs = 16 if importlib.util.find_spec("torch") else 0
    for name, kind, default, text in (
        ("rounds", between(int, 1, 1000), 10, f"of {STEPS_A_ROUND} steps each"),
        ("seeds", between(int, 1, 100), 5, "runs of every setting"),
        ("batch-size", between(int, 1, TRAINED_ON), 64, "digits in a step"),
        ("torch-runs", between(int, 0, 100), torch_runs, "runs to time in torch too"),
        ("repeats", between(int, 1, 100), 3, "of the measurement"),
        ("output", Path, figure, "file of the figure; the table is beside it"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Train all, compare, write; return the row of the best setting."""
    parser = command_line()
    options = parser.parse_args(argv)
    if options.torch_runs and importlib.util.find_spec("torch") is None:
        parser.error("--torch-runs needs torch: pip install torch")
    make_folder_of_figure(parser, options.output)
    digits = split_digits()
    digits[:2] = (images.reshape(len(images), 64) for images in digits[:2])
    settings = {n: jnp.array([s[n] for s in SETTINGS], jnp.float32) for n in GRID}
    batches = batches_of(options)
    params, seconds, torch_losses = compare(options, settings, digits, batches)
    evaluate = jax.vmap(jax.vmap(loss_and_accuracy, (0, None, None)), (0, None, None))
    held_out = jax.jit(evaluate)(params, digits[1], digits[3])
    losses, accuracies = map(np.asarray, held_out)
    rows = table(losses, accuracies)
    best = best_of(rows)
    if best["loss"] is None:
        raise SystemExit("no setting has a finite loss with every seed")
    draw(rows, options.seeds, options.output)
    packages = ("jax", "torch") if torch_losses else ("jax",)
    record = {"versions": {name: version(name) for name in packages}}
    record |= {"cores": os.cpu_count(), "runs": losses.size}
    record |= {"torch_runs": len(torch_losses), "seconds": seconds}
    write(options.output.with_suffix(".json"), record, rows)
    if torch_losses:
        from sweep_torch import report

        report(seconds, losses, torch_losses, SETTINGS)
    chosen = ", ".join(f"{name} {best[name]:g}" for name in GRID)
    print(
        f"best: {chosen}; held-out loss {best['loss']:.4f} ± {best['loss_std']:.4f}, "
        f"accuracy {best['accuracy']:.1%} ± {best['accuracy_std']:.1%} over "
        f"{options.seeds} seeds; figure in {options.output}"
    )
    return best


if __name__ == "__main__":
    main()
