"""Draw figures of docs/parameters.md: momentum, its options, and weight decay.

python docs/figures/parameters_momentum.py

writes parameters_momentum.png and so on beside this file; with names, only those.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from five_dialects import loss_of, problem
from parameters import descent, save, steps, training

from optax_rmsprop import rmsprop


def loss(params, changes, state):
    del changes, state
    return loss_of(params, *problem()[1:3])


def momentum(updates=60, trained=400):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for m, color in ((0.0, "C5"), (0.5, "C2"), (0.9, "C0"), (0.95, "C4")):
        # Corrected, steps have their final length at once but for momentum.
        tx = rmsprop(1.0, momentum=m, bias_correction=True)
        at = np.arange(1, updates + 1)
        left.plot(at, steps(tx, jnp.ones(updates)), color, label=f"momentum {m:g}")
    for m, lr, style in ((0.0, 1e-3, "C5-"), (0.9, 1e-3, "C1--"), (0.9, 1e-4, "C0-.")):
        label = f"momentum {m:g}, learning rate {lr:g}"
        right.semilogy(
            training(rmsprop(lr, 0.99, momentum=m), loss, trained), style, label=label
        )
    left.set(title="A steady gradient", xlabel="updates")
    left.set(ylabel="step (learning rates)", ylim=(0, 26))
    right.set(title="Training on digits", xlabel="updates", ylabel="loss")
    right.set_ylim(2e-3, 20)
    left.legend(loc="upper left", ncols=2)
    right.legend()
    return figure


def lr_in_momentum(updates=120):
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    fall = updates // 2
    schedules = {
        "A fall to a tenth": lambda count: jnp.where(count < fall, 1.0, 0.1),
        "A rise and a fall": optax.join_schedules(
            [
                optax.linear_schedule(0.0, 1.0, fall),
                optax.linear_schedule(1.0, 0.0, updates - fall),
            ],
            [fall],
        ),
    }
    for axes, (title, schedule) in zip(panels, schedules.items(), strict=True):
        for inside, style in ((False, "C0-"), (True, "C1--")):
            tx = rmsprop(
                schedule, momentum=0.9, bias_correction=True, lr_in_momentum=inside
            )
            label = f"{'inside' if inside else 'outside'} the buffer"
            axes.plot(steps(tx, jnp.ones(updates)), style, label=label)
        axes.set(title=title, xlabel="updates")
    panels[0].set_ylabel("step (peak learning rates)")
    panels[0].legend()
    return figure


def nesterov(updates=120):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    impulse = jnp.zeros(12).at[0].set(1.0)
    for ahead, color, shift in ((False, "C1", -0.2), (True, "C0", 0.2)):
        label = "nesterov" if ahead else "plain momentum"
        # Without memory and eps, u is the sign of the gradient.
        tx = rmsprop(1.0, 0.0, 0.0, momentum=0.9, nesterov=ahead)
        at = np.arange(len(impulse)) + shift
        left.bar(at, steps(tx, impulse), 0.4, color=color, label=label)
        tx = rmsprop(0.02, 0.9, momentum=0.9, nesterov=ahead)
        path = descent(tx, lambda p: p, 3.0, updates)
        right.plot(path, color=color, label=label)
    left.set(xlabel="age of the gradient (updates)", ylabel="weight in the step")
    left.set_xticks(range(0, 12, 2))
    right.set(title="To the minimum of p²/2", xlabel="updates", ylabel="p")
    left.set_title("What the step is made of")
    right.legend()
    return figure


def noisy(tx, sizes, updates, numbers, start):
    """Parameters under noise of these sizes alone: the last, and means on the way."""
    key = jax.random.key(0)
    sizes = jnp.asarray(sizes, jnp.float32)[:, None]

    def step(carry, i):
        p, state = carry
        shape = (len(sizes), numbers)
        g = sizes * jax.random.normal(jax.random.fold_in(key, i), shape)
        changes, state = tx.update(g, state, p)
        p = p + changes
        return (p, state), p.mean(1)

    p = jnp.full((len(sizes), numbers), start)
    (p, _), means = jax.lax.scan(step, (p, tx.init(p)), jnp.arange(updates))
    return p, means


def weight_decay(updates=3000, rest=30000, numbers=512):
    lr, decay = 0.01, 0.1
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    sizes = np.geomspace(0.01, 10, 7)
    shown = {10.0: "C4", 1.0: "C0", 0.1: "C2"}
    for decoupled, style in ((False, "C0o"), (True, "C1s")):
        tx = rmsprop(lr, weight_decay=decay, decoupled_weight_decay=decoupled)
        means = noisy(tx, list(shown), updates, numbers, 1.0)[1]
        for mean, (size, color) in zip(means.T, shown.items(), strict=True):
            if decoupled:
                label = "decoupled, all three" if size == 1 else None
                left.plot(mean, "C1:", label=label)
            else:
                left.plot(mean, color, label=f"L2, noise of size {size:g}")
        p = noisy(tx, sizes, rest, numbers, 0.0)[0]
        right.loglog(sizes, p.std(1), style, label="decoupled" if decoupled else "L2")
        formula = np.sqrt(lr * (np.ones(7) if decoupled else sizes) / (2 * decay))
        right.loglog(sizes, formula, "C5--", linewidth=1, zorder=1)
    left.set(title="From 1", xlabel="updates", ylabel="mean parameter")
    right.set(title="At rest", xlabel="size of the gradients' noise", ylim=(0.01, 1.5))
    right.set_ylabel("spread of the parameters")
    left.legend(loc=(0.42, 0.36))
    right.legend()
    return figure


functions = (momentum, lr_in_momentum, nesterov, weight_decay)
FIGURES = {f.__name__: f for f in functions}

if __name__ == "__main__":
    save(FIGURES)
