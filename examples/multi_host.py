"""Train on scikit-learn's digits over the devices of several hosts, sharded (FSDP).

    pip install -e ".[examples]"
    python examples/multi_host.py

starts two processes on this machine, with two virtual CPU devices each. Parameters and
RMSprop's state are spread over all four, and each process reads its own rows of every
batch. Then each process repeats the run alone on one device, and compares. It ends with

    processes: 2, devices: 4, with 25.0% of the state on each; loss at the end 0.0753, \
alone 0.0753
    losses within 7e-07, parameters within 2e-07 of the run on one device

The same file runs on a TPU pod, once on every host, with as many devices as there are:

    gcloud compute tpus tpu-vm scp examples/multi_host.py NAME: --worker=all
    gcloud compute tpus tpu-vm ssh NAME --worker=all \
--command "python multi_host.py --pod"

(with `--zone`, and after `pip install "jax[tpu]"` and the line above in the same way).
On a cluster of GPUs under Slurm: `srun python multi_host.py --pod`.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import optax_rmsprop

PROMISED_DIFFERENCE = 1e-4
DIGITS = 1797


class Network(linen.Module):
    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = linen.silu(linen.Dense(256)(x))
        return linen.Dense(10)(x)


def my_rows(
    options: argparse.Namespace, index: int, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Part `index` of `count` of each batch, which depends on seed and step only."""
    scans = load_digits()
    images = (scans.images / 16).astype(np.float32)
    labels = scans.target.astype(np.int32)
    for step in range(options.steps):
        order = np.random.default_rng([options.seed, step]).permutation(len(labels))
        rows = np.split(order[: options.batch_size], count)[index]
        yield images[rows], labels[rows]


