"""Draw first_look.png: torch and ours on one line, and others turning NaN.

    python docs/figures/first_look.py

Left, a network of 64, 32 and 10 units learns to read scikit-learn's digits, in torch
and in JAX, from the same weights and with the same batches. Right, centered RMSprop on
a gradient that hardly changes.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from never_nan import LR, centered, steady, theirs
from sklearn.datasets import load_digits

from optax_rmsprop import rmsprop

HERE = Path(__file__)
STEPS, BATCH = 400, 512


def task():
    rng = np.random.default_rng(0)
    images, digits = load_digits(return_X_y=True)
    rows = rng.integers(len(digits), size=(STEPS, BATCH))
    weights = [rng.normal(size=(n, m)) / np.sqrt(n) for n, m in ((64, 32), (32, 10))]
    weights = [w.astype(np.float32) for w in weights]
    return weights, images.astype(np.float32)[rows] / 16, digits.astype(np.int32)[rows]


def losses_in_torch(weights, images, digits):
    weights = [torch.tensor(w, requires_grad=True) for w in weights]
    tx = torch.optim.RMSprop(weights, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    losses = []
    for x, y in zip(torch.tensor(images), torch.tensor(digits).long(), strict=True):
        logits = torch.tanh(x @ weights[0]) @ weights[1]
        loss = torch.nn.functional.cross_entropy(logits, y)
        tx.zero_grad()
        loss.backward()
        tx.step()
        losses.append(loss.item())
    return np.array(losses)


def losses_in_jax(weights, images, digits):
    tx = rmsprop(learning_rate=1e-3, momentum=0.9, weight_decay=1e-4)

    def loss_of(weights, x, y):
        logits = jnp.tanh(x @ weights[0]) @ weights[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(run, batch):
        weights, state = run
        loss, grads = jax.value_and_grad(loss_of)(weights, *batch)
        updates, state = tx.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), loss

    weights = jax.tree.map(jnp.array, weights)
    return np.array(
        jax.lax.scan(step, (weights, tx.init(weights)), (images, digits))[1]
    )


def path_in_torch(gradients):
    p = torch.zeros(1)
    tx = torch.optim.RMSprop([p], LR, 0.9, 1e-2, centered=True)
    path = []
    for g in torch.tensor(gradients):
        p.grad = g[None]
        tx.step()
        path.append(p.item())
    return path


def draw_losses(axes):
    run = task()
    ours, theirs = losses_in_jax(*run), losses_in_torch(*run)
    axes.plot(ours, "C0", linewidth=3, label="optax_rmsprop")
    axes.plot(theirs, "C1", linewidth=1, linestyle="--", label="torch")
    axes.set(title="Digits: one line", xlabel="step", ylabel="training loss")
    axes.set(yscale="log")
    axes.legend()
    print(f"losses differ by at most {np.max(np.abs(ours - theirs)):.1e}")


def draw_paths(axes, steps=400):
    paths = {
        "optax_rmsprop": centered(rmsprop, steps),
        "torch": path_in_torch(steady(steps)),
        "optax": centered(theirs, steps),
    }
    styles = ("C0", 3, "-"), ("C1", 1.6, "--"), ("C4", 1.6, ":")
    for (name, path), (color, width, style) in zip(paths.items(), styles, strict=True):
        axes.plot(path, color, linewidth=width, linestyle=style, label=name)
        if np.isnan(path[-1]):
            last = int(np.argmax(np.isnan(path))) - 1
            end = last, path[last]
            axes.plot(*end, "X", color="C3", markersize=10)
            how = {"textcoords": "offset points", "color": "C3"}
            axes.annotate(f"{name}: NaN", end, (12, 2), **how)
            print(f"{name} is NaN from step {last + 2} on")
    axes.set(title="Centered, gradients 1 ± 0.0001", xlabel="step", ylabel="parameter")
    axes.legend(loc="lower left")


def main():
    plt.style.use(HERE.with_name("site.mplstyle"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    draw_losses(left)
    draw_paths(right)
    figure.savefig(HERE.with_suffix(".png"))


if __name__ == "__main__":
    main()
