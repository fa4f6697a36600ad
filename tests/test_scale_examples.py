"""The examples of scale: several hosts, and runs that are killed and go on."""

import argparse
import errno
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
ocp = pytest.importorskip("orbax.checkpoint")

EXAMPLES = Path(__file__).parent.parent / "examples"
KILLS = 10
SAVE_EVERY = 5
STEPS = 60 * SAVE_EVERY
LONG = [f"--steps={STEPS}", f"--save-every={SAVE_EVERY}", "--width=32"]
SHORT = ["--steps=6", "--save-every=3", "--width=16", "--batch-size=32"]


def start(script, *options, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *script, *options],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=EXAMPLES,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script, *options, devices=1):
    process = start(script, *options, devices=devices)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.splitlines()


@pytest.fixture(scope="module")
def examples(import_example):
    """The modules, in a process that computes as a user's does."""
    names = ("multi_host", "preemptible")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield argparse.Namespace(**{name: import_example(name) for name in names})


# Several hosts.


def test_two_processes_equal_one():
    two = run(["multi_host.py"], "--steps=10")
    one = run(["multi_host.py"], "--steps=10", "--processes=1", "--devices=1")
    pattern = r"processes: 2, devices: 4, with 25\.0% of the state .* end ([\d.]+), .*"
    loss = float(re.fullmatch(pattern, two[-2])[1])
    # A process that never heard of another ends at the same loss, of four decimals.
    alone = float(re.search(r"loss at the end ([\d.]+)", one[-2])[1])
    assert abs(loss - alone) <= 1.1e-4 < 0.01 * loss
    losses, parameters = map(float, re.findall(r"within ([\de.-]+)", two[-1]))
    assert losses <= 5e-6  # observed: 2e-7
    assert parameters <= 5e-6  # observed: 6e-8; 1e-3 is the length of a step


def test_a_process_that_fails_ends_the_others(examples, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys, time\nif sys.argv[-1] == '1': sys.exit(3)\ntime.sleep(60)"
    )
    monkeypatch.setattr(examples.multi_host, "__file__", str(worker))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # that of pytest stays
    expected = "the processes must all end with 0, they ended with -9, 3"
    with pytest.raises(SystemExit, match=expected):
        examples.multi_host.main([])


