"""Train on scikit-learn's digits in a run that may be killed at any time.

    pip install -e ".[examples]"
    python examples/preemptible.py

Kill it (SIGKILL too) and give the same command again: it goes on from the latest
checkpoint, and the last lines are those of a run that nobody killed, like

    hash of the parameters' bits: 4985ecdf998d2054
    step 600: held-out accuracy 96.9%

The bits are the same because a checkpoint has all that the next step reads, and because
order and dropout of the digits depend on nothing but the step. GPUs also need
XLA_FLAGS="--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0".
Orbax writes a checkpoint in the background, and gives it its name when it is complete.
What a killed run has left half written is deleted at the next start. After Ctrl-C, or
SIGTERM, which clusters send before they take a machine, the run completes its step,
saves a checkpoint and ends with status 130. A second one ends it at once.
"""

import argparse
import hashlib
import signal
import threading
from pathlib import Path
from typing import Any

import _common
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen

from optax_rmsprop import rmsprop

BATCH, FOLDER = 64, Path(__file__).with_name("output") / "preemptible"
TX = rmsprop(3e-4, decay=0.9, eps=1e-3, momentum=0.9)


class Network(linen.Module):
    training: bool

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = linen.silu(linen.Dense(128)(x))
            x = linen.Dropout(0.1, deterministic=not self.training)(x)
        return linen.Dense(10)(x)


@jax.jit
def first_state() -> dict:
    images = np.zeros((1, 8, 8), np.float32)
    params = Network(training=False).init(jax.random.key(0), images)["params"]
    return {"params": params, "opt_state": TX.init(params)}


def batch_at(step: int) -> np.ndarray:
    """Indices of the digits of a batch, which depend on nothing but the step."""
    epoch, position = divmod(step, _common.TRAINED_ON // BATCH)
    order = np.random.default_rng(epoch).permutation(_common.TRAINED_ON)
    return order[position * BATCH : (position + 1) * BATCH]


@jax.jit
def train_step(
    state: dict, step: int, images: jax.Array, labels: jax.Array
) -> tuple[dict, jax.Array]:
    key = jax.random.fold_in(jax.random.key(1), step)

    def loss_of(params: Any) -> jax.Array:
        network, rngs = Network(training=True), {"dropout": key}
        logits = network.apply({"params": params}, images, rngs=rngs)
        return _common.loss_and_accuracy(logits, labels)[0]

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    updates, opt_state = TX.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state}, loss


def train(options: argparse.Namespace, stop: threading.Event) -> tuple[int, dict]:
    """Start or go on, until all steps are done or `stop` is set."""
    images, _, labels, _ = _common.split_digits()
    state = first_state()
    save_every, folder = options.save_every, options.checkpoints.absolute()
    settings = ocp.CheckpointManagerOptions(
        save_interval_steps=save_every, max_to_keep=3, cleanup_tmp_directories=True
    )
    with ocp.CheckpointManager(folder, options=settings) as manager:
        done = manager.latest_step() or 0
        print(f"starting at step {done}", flush=True)
        if done:
            state = manager.restore(done, args=ocp.args.StandardRestore(state))
        for step in range(done, options.steps):
            index = batch_at(step)
            state, loss = train_step(state, step, images[index], labels[index])
            done = step + 1
            last = done == options.steps or stop.is_set()
            # Orbax saves the first step, every `save_every`-th and, forced, the last.
            if manager.save(done, args=ocp.args.StandardSave(state), force=last):
                print(f"step {done}: loss {loss:.4f}", flush=True)
            if last:
                break
    return done, state


def stop_on_signals() -> threading.Event:
    """Set by Ctrl-C or SIGTERM, so that they interrupt no step and no checkpoint."""
    stop = threading.Event()

    def ask(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop


def hash_of(params: Any) -> str:
    leaves = jax.tree.leaves(jax.device_get(params))
    return hashlib.sha256(b"".join(p.tobytes() for p in leaves)).hexdigest()[:16]


def main(argv: list[str] | None = None) -> None:
    options = _common.parse_options(
        __doc__,
        argv,
        figure=False,
        checkpoints=(FOLDER, "folder of the checkpoints of one run"),
        save_every=(50, "steps from one checkpoint to the next"),
        steps=(600, "in all"),
    )
    with _common.locked(options.checkpoints):
        done, state = train(options, stop_on_signals())
    if done < options.steps:
        raise KeyboardInterrupt(f"after step {done}: give the same command to go on")
    _, images, _, labels = _common.split_digits()
    logits = Network(training=False).apply({"params": state["params"]}, images)
    _, accuracy = _common.loss_and_accuracy(logits, labels)
    print(f"hash of the parameters' bits: {hash_of(state['params'])}")
    print(f"step {done}: held-out accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
