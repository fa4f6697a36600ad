"""Train on scikit-learn's digits in a run that may be killed at any time.

    pip install -e ".[examples]"
    python examples/preemptible.py

Kill it (SIGKILL too) and give the same command again: it goes on from the latest
checkpoint, and the last line is the same as that of a run that nobody killed

    step 600: held-out accuracy 97.1%, parameters b533df3cd94aaf93

where the number at the end is a hash of every bit of the parameters. That holds for one
kind and number of devices; on GPUs, where XLA chooses kernels by timing them, only with

    XLA_FLAGS="--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"

(we have tried it on CPUs). A checkpoint may also be restored onto another number of
devices: the state is then the same bits, and later steps differ by rounding.

A checkpoint is the parameters, the optimizer's state and the random key (sharded over
the devices), and in a small JSON file the step, from which the order of the data
follows, the options of the run and a checksum of the state. Orbax writes it in the
background and renames it when it is whole. A checkpoint whose files are read and are
wrong is moved to CHECKPOINTS/damaged, with a warning, and the run goes on from the one
before. A checkpoint of another run is an error, and nothing is touched; so are a second
process on the same folder, and a file that the system cannot read.

Ctrl-C ends the run after the step and the checkpoint that are under way, with status
130. A second Ctrl-C ends it at once.
"""

import os
import signal

if __name__ == "__main__":
    # Here already, since an interrupted import ends in a long traceback, and without an
    # exception, since a library could catch it.
    def leave(*_) -> None:
        os.write(2, b"stopped by Ctrl-C: give the same command to go on\n")
        os._exit(130)

    signal.signal(signal.SIGINT, leave)

import argparse
import fcntl
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import optax_rmsprop

HELD_OUT = 450
TRAINED_ON = 1797 - HELD_OUT
# May be another when a run goes on. All else decides what the parameters will be.
FREE_OPTIONS = {"checkpoints", "save_every", "keep", "steps"}
State = dict[str, Any]


class Network(linen.Module):
    width: int

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = linen.silu(linen.Dense(self.width)(x))
            x = linen.Dropout(0.1, deterministic=not self.has_rng("dropout"))(x)
        return linen.Dense(10)(x)


def split_digits() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    scans = load_digits()
    images = (scans.images / 16).astype(np.float32)
    labels = scans.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    there, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return (images[there], labels[there]), (images[held_out], labels[held_out])