AS_PARENT = """
import sys, multi_host
multi_host.__file__ = sys.argv[1]
multi_host.main([])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_processes_end_with_their_parent(tmp_path, number):
    worker = tmp_path / "worker.py"
    worker.write_text("import os, time\nos.write(1, b'*')\ntime.sleep(60)")
    parent = start(["-c", AS_PARENT], str(worker))
    assert parent.stdout.read(2) == "**"  # both have started
    parent.send_signal(number)
    _, err = parent.communicate(timeout=30)  # until the children have ended too
    assert parent.returncode == 1
    assert err == "the processes must all end with 0, they ended with -9, -9\n"


def test_on_a_pod_jax_finds_the_hosts_itself(examples, tmp_path, monkeypatch, capsys):
    calls, figure = [], tmp_path / "new" / "figure.png"
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    examples.multi_host.main(["--pod", "--steps=2", f"--output={figure}"])
    assert calls == [()]
    assert "processes: 1, devices: 1," in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("size", [6, 1800])
def test_a_batch_must_fit(examples, monkeypatch, size):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    options = examples.multi_host.command_line().parse_args([f"--batch-size={size}"])
    expected = f"--batch-size: must be a multiple of the 4 .* at most 1797, got {size}"
    with pytest.raises(SystemExit, match=expected):
        examples.multi_host.compare(options)


APART = {  # parameters and losses of the run on one device, which should be 0 and 1
    "a parameter": ([0.0, 1e-3], 1.0),
    "a loss": ([0.0, 0.0], 1.001),
    "a parameter is NaN": ([0.0, np.nan], 1.0),
    "a loss is NaN": ([0.0, 0.0], np.nan),
}


@pytest.mark.parametrize("what", APART)
def test_a_difference_is_an_error(examples, monkeypatch, what):
    params, loss = APART[what]
    results = iter([([0.0, 0.0], None, [1.0]), (params, None, [loss])])
    monkeypatch.setattr(examples.multi_host, "train", lambda *_: next(results))
    monkeypatch.setattr(examples.multi_host, "everything", lambda params: params)
    monkeypatch.setattr(examples.multi_host, "share", lambda _: 1.0)
    options = examples.multi_host.command_line().parse_args([])
    with pytest.raises(SystemExit, match="expected 1e-04: please report it"):
        examples.multi_host.compare(options)


def test_each_seed_and_step_has_its_batch(examples):
    def labels(seed, index=0, count=1):
        options = argparse.Namespace(seed=seed, steps=2, batch_size=64)
        parts = examples.multi_host.my_rows(options, index, count)
        return [labels.tolist() for _, labels in parts]

    first, second = labels(0)
    assert first != second
    assert labels(0) == [first, second]
    assert labels(1)[0] not in (first, second)
    assert labels(0, 1, 2) == [first[32:], second[32:]]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--steps=0", "--steps: must be at least 1, got 0"),
        ("--seed=-1", "--seed: must be at least 0, got -1"),
        (f"--output={__file__}/x.png", "--output: must be in a folder that can be"),
    ],
)
def test_bad_options_start_no_process(examples, monkeypatch, option, expected, capsys):
    monkeypatch.setattr(examples.multi_host, "start_processes", None)
    with pytest.raises(SystemExit, match="2"):
        examples.multi_host.main([option])
    assert expected in capsys.readouterr().err


# Runs that are killed.


def options_of(preemptible, folder, *arguments):
    parser = preemptible.command_line()
    return parser.parse_args([*arguments, f"--checkpoints={folder}"])


def state_of(preemptible, folder, *arguments):
    """The step and every array of the latest good checkpoint."""
    options = options_of(preemptible, folder, *arguments)
    step, state = preemptible.Checkpoints(preemptible.Run(options), options).restore()
    return step, jax.device_get(state)


def assert_same_bits(ours, theirs):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b, strict=True), ours, theirs
    )


STOPPED = "stopped by Ctrl-C: give the same command to go on\n"


def run_until_killed(folder, rng):
    """One attempt: killed while it starts, or a moment after some checkpoint.

    After an odd number of lines by Ctrl-C, for which it finishes a checkpoint.
    """
    lines = rng.choice([0, 1, 2, 3, 4, 5])
    half_written = set(folder.glob("*tmp*"))  # Orbax removes it in the background
    process = start(["preemptible.py"], *LONG, f"--checkpoints={folder}")
    if lines == 0:
        time.sleep(rng.uniform(0, 3))
    printed = [process.stdout.readline() for _ in range(lines)]
    time.sleep(rng.uniform(0, 0.03))
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT if lines % 2 else signal.SIGKILL)
    _, err = process.communicate()
    if lines % 2:
        assert (process.returncode, err) == (130, STOPPED)
        assert set(folder.glob("*tmp*")) <= half_written
    return printed


@pytest.mark.slow
def test_killed_at_ten_random_points_it_ends_with_the_same_bits(examples, tmp_path):
    killed, untouched = tmp_path / "killed", tmp_path / "untouched"
    rng = random.Random(0)
    printed = [run_until_killed(killed, rng) for _ in range(KILLS)]
    firsts = [int(lines[0].split()[-1]) for lines in printed if lines]
    assert firsts == sorted(firsts)
    assert len(set(firsts)) >= 4  # it did go on, from one place after the other
    ends = [
        run(["preemptible.py"], *LONG, f"--checkpoints={folder}")
        for folder in (killed, untouched)
    ]
    assert ends[0][0] != "starting at step 0" == ends[1][0]
    assert re.fullmatch(rf"step {STEPS}: held-out .* parameters \w{{16}}", ends[0][-1])
    assert ends[0][-1] == ends[1][-1]
    with_options = [
        state_of(examples.preemptible, folder, *LONG) for folder in (killed, untouched)
    ]
    assert_same_bits(*with_options)
    assert not (killed / "damaged").exists()


WHILE_IT_IMPORTS = """
import os, runpy, signal, sys

class Press:
    def find_spec(self, name, *_):
        if name == "jax":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press())
