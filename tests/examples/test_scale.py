"""The examples of scale: several hosts, and runs that are killed and go on."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

pytest.importorskip("orbax.checkpoint")

EXAMPLES = Path(__file__).parents[2] / "examples"


def start(*command):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, cwd=EXAMPLES, text=True, **pipes
    )


def run(*command):
    process = start(*command)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.splitlines()


# Several hosts.


@pytest.mark.slow
def test_two_processes_equal_one_device():
    first, second = run("multi_host.py", "--steps=10")[-2:]
    assert first.startswith("processes: 2, devices: 4, with 25.0% of the state on each")
    losses, parameters = map(float, re.findall(r"within ([\de.-]+)", second))
    assert losses <= 5e-6  # observed: 5e-7
    assert 0 < parameters <= 5e-6  # observed: 7e-8; 1e-3 is the length of a step


@pytest.mark.slow
def test_on_a_pod_jax_finds_the_hosts_itself(import_example, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    import_example("multi_host").main(["--pod", "--steps=2"])
    assert calls == [()]
    assert "processes: 1, devices: " in capsys.readouterr().out


# Runs that are killed.


@pytest.fixture(scope="module")
def preemptible(import_example):
    return import_example("preemptible")


@pytest.fixture
def train(preemptible, monkeypatch, tmp_path, capsys):
    """Run to some step, in a folder, and return the last lines."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # that of pytest stays

    def train(folder, steps, save_every=2):
        folder = f"--checkpoints={tmp_path / folder}"
        preemptible.main([folder, f"--save-every={save_every}", f"--steps={steps}"])
        return capsys.readouterr().out.splitlines()[-2:]

    return train


@pytest.mark.slow
def test_a_run_that_loses_the_optimizers_state_ends_elsewhere(
    preemptible, train, monkeypatch
):
    """Runs that are killed end with the same bits because all of it is restored."""
    restore = preemptible.ocp.CheckpointManager.restore

    def restore_params(*args, **kwargs):
        state = restore(*args, **kwargs)
        # Like restored arrays, so that the step is not compiled again.
        afresh = jax.tree.map(lambda x: jax.device_put(0 * x, x.sharding), state)
        return {"params": state["params"], "opt_state": afresh["opt_state"]}

    monkeypatch.setattr(preemptible.ocp.CheckpointManager, "restore", restore_params)
    train("parts", 3)
    assert train("parts", 5) != train("whole", 5)


@pytest.mark.slow
def test_a_run_that_is_stopped_has_a_checkpoint_of_its_last_step(
    preemptible, train, tmp_path, monkeypatch
):
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(preemptible, "stop_on_signals", lambda: stop)
    with pytest.raises(KeyboardInterrupt, match="after step 1: give the same command"):
        train("stopped", 5)
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"1", "lock"}
    stop.clear()
    assert train("stopped", 5) == train("whole", 5)


STEPS, SAVE_EVERY = 60, 5


@pytest.mark.slow
def test_killed_at_random_points_it_ends_with_the_same_bits(tmp_path, train):
    rng, firsts = random.Random(0), []
    command = ["preemptible.py", f"--steps={STEPS}", f"--save-every={SAVE_EVERY}"]
    command += [f"--checkpoints={tmp_path / 'killed'}"]
    for number in signal.SIGKILL, signal.SIGINT:
        process = start(*command)
        # The first line says where it starts, each further one that a checkpoint has
        # begun. The one before it is complete then, and itself is still being written.
        lines = [process.stdout.readline() for _ in range(rng.randrange(3, 6))]
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(number)
        _, err = process.communicate()
        firsts.append(int(lines[0].split()[-1]))
        assert process.returncode == -number
        if number == signal.SIGINT:
            assert re.fullmatch(
                r"preemptible.py: stopped after step \d+: give the same command to go "
                r"on\n",
                err,
            )
    assert 0 == firsts[0] < firsts[1]  # it did go on
    start_line, *_, bits, last_line = run(*command)
    assert int(start_line.split()[-1]) > firsts[1]  # the second one went on, too
    assert re.fullmatch(r"hash of .*: \w{16}", bits)
    assert re.fullmatch(rf"step {STEPS}: held-out accuracy .*%", last_line)
    assert [bits, last_line] == train("untouched", STEPS, SAVE_EVERY)
    assert not list((tmp_path / "killed").glob("*tmp*"))


def test_a_second_process_in_the_folder_is_refused(preemptible, tmp_path):
    second = pytest.raises(SystemExit, match="another process is at work in ")
    with preemptible._common.locked(tmp_path), second:
        preemptible.main([f"--checkpoints={tmp_path}"])


def test_each_epoch_has_its_order(preemptible):
    per_epoch = preemptible._common.TRAINED_ON // preemptible.BATCH
    epochs = [
        [i for step in range(per_epoch) for i in preemptible.batch_at(first + step)]
        for first in (0, per_epoch)
    ]
    assert all(len(set(epoch)) == per_epoch * preemptible.BATCH for epoch in epochs)
    assert epochs[0] != epochs[1]