def in_parts(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A share of the first axis that divides evenly to each device, or a copy."""
    even = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
    axes = [None] * even[0] + ["devices"] if even else []
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def train(
    options: argparse.Namespace, mesh: Mesh, index: int, count: int
) -> tuple[Any, Any, list[float]]:
    """Parameters, RMSprop's state and the losses, of a run on `count` processes."""
    network = Network()
    tx = optax_rmsprop.rmsprop(options.learning_rate, 0.9, 1e-3, momentum=0.9)

    def first_state(key: jax.Array) -> tuple[Any, Any]:
        params = network.init(key, np.zeros((1, 8, 8), np.float32))["params"]
        return params, tx.init(params)

    def train_step(
        params: Any, opt_state: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        def loss_of(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
            logits = network.apply({"params": params}, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        # Flax and optax leave it to the compiler where a loss's intermediates lie. On a
        # mesh with Explicit axes they would have to say it.
        loss, grads = jax.sharding.auto_axes(
            jax.value_and_grad(loss_of), out_sharding=(everywhere, shardings[0])
        )(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    key = jax.random.key(options.seed)
    shapes, _ = jax.eval_shape(first_state, key)
    shapes = jax.tree.map(lambda leaf: in_parts(leaf, mesh), shapes)
    shardings = (
        jax.tree.map(lambda leaf: leaf.sharding, shapes),
        optax_rmsprop.state_shardings(tx, shapes),
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_rows = NamedSharding(mesh, PartitionSpec("devices"))
    init = jax.jit(first_state, out_shardings=shardings)
    step = jax.jit(
        train_step, out_shardings=(*shardings, everywhere), donate_argnums=(0, 1)
    )
    params, opt_state = init(key)
    losses = []
    for rows in my_rows(options, index, count):
        # The mesh may hold the rows in another order: a mean does not care.
        images, labels = (
            jax.make_array_from_process_local_data(by_rows, part) for part in rows
        )
        params, opt_state, loss = step(params, opt_state, images, labels)
        losses.append(float(loss))
    return params, opt_state, losses


def share(tree: Any) -> float:
    """Which part of a tree's bytes one device holds."""
    leaves = jax.tree.leaves(tree)
    there = sum(leaf.addressable_data(0).nbytes for leaf in leaves)
    return there / sum(leaf.nbytes for leaf in leaves)


def everything(params: Any) -> Any:
    """The whole parameters as NumPy arrays, on every process."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    copies = jax.jit(lambda tree: tree, out_shardings=everywhere)(params)
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), copies)


def draw(losses: list[float], losses_alone: list[float], path: Path) -> None:
    # A pod's hosts get this file alone and may lack matplotlib: hence the import here,
    # and the look set here again instead of by digits.new_figure.
    from matplotlib import style
    from matplotlib.figure import Figure

    look = Path(__file__).resolve().parent.parent / "docs/figures/site.mplstyle"
    if look.exists():
        style.use(look)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    both, apart = figure.subplots(1, 2)
    both.semilogy(losses_alone, "C5", linewidth=4, alpha=0.5, label="on one device")
    both.semilogy(losses, label="over all devices")
    both.set(xlabel="step", ylabel="cross-entropy", title="Training loss")
    both.legend()
    apart.plot(np.abs(np.subtract(losses, losses_alone)), ".")
    apart.set(xlabel="step", title="Difference of the two losses")
    figure.savefig(path, dpi=150)


def compare(options: argparse.Namespace) -> float:
    """Train on all devices and on one, report, return how far they are apart."""
    if options.batch_size % jax.device_count() or options.batch_size > DIGITS:
        raise SystemExit(
            f"--batch-size: must be a multiple of the {jax.device_count()} devices, at "
            f"most {DIGITS}, got {options.batch_size}"
        )
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    index, count = jax.process_index(), jax.process_count()
    params, opt_state, losses = train(options, mesh, index, count)
    part = share((params, opt_state))
    params = everything(params)

    alone = jax.make_mesh((1,), ("devices",), devices=jax.local_devices()[:1])
    params_alone, _, losses_alone = train(options, alone, 0, 1)
    differences = jax.tree.map(
        lambda ours, theirs: float(np.abs(ours - theirs).max()),
        params,
        everything(params_alone),
    )
    apart = float(np.max(jax.tree.leaves(differences)))
    losses_apart = np.abs(np.subtract(losses, losses_alone)).max()
    if index == 0:
        print(
            f"processes: {count}, devices: {mesh.size}, with {part:.1%} of the state "
            f"on each; loss at the end {losses[-1]:.4f}, alone {losses_alone[-1]:.4f}"
        )
        print(
            f"losses within {losses_apart:.0e}, parameters within {apart:.0e} of the "
            "run on one device"
        )
        if options.output:
            draw(losses, losses_alone, options.output)
    if not np.max([apart, losses_apart]) <= PROMISED_DIFFERENCE:  # NaN fails too
        raise SystemExit(f"expected {PROMISED_DIFFERENCE:.0e}: please report it")
    return apart


def start_processes(options: argparse.Namespace, arguments: list[str]) -> None:
    """Start this file once for each process; if one fails, end the others."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    count = f"--xla_force_host_platform_device_count={options.devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, *arguments, "--coordinator"]
    command.append(f"127.0.0.1:{port}")
    # An exception could come between a start and its entry in the list.
    terminated = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: terminated.set())
    processes = [
        subprocess.Popen([*command, "--process", str(number)], env=environment)
        for number in range(options.processes)
    ]
    try:
        while any(process.poll() is None for process in processes):
            if terminated.is_set() or any(process.poll() for process in processes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()  # nothing happens to those that have ended
            process.wait()
    if any(process.returncode for process in processes):
        codes = ", ".join(str(process.returncode) for process in processes)
        raise SystemExit(f"the processes must all end with 0, they ended with {codes}")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, kind, default, text in (
        ("processes", int, 2, "to start on this machine"),
        ("devices", int, 2, "virtual CPU devices of each process"),
        ("steps", int, 60, "of training"),
        ("batch-size", int, 128, "digits in a step; a multiple of all devices"),
        ("learning-rate", float, 1e-3, "of RMSprop"),
        ("seed", int, 0, "of the first weights and the batches"),
        ("output", Path, None, "file of a figure of the losses"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument(
        "--pod",
        action="store_true",
        help="start no processes: each host of a pod or cluster runs this",
    )
    for name, kind in (("process", int), ("coordinator", str)):  # for the children
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = command_line()
    options = parser.parse_args(arguments)
    for name in ("processes", "devices", "steps", "batch_size", "seed"):
        least, value = int(name != "seed"), getattr(options, name)
        if value < least:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option}: must be at least {least}, got {value}")
    if options.output:
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output: must be in a folder that can be made: {error}")
    if options.pod:
        jax.distributed.initialize()  # the pod tells it who the others are
    elif options.coordinator:
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process
        )
    else:
        return start_processes(options, arguments)
    # Unless told otherwise, JAX multiplies in fewer bits on a GPU or TPU.
    with jax.default_matmul_precision("float32"):
        compare(options)


if __name__ == "__main__":
    main()