runpy.run_path("preemptible.py", run_name="__main__")
"""


def test_ctrl_c_ends_it_while_it_imports():
    process = start(["-c", WHILE_IT_IMPORTS])
    assert process.communicate() == ("", STOPPED)
    assert process.returncode == 130


def test_ctrl_c_waits_for_the_checkpoint(examples, tmp_path, monkeypatch, capsys):
    save = examples.preemptible.Checkpoints.save

    def press_and_save(*arguments):
        signal.raise_signal(signal.SIGINT)
        save(*arguments)

    monkeypatch.setattr(examples.preemptible.Checkpoints, "save", press_and_save)
    options = [*SHORT, "--save-every=2", f"--checkpoints={tmp_path}"]
    with pytest.raises(KeyboardInterrupt):
        examples.preemptible.main(options)
    assert numbers(tmp_path) == ["2"]
    assert not list(tmp_path.glob("*tmp*"))
    assert "step 4" not in capsys.readouterr().out


def press_twice(examples, seen):
    with examples.preemptible.late_interrupt() as pressed:
        signal.raise_signal(signal.SIGINT)
        seen += pressed
        signal.raise_signal(signal.SIGINT)
        seen.append("not reached")


def test_a_second_ctrl_c_does_not_wait(examples):
    before, seen = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):
        press_twice(examples, seen)
    assert seen == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


WITH_A_FULL_DISK = """
import resource, sys, preemptible
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
preemptible.main(sys.argv[1:])
"""


def test_what_fails_in_the_background_is_an_error_of_one_line(tmp_path):
    """A limit on the size of files, since a full disk takes a disk of one's own."""
    script = ["-c", WITH_A_FULL_DISK]
    process = start(script, *LONG, "--steps=10", f"--checkpoints={tmp_path}")
    out, err = process.communicate()
    assert process.returncode == 1
    # tensorstore may print a traceback of its own, when another write ends too late.
    expected = (
        f"-c: error: --checkpoints: cannot write in {tmp_path}: File too large. Mend "
        "that, and give the same command to go on"
    )
    assert expected in err.splitlines()
    assert "usage" not in err
    assert "held-out" not in out


def test_a_full_disk_is_an_error_of_one_line(examples, tmp_path, monkeypatch, capsys):
    def save(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "6/metadata")

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(SystemExit, match="1"):
        examples.preemptible.main([*SHORT, f"--checkpoints={tmp_path}"])
    error = capsys.readouterr().err
    assert re.fullmatch(r".*--checkpoints: .*No space left on device.*\n", error)


@pytest.mark.parametrize("lost", ["params", "opt_state", "key"])
def test_a_run_that_loses_a_part_ends_elsewhere(
    examples, good, copy, lost, monkeypatch
):
    """The control: the bits are the same because the whole state is restored."""
    shutil.rmtree(copy / "6")
    restore = examples.preemptible.Checkpoints.restore

    def restore_a_part(checkpoints):
        step, state = restore(checkpoints)
        return step, state | {lost: checkpoints.run.init(0)[lost]}

    monkeypatch.setattr(examples.preemptible.Checkpoints, "restore", restore_a_part)
    digest = examples.preemptible.main([*SHORT, f"--checkpoints={copy}"])
    assert digest != examples.preemptible.hash_of(good.latest["params"])


ON_SOME_DEVICES = """
import sys, jax, preemptible
for steps in sys.argv[2:]:
    arguments = [f"--steps={steps}", "--width=16", f"--checkpoints={sys.argv[1]}"]
    options = preemptible.command_line().parse_args(arguments)
    state = preemptible.train(options)
    kernel = state["opt_state"][1].trace["Dense_0"]["kernel"]
    shard = kernel.addressable_shards[0].data.shape
    print(steps, jax.device_count(), preemptible.hash_of(state), *shard)
"""


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh"),
    reason="Orbax enters jax.sharding.set_mesh, which is no context in jax 0.6",
)
def test_a_checkpoint_goes_on_on_another_number_of_devices(tmp_path):
    found = {}
    for devices, steps in (8, ["4"]), (2, ["4", "8"]), (1, ["8"]):
        script = ["-c", ON_SOME_DEVICES]
        lines = run(script, str(tmp_path), *steps, devices=devices)
        for line in (line for line in lines if line[0].isdigit()):
            step, count, digest, rows, columns = line.split()
            assert (int(count), int(rows) * devices, int(columns)) == (devices, 64, 16)
            found.setdefault(int(step), []).append(digest)
        moved = {8: 0, 2: 8, 1: 2}[devices]
        text = f"was saved on {moved} devices, restored onto {devices}"
        assert any(text in line for line in lines) == bool(moved)
    (at_4, again_at_4), (at_8, again_at_8) = found[4], found[8]
    assert at_4 == again_at_4 != at_8 == again_at_8


