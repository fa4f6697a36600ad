"""Port a small MobileNet from torch to Flax: first torch's RMSprop, then TensorFlow's.

    pip install -e ".[examples]" torch
    python examples/port_from_torch.py

Part one trains the same network in torch and in Flax on the same batches, the latter
with `dialects.torch`, and prints the divergence. Part two trains it in Flax with
`dialects.tensorflow` as EfficientNet was trained, and beside it with `dialects.torch`:
the same arguments, another run. It ends with two lines like

    part one: held-out accuracy 98.7% in torch, 98.7% in JAX, parameters within 1e-06
    part two: held-out accuracy 98.4% with TensorFlow's, 99.3% with torch's

Without torch there is only part two.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import TRAINED_ON, between, new_figure, shifted_batches, split_digits
from flax import nnx
from tqdm import tqdm

from optax_rmsprop import dialects

PROMISED_ACCURACY = 0.97
PROMISED_DIFFERENCE = 2e-5  # observed: 0.8e-6 to 2.3e-6 over six seeds


class ConvNorm(nnx.Module):
    def __init__(
        self, channels: tuple[int, int], size: int, *, rngs: nnx.Rngs, **kinds: int
    ):
        # padding: not "SAME", which with a stride of 2 pads only below and right.
        # use_bias: the norm cancels a bias, so its gradient is rounding alone. With
        # eps=1e-8 RMSprop makes whole steps of that: biases part by 0.3 in an epoch.
        shape, padding = (size, size), size // 2
        self.conv = nnx.Conv(
            *channels, shape, padding=padding, use_bias=False, rngs=rngs, **kinds
        )
        self.norm = nnx.BatchNorm(
            channels[1],
            momentum=0.9,  # the weight of the old statistics; torch's, 0.1, of the new
            epsilon=1e-5,  # as in torch
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        # The running variance is the biased one; torch's is n/(n - 1) times it. Only
        # evaluation sees that: training divides by the batch's biased one in both.
        x = self.norm(self.conv(x), use_running_average=not training)
        return nnx.silu(x)  # smooth: at a ReLU's kink rounding would part the runs


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        # feature_group_count: depthwise, a group for each channel; torch's `groups`.
        self.stem = ConvNorm((1, 16), 3, rngs=rngs)
        self.depthwise1 = ConvNorm((16, 16), 3, feature_group_count=16, rngs=rngs)
        self.pointwise1 = ConvNorm((16, 32), 1, rngs=rngs)
        self.depthwise2 = ConvNorm(
            (32, 32), 3, strides=2, feature_group_count=32, rngs=rngs
        )
        self.pointwise2 = ConvNorm((32, 64), 1, rngs=rngs)
        self.depthwise3 = ConvNorm((64, 64), 3, feature_group_count=64, rngs=rngs)
        self.pointwise3 = ConvNorm((64, 128), 1, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array, training: bool = False) -> jax.Array:
        x = self.stem(images[..., None], training)
        x = self.pointwise1(self.depthwise1(x, training), training)
        x = self.pointwise2(self.depthwise2(x, training), training)
        x = self.pointwise3(self.depthwise3(x, training), training)
        return self.head(x.mean((1, 2)))


def loss_with_l2(
    model: Network, images: jax.Array, labels: jax.Array, l2: float
) -> tuple[jax.Array, jax.Array]:
    logits = model(images, training=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    outside_norms = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("norm")))
    squares = optax.tree.norm(nnx.state(model, outside_norms), squared=True)
    return loss + l2 * squares / 2, loss  # halved, as in tf.nn.l2_loss


@nnx.jit
def train_step(
    model: Network,
    optimizer: nnx.Optimizer,
    images: jax.Array,
    labels: jax.Array,
    l2: float = 0.0,
) -> jax.Array:
    gradient = nnx.value_and_grad(loss_with_l2, has_aux=True)
    (_, loss), grads = gradient(model, images, labels, l2)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def accuracy(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    return (model(images).argmax(-1) == labels).mean()


@nnx.jit
def average(averaged: Network, model: Network, step: jax.Array) -> None:
    """TensorFlow's ExponentialMovingAverage(0.9999, num_updates=step)."""
    # The weight of the old is min(0.9999, (1 + step)/(10 + step)). Running statistics
    # are averaged too, as EfficientNet's are.
    weight_of_new = jnp.maximum(1e-4, 9 / (10 + step))
    new, old = nnx.state(model), nnx.state(averaged)
    nnx.update(averaged, optax.incremental_update(new, old, weight_of_new))