def batch_at(step: int, size: int, seed: int) -> np.ndarray:
    """Which digits: a function of seed and step only, so that no state is lost."""
    epoch, place = divmod(step, TRAINED_ON // size)
    order = np.random.default_rng([seed, epoch]).permutation(TRAINED_ON)
    return order[place * size : (place + 1) * size]


class Run:
    """The network, its optimizer, and where each array of the state lives."""

    def __init__(self, options: argparse.Namespace):
        self.network = Network(options.width)
        self.tx = optax_rmsprop.rmsprop(
            options.learning_rate,
            options.decay,
            options.eps,
            momentum=options.momentum,
            centered=options.centered,
        )
        self.mesh = jax.make_mesh((jax.device_count(),), ("devices",))
        shapes = jax.eval_shape(partial(self.first_state, options.seed))
        params = jax.tree.map(self.in_parts, shapes["params"])
        self.shardings = {
            "params": jax.tree.map(lambda leaf: leaf.sharding, params),
            "opt_state": optax_rmsprop.state_shardings(self.tx, params),
            "key": NamedSharding(self.mesh, PartitionSpec()),
        }
        self.abstract_state = jax.tree.map(with_sharding, shapes, self.shardings)
        self.init = jax.jit(
            self.first_state, static_argnums=0, out_shardings=self.shardings
        )
        self.step = jax.jit(
            self.train_step, out_shardings=(self.shardings, None), donate_argnums=0
        )
        self.checksum = jax.jit(checksum)

    def in_parts(self, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """A share of the first axis that divides evenly to each device, or a copy."""
        even = [i for i, size in enumerate(leaf.shape) if size % self.mesh.size == 0]
        axes = [None] * even[0] + ["devices"] if even else []
        return with_sharding(leaf, NamedSharding(self.mesh, PartitionSpec(*axes)))

    def first_state(self, seed: int) -> State:
        for_weights, for_dropout = jax.random.split(jax.random.key(seed))
        params = self.network.init(for_weights, jnp.zeros((1, 8, 8)))["params"]
        return {
            "params": params,
            "opt_state": self.tx.init(params),
            "key": jax.random.key_data(for_dropout),
        }

    def train_step(
        self, state: State, images: jax.Array, labels: jax.Array
    ) -> tuple[State, jax.Array]:
        key, dropout = jax.random.split(jax.random.wrap_key_data(state["key"]))

        def loss_of(
            params: Any, images: jax.Array, labels: jax.Array, dropout: jax.Array
        ) -> jax.Array:
            logits = self.network.apply(
                {"params": params}, images, rngs={"dropout": dropout}
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        # Flax and optax leave it to the compiler where a loss's intermediates lie. On a
        # mesh with Explicit axes they would have to say it.
        loss, grads = jax.sharding.auto_axes(
            jax.value_and_grad(loss_of),
            out_sharding=(self.shardings["key"], self.shardings["params"]),
        )(state["params"], images, labels, dropout)
        updates, opt_state = self.tx.update(grads, state["opt_state"], state["params"])
        return {
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
            "key": jax.random.key_data(key),
        }, loss


def with_sharding(
    leaf: jax.ShapeDtypeStruct, sharding: NamedSharding
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def checksum(state: State) -> jax.Array:
    """A wrapping sum of all bits; of the values only, wherever they live."""

    def of_leaf(leaf: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32).sum(dtype=jnp.uint32)

    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(state):
        total = total * jnp.uint32(31) + of_leaf(leaf)
    return total


class ForeignError(ValueError):
    """A good checkpoint, but not of this run."""


class DamagedError(ValueError):
    """A checkpoint whose files can be read, but are wrong."""


class DiskError(OSError):
    """The system cannot read or write, which says nothing about the checkpoints."""


@contextmanager
def late_interrupt() -> Iterator[list[int]]:
    """Keep Ctrl-C back until the end, so that it comes between no two lines of Orbax.

    The list has an item once it was pressed. A second Ctrl-C is not kept back.
    """
    pressed: list[int] = []

    def keep_back(number: int, _: Any) -> None:
        pressed.append(number)
        signal.signal(number, before)

    before = signal.signal(signal.SIGINT, keep_back)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out; the system frees the lock of a killed process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"--checkpoints: another process trains in {folder}. Wait until it "
                "has ended, or name another folder"
            ) from error
        yield


class Checkpoints:
    """The folder of a run's checkpoints."""

    def __init__(self, run: Run, options: argparse.Namespace):
        self.run, self.folder = run, options.checkpoints.absolute()
        self.steps, self.keep = options.steps, options.keep
        self.options = {
            name: value
            for name, value in sorted(vars(options).items())
            if name not in FREE_OPTIONS
        }

    def manager(self, **options: Any) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "run": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self.keep,
                lightweight_initialize=True,  # else one damaged checkpoint is an error
                **options,
            ),
        )

    def save(self, manager: ocp.CheckpointManager, step: int, state: State) -> None:
        record = {
            "step": step,
            "options": self.options,
            "leaves": leaf_names(state),
            "checksum": int(self.run.checksum(state)),
            "devices": self.run.mesh.size,
        }
        record["digest"] = digest(record)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(record)
        )
        with self.writing():
            manager.save(step, args=args)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Orbax raises what fails in the background at the next save or at the end."""
        try:
            yield
        except Exception as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's
            raise DiskError(
                f"--checkpoints: cannot write in {self.folder}: "
                f"{os.strerror(int(code[1])) if code else first_line(error)}. Mend "
                "that, and give the same command to go on"
            ) from error

    def restore(self) -> tuple[int, State] | None:
        """The step and state of the latest good checkpoint, None if there is none."""
        for path in self.folder.iterdir():
            if path.name.isdecimal() and not path.is_dir():
                raise ValueError(
                    f"--checkpoints: a step's number must be the name of a checkpoint, "
                    f"got the file {path}. Move it, or name another folder"
                )
        damaged: list[tuple[int, DamagedError]] = []
        with self.manager() as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                try:
                    state = self.restore_step(manager, step)
                except DamagedError as error:
                    damaged.append((step, error))
                    continue
                if step > self.steps:
                    raise ValueError(
                        f"--steps: must be at least {step}, the step of the latest "
                        f"checkpoint in {self.folder}, got {self.steps}"
                    )
                self.move_away(damaged, step)
                return step, state
        if damaged:
            found = "; ".join(f"step {step}: {error}" for step, error in damaged)
            raise DamagedError(
                f"--checkpoints: at least one checkpoint in {self.folder} must be "
                f"readable, found {found}. Restore the folder from a copy, or name a "
                "new one to start from the beginning"
            )
        return None

    def restore_step(self, manager: ocp.CheckpointManager, step: int) -> State:
        with self.reading(step):
            args = ocp.args.Composite(run=ocp.args.JsonRestore())
            record = manager.restore(step, args=args)["run"]
            if record.pop("digest") != digest(record):
                raise ValueError("its `run/metadata` was changed")
            if record["step"] != step:
                raise ValueError(f"it is of step {record['step']}")
        wrong = self.other_leaves(record["leaves"])
        wrong += self.other_options(record["options"])
        if wrong:
            raise ForeignError(
                f"--checkpoints: must hold this run, but step {step} of {self.folder} "
                "is of another:\n  " + "\n  ".join(wrong) + "\nGive the options of "
                "that run, or another folder. Nothing was changed"
            )
        with self.reading(step):
            args = ocp.args.StandardRestore(self.run.abstract_state)
            args = ocp.args.Composite(state=args)
            state = manager.restore(step, args=args)["state"]
            found, expected = int(self.run.checksum(state)), record["checksum"]
            if found != expected:
                raise ValueError(f"the checksum must be {expected}, got {found}")
        devices = record["devices"]
        if devices != self.run.mesh.size:
            print(
                f"step {step} was saved on {devices} devices, restored onto "
                f"{self.run.mesh.size}"
            )
        return state

    @contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """An error is damage if the system can read all: Orbax may hide its errors."""
        try:
            yield
        except Exception as error:
            try:
                read_all(self.folder / str(step))
            except OSError as cause:
                raise DiskError(
                    f"--checkpoints: cannot read step {step} of {self.folder}: "
                    f"{cause}. Mend that, or move {step} elsewhere to go on from the "
                    "one before. Nothing was changed"
                ) from error
            raise DamagedError(first_line(error)) from error

    def other_leaves(self, saved: dict[str, str]) -> list[str]:
        here = leaf_names(self.run.abstract_state)
        return [
            f"{name} is {saved.get(name, 'missing')} there, "
            f"{here.get(name, 'missing')} here"
            for name in dict.fromkeys([*here, *saved])
            if here.get(name) != saved.get(name)
        ]

    def other_options(self, saved: dict[str, Any]) -> list[str]:
        return [
            f"--{name.replace('_', '-')} is {saved.get(name)} there, {value} here"
            for name, value in self.options.items()
            if saved.get(name) != value
        ]

    def move_away(self, damaged: list[tuple[int, DamagedError]], good: int) -> None:
        for step, error in damaged:
            place = self.folder / "damaged" / str(step)
            while place.exists():
                place = place.with_name(place.name + "_")
            place.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(place)
            print(
                f"warning: the checkpoint of step {step} is damaged ({error}): moved "
                f"to {place}, going on from step {good}",
                flush=True,
            )


def read_all(folder: Path) -> None:
    """Raise the system's error if there is a file or a folder that it cannot read."""

    def refuse(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            Path(place, name).read_bytes()


def first_line(error: Exception) -> str:
    """What went wrong, without tensorstore's fifty lines of settings."""
    line = (str(error).splitlines() or [""])[0].partition(". See full")[0]
    return f"{type(error).__name__}: {line[:200]}"


def digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def leaf_names(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def batches(
    run: Run, options: argparse.Namespace, first: int
) -> Iterator[tuple[int, jax.Array, jax.Array]]:
    (images, labels), _ = split_digits()
    sharding = NamedSharding(run.mesh, PartitionSpec("devices"))
    for step in range(first, options.steps):
        index = batch_at(step, options.batch_size, options.seed)
        yield step, *jax.device_put((images[index], labels[index]), sharding)


def hash_of(params: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(params)):
        digest.update(leaf.tobytes())
    return digest.hexdigest()[:16]


def train(options: argparse.Namespace) -> State:
    run = Run(options)
    with late_interrupt() as pressed, locked(options.checkpoints):
        checkpoints = Checkpoints(run, options)
        restored = checkpoints.restore()
        if restored is None:
            first, state = 0, run.init(options.seed)
            print("starting at step 0", flush=True)
        else:
            first, state = restored
            print(f"going on from step {first}", flush=True)
        # The run is accepted: what a killed one has left half written may go.
        with checkpoints.manager(cleanup_tmp_directories=True) as manager:
            for step, images, labels in batches(run, options, first):
                if pressed:
                    break
                state, loss = run.step(state, images, labels)
                done = step + 1
                if done % options.save_every == 0 or done == options.steps:
                    checkpoints.save(manager, done, state)
                    print(f"step {done}: loss {float(loss):.4f}", flush=True)
            with checkpoints.writing():
                manager.wait_until_finished()
    return state


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    folder = Path(__file__).with_name("output") / "preemptible"
    for name, kind, default, text in (
        ("checkpoints", Path, folder, "folder of the checkpoints of one run"),
        ("save-every", int, 50, "steps from one checkpoint to the next"),
        ("keep", int, 3, "how many checkpoints to keep"),
        ("steps", int, 600, "in all"),
        ("batch-size", int, 64, "digits in a step; a multiple of the devices"),
        ("width", int, 128, "of the hidden layers"),
        ("learning-rate", float, 3e-4, "of RMSprop"),
        ("decay", float, 0.9, "weight of the old average"),
        ("eps", float, 1e-3, "added to the root"),
        ("momentum", float, 0.9, "weight of the old step"),
        ("seed", int, 0, "of the weights, the dropout and the order of the data"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument(
        "--centered", action="store_true", help="divide by the standard deviation"
    )
    return parser


def main(argv: list[str] | None = None) -> str:
    """Train or go on, report, and return the hash of the parameters."""
    parser = command_line()
    options = parser.parse_args(argv)
    for name in ("save_every", "keep", "steps", "batch_size", "width", "seed"):
        least, value = int(name != "seed"), getattr(options, name)
        if value < least:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option}: must be at least {least}, got {value}")
    if options.batch_size > TRAINED_ON or options.batch_size % jax.device_count():
        parser.error(
            f"--batch-size: must be a multiple of the {jax.device_count()} devices, at "
            f"most {TRAINED_ON}, got {options.batch_size}"
        )
    # Orbax takes [ for a pattern, and tensorstore \\ for / and only UTF-8.
    if re.search(r"[\[\\\ud800-\udfff]", folder := str(options.checkpoints.absolute())):
        parser.error(
            f"--checkpoints: must be a path in UTF-8 without [ and \\, got {folder!r}"
        )
    for name in ("absl", "asyncio"):  # what they report is raised too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        state = train(options)
    except DiskError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except OSError as error:
        parser.error(f"--checkpoints: must be a folder to write in: {error}")
    except ValueError as error:
        parser.error(str(error))

    _, (images, labels) = split_digits()
    params = jax.device_get(state["params"])
    logits = Network(options.width).apply({"params": params}, images)
    accuracy = float((logits.argmax(-1) == labels).mean())
    print(
        f"step {options.steps}: held-out accuracy {accuracy:.1%}, parameters "
        f"{hash_of(params)}"
    )
    return hash_of(params)


if __name__ == "__main__":
    main()
