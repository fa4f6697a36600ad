"""Train on scikit-learn's digits over the devices of several hosts, sharded (FSDP).

    pip install -e ".[examples]"
    python examples/multi_host.py

starts two processes on this machine, with two virtual CPU devices each. Parameters and
RMSprop's state are spread over all four, and each process reads its own rows of every
batch. Then each process repeats the run alone on one device. It ends with

    processes: 2, devices: 4, with 25.0% of the state on each; loss at the end 0.0939
    losses within 1e-06, parameters within 1e-06 of the run on one device

On a TPU pod or a cluster under Slurm or Open MPI, every host runs it with `--pod`.
"""

import argparse
import socket
from typing import Any

import _common
import jax
import numpy as np
import optax
from flax import linen
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_rmsprop import rmsprop
from optax_rmsprop.wrappers import state_shardings

BATCH, DEVICES = 128, 2  # digits in a step, virtual devices of a process
TX = rmsprop(1e-3, 0.9, 1e-3, momentum=0.9)


class Network(linen.Module):
    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = linen.silu(linen.Dense(256)(x))
        return linen.Dense(10)(x)


def first_state(key: jax.Array) -> tuple[Any, optax.OptState]:
    params = Network().init(key, np.zeros((1, 8, 8), np.float32))["params"]
    return params, TX.init(params)


def loss_of(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = Network().apply({"params": params}, images)
    return _common.loss_and_accuracy(logits, labels)[0]


def in_parts(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """An equal share of the rows on each device, or a copy where they do not divide."""
    rows = PartitionSpec("devices" if leaf.shape[0] % mesh.size == 0 else None)
    sharding = NamedSharding(mesh, rows)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def train(steps: int, mesh: Mesh, index: int, count: int) -> tuple[Any, Any, Any]:
    """Parameters, state and losses of a run, of which this is process `index`."""
    params, _ = jax.eval_shape(first_state, jax.random.key(0))
    params = jax.tree.map(lambda leaf: in_parts(leaf, mesh), params)
    of_params = jax.tree.map(lambda leaf: leaf.sharding, params)
    shardings = of_params, state_shardings(TX, params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_rows = NamedSharding(mesh, PartitionSpec("devices"))

    def train_step(params: Any, state: Any, *batch: jax.Array) -> tuple[Any, ...]:
        # Flax and optax leave the shardings of a loss's intermediates to the compiler.
        # On a mesh with Explicit axes they would have to declare them.
        gradient, outputs = jax.value_and_grad(loss_of), (everywhere, of_params)
        gradient = jax.sharding.auto_axes(gradient, out_sharding=outputs)
        loss, grads = gradient(params, *batch)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = jax.jit(train_step, out_shardings=(*shardings, everywhere))
    params, state = jax.jit(first_state, out_shardings=shardings)(jax.random.key(0))
    losses, whole = [], jax.make_array_from_process_local_data
    images, _, labels, _ = _common.split_digits()
    name = f"devices: {mesh.size}, step" if jax.process_index() == 0 else ""
    for number in _common.shown(range(steps), name):
        # The batch depends on the step only, so that every process knows it.
        order = np.random.default_rng(number).permutation(len(labels))[:BATCH]
        rows = np.split(order, count)[index]
        batch = [whole(by_rows, data[rows]) for data in (images, labels)]
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    return params, state, losses


def compare(options: argparse.Namespace) -> None:
    """Train on all devices and on one of them; report how far the runs are apart."""
    jax.config.update("jax_default_matmul_precision", "float32")  # on a TPU too
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    index, count = jax.process_index(), jax.process_count()
    params, state, losses = train(options.steps, mesh, index, count)
    here = jax.tree.map(lambda leaf: leaf.addressable_data(0), (params, state))
    part = optax.tree.size(here) / optax.tree.size((params, state))
    one = jax.make_mesh((1,), ("devices",), devices=jax.local_devices()[:1])
    alone, _, losses_alone = train(options.steps, one, 0, 1)
    everything = multihost_utils.process_allgather(params, tiled=True)
    apart = _common.largest_difference(everything, jax.device_get(alone))
    differences = np.abs(np.subtract(losses, losses_alone))
    if index == 0:
        text = f"processes: {count}, devices: {mesh.size}, with {part:.1%} of the state"
        print(f"{text} on each; loss at the end {losses[-1]:.4f}")
        within = map(_common.bound, (differences.max(), apart))
        text = "losses within {}, parameters within {}".format(*within)
        print(f"{text} of the run on one device")
        if options.output:
            axes = _common.new_figure(3.6).subplots()
            axes.semilogy(losses_alone, lw=5, alpha=0.5, label="loss on one device")
            axes.semilogy(losses, label="loss over all devices")
            axes.semilogy(differences, ".", label="difference")
            axes.legend(title="by step")
            _common.save_figure(axes.figure, options.output)


def worker(index: int, address: str, options: argparse.Namespace) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(address, options.processes, index)
    compare(options)


def main(argv: list[str] | None = None) -> None:
    options = _common.parse_options(
        __doc__,
        argv,
        processes=(2, "to start on this machine"),
        steps=(60, "of training"),
        pod=(False, "start no processes: each host of a pod or cluster runs this"),
    )
    if options.pod:
        jax.distributed.initialize()  # the pod tells it who the others are
        compare(options)
        return
    if BATCH // DEVICES % options.processes:
        raise SystemExit(f"--processes must divide {BATCH // DEVICES}")
    with socket.create_server(("127.0.0.1", 0)) as server:  # finds a free port
        address = f"127.0.0.1:{server.getsockname()[1]}"
    _common.run_processes(worker, options.processes, address, options)


if __name__ == "__main__":
    main()