def test_each_seed_and_epoch_has_its_order(examples):
    def epoch(first, seed):
        index = [examples.preemptible.batch_at(first + i, 449, seed) for i in range(3)]
        return np.concatenate(index).tolist()

    orders = [epoch(0, 0), epoch(3, 0), epoch(0, 1)]
    assert all(sorted(order) == list(range(1347)) for order in orders)
    assert orders[0] == epoch(0, 0)
    assert orders[0] != orders[1] != orders[2] != orders[0]


# Checkpoints that are no good.


@pytest.fixture(scope="module")
def good(examples, tmp_path_factory):
    """A folder with the checkpoints of steps 3 and 6, and the states in them."""
    folder = tmp_path_factory.mktemp("good")
    examples.preemptible.main([*SHORT[1:], "--steps=3", f"--checkpoints={folder}"])
    earlier = state_of(examples.preemptible, folder, *SHORT)
    examples.preemptible.main([*SHORT, f"--checkpoints={folder}"])
    latest = state_of(examples.preemptible, folder, *SHORT)
    assert (earlier[0], latest[0]) == (3, 6)
    return argparse.Namespace(folder=folder, earlier=earlier[1], latest=latest[1])


@pytest.fixture
def copy(good, tmp_path):
    return Path(shutil.copytree(good.folder, tmp_path / "copy"))


@pytest.fixture
def damage_is_read():
    """Where reading fails, Orbax leaves coroutines whose end is an error too."""
    yield
    gc.collect()


def damages(test):
    ignored = "ignore::pytest.PytestUnraisableExceptionWarning"
    return pytest.mark.usefixtures("damage_is_read")(
        pytest.mark.filterwarnings(ignored)(test)
    )


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def numbers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.isdigit())


def half_written(folder):
    """What is left of a run that was killed while it saved."""
    place = folder / "9.orbax-checkpoint-tmp-123"
    shutil.copytree(folder / "3", place)
    return place


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


DAMAGE = {"cut": cut, "emptied": lambda path: os.truncate(path, 0), "lost": os.remove}


@damages
@pytest.mark.parametrize("how", DAMAGE)
def test_whatever_file_is_damaged_the_state_is_right(
    examples, good, tmp_path, how, capsys
):
    names = sorted(p.relative_to(good.folder) for p in contents(good.folder / "6"))
    steps = {}
    for name in names:
        folder = Path(shutil.copytree(good.folder, tmp_path / "copy"))
        DAMAGE[how](folder / name)
        steps[name], state = state_of(examples.preemptible, folder, *SHORT)
        assert_same_bits(state, {3: good.earlier, 6: good.latest}[steps[name]])
        assert (folder / "damaged" / "6").exists() == (steps[name] == 3)
        warned = f"step 6 is damaged (.*): moved to {folder}/damaged/6, going on from"
        assert bool(re.search(warned, capsys.readouterr().out)) == (steps[name] == 3)
        shutil.rmtree(folder)
    assert 3 in steps.values()  # not all files are needed


@damages
def test_a_flipped_bit_is_found(examples, good, tmp_path):
    steps = set()
    for name in contents(good.folder / "6" / "state"):
        folder = Path(shutil.copytree(good.folder, tmp_path / "copy"))
        flip(folder / name.relative_to(good.folder))
        step, state = state_of(examples.preemptible, folder, *SHORT)
        assert_same_bits(state, {3: good.earlier, 6: good.latest}[step])
        steps.add(step)
        shutil.rmtree(folder)
    assert 3 in steps


def rename_a_leaf(metadata):
    tree = metadata["tree_metadata"]
    name, leaf = tree.popitem()
    leaf["key_metadata"][-1]["key"] = "surprise"
    tree[name.replace("kernel", "surprise")] = leaf


CHANGES = {  # of one JSON file of the latest checkpoint
    "an unknown key": ("run/metadata", lambda record: record.update(surprise=1)),
    "an unknown option": (
        "run/metadata",
        lambda record: record["options"].update(surprise=1),
    ),
    "an option less": ("run/metadata", lambda record: record["options"].pop("eps")),
    "another option": ("run/metadata", lambda record: record["options"].update(eps=1)),
    "an unknown leaf": ("state/_METADATA", rename_a_leaf),
    "no leaves": ("state/_METADATA", lambda metadata: metadata.pop("tree_metadata")),
}


@damages
@pytest.mark.parametrize("what", CHANGES)
def test_changed_metadata_are_damage(examples, good, copy, what):
    name, change = CHANGES[what]
    metadata = json.loads((copy / "6" / name).read_text())
    change(metadata)
    (copy / "6" / name).write_text(json.dumps(metadata))
    assert_same_bits(state_of(examples.preemptible, copy, *SHORT), (3, good.earlier))
    assert (copy / "damaged" / "6" / name).exists()


