"""The examples that compare with torch: the runs agree, and every part matters."""

import re

import jax
import numpy as np
import pytest

from optax_rmsprop import dialects

torch = pytest.importorskip("torch")

# Observed after one epoch: 1.8e-7, and in the example 1e-6.
TOGETHER = 2e-6
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def port_from_torch(import_example):
    return import_example("port_from_torch")


@pytest.fixture(scope="module")
def resume_from_torch(import_example):
    return import_example("resume_from_torch")


def last_number(capsys, pattern):
    (found,) = re.findall(pattern, capsys.readouterr().out.splitlines()[-1])
    return float(found)


@pytest.mark.slow
def test_digits_compares_with_torch(import_example, capsys):
    import_example("digits").main(["--epochs=1", "--compare-torch"])
    ours, torchs, _ = capsys.readouterr().out.splitlines()
    loss, difference = map(float, re.findall(r"[\d.]+(?:e-\d+)?$|[\d.]{8}", torchs))
    assert float(ours.split()[-1]) == pytest.approx(loss, rel=1e-4)
    assert 0 < difference < TOGETHER


@pytest.mark.slow
def test_the_port_keeps_the_runs_together(port_from_torch, capsys):
    port_from_torch.main(["--epochs=1"])
    assert 0 < last_number(capsys, r"within (\S+)") < TOGETHER


@pytest.mark.slow
@pytest.mark.parametrize("change", ["another dialect", "no mask"])
def test_another_optimizer_ends_elsewhere(port_from_torch, change, monkeypatch, capsys):
    torchs = dialects.torch

    def without_mask(*args, weight_decay_mask, **kwargs):
        return torchs(*args, **kwargs)

    other = {"another dialect": dialects.timm, "no mask": without_mask}[change]
    monkeypatch.setattr(dialects, "torch", other)
    port_from_torch.main(["--epochs=1"])
    assert last_number(capsys, r"within (\S+)") > 5 * TOGETHER


def test_the_port_carries_running_statistics(port_from_torch):
    network = port_from_torch.torch_network().eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        expected = network(torch.from_numpy(IMAGES)).numpy()
    weights = {name: w.numpy() for name, w in network.state_dict().items()}
    apply = jax.jit(port_from_torch.Network(training=False).apply)
    logits = apply(port_from_torch.port(weights), IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_resumed_run_stays_together(resume_from_torch, capsys):
    resume_from_torch.main(["--epochs=1"])
    assert 0 < last_number(capsys, r"parameters within (\S+),") < 5e-6  # observed: 8e-7


@pytest.mark.slow
@pytest.mark.parametrize("slot", ["momentum_buffer", "square_avg"])
def test_a_resumed_run_that_loses_a_slot_ends_elsewhere(
    resume_from_torch, slot, monkeypatch, capsys
):
    write = resume_from_torch.to_torch

    def without_slot(params, state, model, optimizer, port):
        write(params, state, model, optimizer, port)
        for slots in optimizer.state.values():
            slots[slot].zero_()

    monkeypatch.setattr(resume_from_torch, "to_torch", without_slot)
    resume_from_torch.main(["--epochs=1"])
    assert last_number(capsys, r"parameters within (\S+),") > 1e-4
