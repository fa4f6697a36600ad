"""Parameter groups: a frozen stem, a backbone with a tenth of the rate, a new head.

    pip install -e ".[examples]"
    python examples/groups.py

trains a network on scikit-learn's digits 0 to 4, gives it a new head for all ten, and
goes on in three groups, in which kernels decay, and biases and norms do not:

    held-out accuracy 94.7%; moved: stem 0.0%, backbone 22.2%, head 202.3%

The same in torch:

    model.stem.requires_grad_(False)
    groups = [
        {"params": [model.linear.weight], "lr": 1e-4, "weight_decay": 1e-3},
        {"params": [model.linear.bias, *model.norm.parameters()], "lr": 1e-4},
        {"params": [model.head.weight], "lr": 1e-3, "weight_decay": 1e-3},
        {"params": [model.head.bias], "lr": 1e-3},
    ]
    optimizer = torch.optim.RMSprop(groups, alpha=0.9, eps=1e-3, momentum=0.9)
    for group in optimizer.param_groups: group["lr"] /= 10  # when half is done
"""

import digits
import jax
import numpy as np
import optax
from flax import linen

from optax_rmsprop import rmsprop

GROUPS, STEPS = ("stem", "backbone", "head"), 600


class Network(linen.Module):
    def setup(self):
        self.stem, self.head = linen.Dense(64), linen.Dense(10)
        self.backbone = linen.Sequential([linen.Dense(64), linen.LayerNorm()])

    def __call__(self, images):
        x = linen.silu(self.stem(images.reshape(len(images), -1)))
        return self.head(linen.silu(self.backbone(x)))


def measure(params, *batch):
    return digits.loss_and_accuracy(Network().bind({"params": params}), *batch)


def kernels(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


RECIPE = {"decay": 0.9, "eps": 1e-3, "momentum": 0.9, "weight_decay": 1e-3}
RECIPE["weight_decay_mask"] = kernels


def in_groups(rate):
    # inject_hyperparams would call the mask as a schedule, were it not static.
    group = optax.inject_hyperparams(rmsprop, static_args="weight_decay_mask")
    transforms = {"backbone": group(rate / 10, **RECIPE), "head": group(rate, **RECIPE)}
    transforms["stem"] = optax.set_to_zero()
    return optax.partition(transforms, {g: g for g in GROUPS})  # first name in a path


def train(params, tx, images, labels, steps):
    @jax.jit
    def train_step(params, state, *batch):
        grads, _ = jax.grad(measure, has_aux=True)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(0)
    for index in rng.integers(len(labels), size=(steps, 32)):
        params, state = train_step(params, state, images[index], labels[index])
        yield params, state


def distances(params, first):
    ways = jax.tree.map(lambda p, q: p - q, params, first)
    return [optax.tree.norm(ways[g]) / optax.tree.norm(first[g]) for g in GROUPS]


def check(tx, first, params):
    if not jax.tree.all(jax.tree.map(np.array_equal, params["stem"], first["stem"])):
        raise SystemExit("expected the frozen stem to keep every bit, and it moved")
    # Where gradients are 0, only weight decay makes an update.
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    expected = kernels(params) | {"stem": {"kernel": False, "bias": False}}
    if jax.tree.map(lambda u: bool(np.any(u)), updates) != expected:
        raise SystemExit("expected decay of the kernels of backbone and head, no other")


def main(argv=None):
    options = digits.parse(__doc__, __file__, argv, steps=(STEPS, "of training"))
    images, held_out_images, labels, held_out_labels = digits.split_digits()
    few, tx = labels < 5, rmsprop(1e-3, **RECIPE)
    old, new = (Network().init(jax.random.key(k), images[:1])["params"] for k in (0, 1))
    *_, (known, _) = train(old, tx, images[few], labels[few], STEPS)
    first, tx, ways = known | {"head": new["head"]}, in_groups(1e-3), []
    for params, state in train(first, tx, images, labels, options.steps):
        ways.append(distances(params, first))
        if len(ways) == options.steps // 2:
            for group in GROUPS[1:]:  # what is written here is in the state
                rates = state.inner_states[group].inner_state.hyperparams
                rates["learning_rate"] *= 0.1

    axes = digits.new_figure(3.6).subplots()
    axes.plot(100 * np.array(ways), label=GROUPS)
    axes.set(xlabel="step (half way, rates fall to a tenth)", ylabel="moved, %")
    axes.legend()
    axes.figure.savefig(options.output, dpi=150)
    check(tx, first, params)
    _, accuracy = measure(params, held_out_images, held_out_labels)
    each = ", ".join(f"{g} {way:.1%}" for g, way in zip(GROUPS, ways[-1], strict=True))
    print(f"held-out accuracy {accuracy:.1%}; moved: {each}")


if __name__ == "__main__":
    main()
