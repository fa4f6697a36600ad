"""The example that takes a run from torch to Flax and back: the runs stay together."""

import re
from pathlib import Path

import jax
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = ["--epochs=1", "--batch-size=128"]


@pytest.fixture(scope="module")
def example(import_example):
    return import_example("resume_from_torch")


def run(example, folder):
    # As for a user.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        example.main([*SHORT, f"--output={folder / 'new' / 'figure.png'}"])


def test_the_runs_stay_together(example, tmp_path, capsys):
    run(example, tmp_path)
    accuracies, apart = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"held-out accuracy .*% of the run that moved, .*", accuracies)
    found = re.match(r"parameters within ([\d.e-]+), losses within ([\d.e-]+)", apart)
    parameters, losses = map(float, found.groups())
    assert parameters <= 2e-6  # observed: 6e-7
    assert losses <= 5e-6  # observed: 5e-7
    assert (tmp_path / "new" / "figure.png").stat().st_size > 10_000
    saved = torch.load(tmp_path / "new" / "figure.pt", weights_only=True)
    assert saved["optimizer"]["param_groups"][0]["param_names"]


def test_a_run_that_loses_its_state_is_an_error(example, tmp_path, monkeypatch):
    write = example.to_torch

    def without_momentum(params, state, model, optimizer, port):
        write(params, state, model, optimizer, port)
        for slots in optimizer.state.values():
            slots["momentum_buffer"].zero_()

    monkeypatch.setattr(example, "to_torch", without_momentum)
    with pytest.raises(SystemExit, match="expected parameters within 2e-04"):
        run(example, tmp_path)


def test_it_explains_every_option(example):
    explained = {a.dest: a.help for a in example.command_line()._actions}
    names = {"help", "epochs", "batch_size", "learning_rate", "seed", "output"}
    assert explained.keys() == names
    assert all(explained.values())