@damages
def test_metadata_that_nothing_needs_do_no_harm(examples, good, copy):
    for step in "36":
        path = copy / step / "_CHECKPOINT_METADATA"
        path.write_text('{"metrics": "surprise", "surprise": []}')
    assert_same_bits(state_of(examples.preemptible, copy, *SHORT), (6, good.latest))


@damages
@pytest.mark.skipif(
    not os.path.exists("/proc/self/mem"), reason="needs a file that nobody can read"
)
def test_what_the_system_cannot_read_is_not_called_damaged(
    examples, good, tmp_path, capsys
):
    errors = []
    for name in sorted(p.relative_to(good.folder) for p in contents(good.folder / "6")):
        folder = Path(shutil.copytree(good.folder, tmp_path / "copy"))
        (folder / name).unlink()
        (folder / name).symlink_to("/proc/self/mem")  # an I/O error, for root too
        try:
            step, state = state_of(examples.preemptible, folder, *SHORT)
        except examples.preemptible.DiskError as error:
            errors.append(str(error))
        else:  # not all files are needed
            assert_same_bits((step, state), (6, good.latest))
        assert numbers(folder) == ["3", "6"]
        assert not (folder / "damaged").exists()
        if name.name == "_METADATA":
            with pytest.raises(SystemExit, match="1"):
                examples.preemptible.main([*SHORT, f"--checkpoints={folder}"])
            expected = r"--checkpoints: cannot read step 6 of .*Input/output error.*\n"
            assert re.fullmatch(rf".*: error: {expected}", capsys.readouterr().err)
        shutil.rmtree(folder)
    assert len(errors) >= 5


@damages
def test_after_a_damaged_checkpoint_it_ends_with_the_same_bits(examples, good, copy):
    for path in contents(copy / "6"):
        cut(path)
    options = [*SHORT, f"--checkpoints={copy}"]
    expected = examples.preemptible.hash_of(good.latest["params"])
    mine = copy / "damaged" / "6" / "mine"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert examples.preemptible.main(options) == expected
    assert numbers(copy) == ["3", "6"]
    assert sorted(path.name for path in (copy / "damaged").iterdir()) == ["6", "6_"]
    assert mine.exists()
    assert_same_bits(state_of(examples.preemptible, copy, *SHORT), (6, good.latest))


def refused(examples, capsys, folder, *options):
    """The error of a run, after which the folder must be as it was."""
    before = contents(folder)
    with pytest.raises(SystemExit, match="2"):
        examples.preemptible.main([*SHORT, *options, f"--checkpoints={folder}"])
    assert contents(folder) == before | {folder / "lock": b""}
    return capsys.readouterr().err


FOREIGN = {
    "--momentum=0": r"opt_state/1/trace/Dense_0/kernel is float32\[64, 16\] there, "
    r"missing here\n(.|\n)*--momentum is 0\.9 there, 0\.0 here\n",
    "--centered": r"opt_state/0/mu/Dense_0/kernel is missing there, float32\[64, 16\] "
    r"here\n(.|\n)*--centered is False there, True here\n",
    "--width=24": r"params/Dense_0/kernel is float32\[64, 16\] there, "
    r"float32\[64, 24\] here\n(.|\n)*--width is 16 there, 24 here\n",
    "--learning-rate=1e-3": r"--learning-rate is 0\.0003 there, 0\.001 here\n",
    "--decay=0.5": r"--decay is 0\.9 there, 0\.5 here\n",
    "--eps=1e-2": r"--eps is 0\.001 there, 0\.01 here\n",
    "--batch-size=16": r"--batch-size is 32 there, 16 here\n",
    "--seed=1": r"is of another:\n  --seed is 0 there, 1 here\nGive the options of",
    "--steps=5": r"--steps: must be at least 6, the step of the latest .*, got 5",
}


@pytest.mark.parametrize("option", FOREIGN)
def test_a_checkpoint_of_another_run_is_refused(examples, copy, option, capsys):
    half_written(copy)
    error = refused(examples, capsys, copy, option)
    assert re.search(FOREIGN[option], error)
    assert str(copy) in error


@damages
def test_without_a_good_checkpoint_it_is_an_error(examples, copy, capsys):
    for path in contents(copy):
        cut(path)
    error = refused(examples, capsys, copy)
    assert re.search(r"at least one .* must be readable, found step 6: .*step 3", error)
    assert "Restore the folder from a copy, or name a new one" in error