def part_one(
    options: argparse.Namespace, curve: list, dialect: Callable = dialects.torch
) -> tuple[float, float, float]:
    """Held-out accuracy in torch and in JAX, largest difference of a parameter.

    The curve gets both losses and that difference after every epoch.

    torchvision's recipe for MobileNetV3, but for a faster decay of the learning rate:
    its 0.973 every two epochs is for 600 epochs.
    """
    import torch
    from port_from_torch_network import Network as TorchNetwork
    from port_from_torch_network import largest_difference, port

    torch.set_num_threads(1)  # more would fight with JAX's over the cores
    torch.manual_seed(options.seed)
    network = TorchNetwork()
    lr = options.learning_rate * options.batch_size / 256
    recipe = {"alpha": 0.9, "eps": 0.0316, "momentum": 0.9, "weight_decay": 1e-5}

    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
    torch_optimizer = torch.optim.RMSprop(groups, lr=lr, **recipe)
    scheduler = torch.optim.lr_scheduler.StepLR(torch_optimizer, 2, gamma=0.7)

    model = Network(nnx.Rngs(options.seed))
    port(network, model)
    # Stepped once an epoch, torch's scheduler counts epochs; optax counts updates.
    two_epochs = 2 * (TRAINED_ON // options.batch_size)
    schedule = optax.exponential_decay(lr, two_epochs, 0.7, staircase=True)
    tx = dialect(
        schedule,
        **recipe,
        weight_decay_mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    images, held_out_images, labels, held_out_labels = split_digits()
    rng = np.random.default_rng(options.seed)
    with tqdm(range(1, options.epochs + 1), "part one", unit="epoch") as bar:
        for epoch in bar:
            torch_losses, losses = [], []
            for batch in shifted_batches(images, labels, options.batch_size, rng):
                losses.append(train_step(model, optimizer, *batch))
                logits = network(torch.from_numpy(batch[0]))
                torch_labels = torch.from_numpy(batch[1]).long()
                loss = torch.nn.functional.cross_entropy(logits, torch_labels)
                torch_optimizer.zero_grad()
                loss.backward()
                torch_optimizer.step()
                torch_losses.append(loss.item())
            scheduler.step()
            difference = largest_difference(network, model)
            curve.append((np.mean(torch_losses), np.mean(losses), difference))
            bar.write(
                f"epoch {epoch:2}: loss {np.mean(torch_losses):.6f} in torch, "
                f"{np.mean(losses):.6f} in JAX; largest difference of a parameter "
                f"{difference:.1e}"
            )
    network.eval()
    with torch.no_grad():
        guesses = network(torch.from_numpy(held_out_images)).argmax(1).numpy()
    in_torch = (guesses == held_out_labels).mean()
    in_jax = accuracy(model, held_out_images, held_out_labels)
    return float(in_torch), float(in_jax), float(difference)


def efficientnet_schedule(peak: float, steps_per_epoch: int) -> optax.Schedule:
    """Up to the peak in 5 epochs; 0.97 times as much after every 2.4 epochs."""
    warm_up = 5 * steps_per_epoch
    decaying = optax.exponential_decay(
        peak, 2.4 * steps_per_epoch, 0.97, staircase=True
    )
    # The decay counts from step 0, so that the warm-up ends above it. With
    # optax.warmup_exponential_decay_schedule it would count from the warm-up's end.
    return lambda step: jnp.where(step < warm_up, peak * step / warm_up, decaying(step))


def part_two(options: argparse.Namespace, curve: list) -> list[float]:
    """Held-out accuracy of the averaged weights, with TensorFlow's and torch's.

    The curve gets both after every epoch.

    Every number is EfficientNet's (arXiv:1905.11946 and its code), none is changed:
    with 32 digits in a batch the learning rate is 0.002. Left out: label smoothing,
    dropout, its batch norm's own epsilon and momentum.
    """
    peak = options.learning_rate * options.batch_size / 256
    schedule = efficientnet_schedule(peak, TRAINED_ON // options.batch_size)
    runs = []
    for tx in (
        dialects.tensorflow(schedule, decay=0.9, momentum=0.9, epsilon=1e-3),
        dialects.torch(schedule, alpha=0.9, momentum=0.9, eps=1e-3),
    ):
        model, averaged = (Network(nnx.Rngs(options.seed)) for _ in range(2))
        runs.append((model, averaged, nnx.Optimizer(model, tx, wrt=nnx.Param)))

    images, held_out_images, labels, held_out_labels = split_digits()
    rng = np.random.default_rng(options.seed)
    with tqdm(range(1, options.epochs + 1), "part two", unit="epoch") as bar:
        for epoch in bar:
            losses = []
            for batch in shifted_batches(images, labels, options.batch_size, rng):
                for model, averaged, optimizer in runs:
                    losses.append(train_step(model, optimizer, *batch, l2=1e-5))
                    average(averaged, model, optimizer.step[...])
            accuracies = [
                float(accuracy(averaged, held_out_images, held_out_labels))
                for _, averaged, _ in runs
            ]
            curve.append(accuracies)
            bar.write(
                f"epoch {epoch:2}: loss {np.mean(losses[::2]):.6f} with TensorFlow's, "
                f"{np.mean(losses[1::2]):.6f} with torch's; held-out accuracy "
                f"{accuracies[0]:.1%}, {accuracies[1]:.1%}"
            )
    return accuracies


def draw(part_one: list, part_two: list, path: Path) -> None:
    figure = new_figure(3.8)
    one, two = figure.subplots(1, 2)
    for part, axes in zip(("one", "two"), (one, two), strict=True):
        axes.set(xlabel="epoch", title=f"Part {part}")
    if part_one:
        in_torch, in_jax, apart = np.transpose(part_one)
        epochs = np.arange(1, len(apart) + 1)
        one.semilogy(epochs, in_torch, "C1", lw=5, alpha=0.5, label="loss in torch")
        one.semilogy(epochs, in_jax, "C0", label="loss in JAX")
        one.semilogy(epochs, apart, "C5.:", label="largest difference of a parameter")
        one.legend()
    accuracies = 100 * np.array(part_two)
    epochs = np.arange(1, len(accuracies) + 1)
    two.plot(epochs, accuracies, ".-", label=["TensorFlow's", "torch's"])
    two.set_ylabel("held-out accuracy, %")
    two.legend()
    figure.savefig(path, dpi=150)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, kind, default, text in (
        ("epochs", between(int, 1, 1000), 15, "passes over the training digits"),
        ("batch-size", between(int, 1, TRAINED_ON), 32, "digits in a step"),
        ("learning-rate", between(float, 0, 1), 0.016, "for 256 digits in a step"),
        ("seed", between(int, 0, 2**32 - 1), 0, "of the first weights and the batches"),
        ("output", Path, None, "file of a figure of both parts"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train in both parts, and report."""
    parser = command_line()
    options = parser.parse_args(argv)
    lines, kept, curves = [], [], ([], [])
    if importlib.util.find_spec("torch"):
        # Unless told otherwise, JAX multiplies in fewer bits on a GPU or TPU.
        with jax.default_matmul_precision("float32"):
            in_torch, in_jax, difference = part_one(options, curves[0])
        lines.append(
            f"held-out accuracy {in_torch:.1%} in torch, {in_jax:.1%} in JAX, "
            f"parameters within {difference:.0e}"
        )
        kept.append(min(in_torch, in_jax) >= PROMISED_ACCURACY)
        kept.append(difference <= PROMISED_DIFFERENCE)
    else:
        lines.append("skipped, for it needs torch: pip install torch")
    tensorflows, torchs = part_two(options, curves[1])
    lines.append(
        f"held-out accuracy {tensorflows:.1%} with TensorFlow's, {torchs:.1%} with "
        "torch's"
    )
    kept.append(min(tensorflows, torchs) >= PROMISED_ACCURACY)
    for number, line in zip(("one", "two"), lines, strict=True):
        print(f"part {number}: {line}")

    if options.output:
        draw(*curves, options.output)
    free = argparse.Namespace(seed=options.seed, output=options.output)
    same_recipe = parser.parse_args([], free) == options
    if same_recipe and not all(kept):
        raise SystemExit(
            f"expected accuracies of {PROMISED_ACCURACY:.0%} and parameters within "
            f"{PROMISED_DIFFERENCE:.0e}: please report it"
        )


if __name__ == "__main__":
    main()