def test_another_programs_checkpoint_is_refused(examples, tmp_path, capsys):
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave({"weights": jax.numpy.ones(3)}))
    error = refused(examples, capsys, tmp_path)
    assert re.search(r"found step 1: \w+: .*Item \"run\" was not found", error)


def test_other_files_in_the_folder_do_no_harm(examples, good, copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "empty folder").mkdir()
    (copy / "12").mkdir()
    step, state = state_of(examples.preemptible, copy, *SHORT)
    assert step == 6
    assert_same_bits(state, good.latest)
    assert (copy / "notes.txt").read_text() == "mine"


def test_a_file_with_the_number_of_a_step_is_refused(examples, copy, capsys):
    shutil.rmtree(copy / "6")
    (copy / "6").write_text("precious")
    error = refused(examples, capsys, copy)
    assert f"must be the name of a checkpoint, got the file {copy}/6. Move it" in error


@damages
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--steps=2", r"--steps: must be at least 3, the step of the latest .*, got 2"),
        ("--steps=6", r"--checkpoints: must be a folder to write in: .*/damaged'"),
    ],
)
def test_first_it_checks_and_then_moves_the_damaged(
    examples, copy, option, expected, capsys
):
    cut(copy / "6" / "_CHECKPOINT_METADATA")
    cut(copy / "6" / "run" / "metadata")
    (copy / "damaged").touch()
    assert re.search(expected, refused(examples, capsys, copy, option))


def test_a_renamed_checkpoint_is_damaged(examples, good, copy, capsys):
    (copy / "6").rename(copy / "9")
    step, state = state_of(examples.preemptible, copy, *SHORT)
    assert step == 3
    assert_same_bits(state, good.earlier)
    assert "step 9 is damaged (ValueError: it is of step 6)" in capsys.readouterr().out


def test_the_checksum_knows_which_array_is_which(examples):
    ones, zeros = jax.numpy.ones(2), jax.numpy.zeros(2)
    checksum = examples.preemptible.checksum
    assert checksum([ones, zeros]) == checksum([ones, zeros])
    assert checksum([ones, zeros]) != checksum([zeros, ones])


def test_only_one_process_trains_in_a_folder(examples, copy, monkeypatch, capsys):
    errors = []

    def batches(*_):
        errors.append(refused(examples, capsys, copy, "--seed=1"))
        return iter(())

    monkeypatch.setattr(examples.preemptible, "batches", batches)
    examples.preemptible.main([*SHORT, f"--checkpoints={copy}"])
    (error,) = errors
    assert f"--checkpoints: another process trains in {copy}. Wait until" in error


def test_the_last_step_is_saved_and_few_are_kept(examples, copy):
    left = half_written(copy)
    options = [*SHORT, "--steps=8", "--keep=2", f"--checkpoints={copy}"]
    examples.preemptible.main(options)
    assert numbers(copy) == ["6", "8"]
    assert not left.exists()


BAD_OPTIONS = {
    "--steps=0": "--steps: must be at least 1, got 0",
    "--batch-size=1400": "--batch-size: must be a multiple of the 1 devices, at most "
    "1347, got 1400",
    "--decay=1.5": "`decay` must be a number in [0, 1), got 1.5",
    "--seed=-1": "--seed: must be at least 0, got -1",
    f"--checkpoints={__file__}": "--checkpoints: must be a folder to write in: ",
    f"--checkpoints={__file__}/x": "--checkpoints: must be a folder to write in: ",
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_options_are_refused(examples, tmp_path, option, capsys):
    folder = tmp_path / "new"
    with pytest.raises(SystemExit, match="2"):
        examples.preemptible.main([f"--checkpoints={folder}", option])
    assert not folder.exists()
    assert BAD_OPTIONS[option] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["not-utf-8-\udcff", "pattern[1]", "back\\slash"])
def test_names_that_orbax_loses_are_refused(examples, tmp_path, name, capsys):
    with pytest.raises(SystemExit, match="2"):
        examples.preemptible.main([*SHORT, f"--checkpoints={tmp_path / name}"])
    assert not list(tmp_path.iterdir())
    expected = "--checkpoints: must be a path in UTF-8 without [ and \\, got "
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["multi_host", "preemptible"])
def test_every_option_is_explained(examples, name):
    parser = getattr(examples, name).command_line()
    assert all(action.help for action in parser._actions)
