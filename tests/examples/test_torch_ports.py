"""The examples that compare with torch; `test_examples.py` runs them as programs."""

import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def port_from_torch(import_example):
    return import_example("port_from_torch")


@pytest.mark.slow
def test_digits_compares_with_torch(import_example, capsys):
    import_example("digits").main(["--epochs=1", "--compare-torch"])
    ours, torchs, _ = capsys.readouterr().out.splitlines()
    loss, difference = map(float, re.findall(r"[\d.]+(?:e-\d+)?$|[\d.]{8}", torchs))
    assert float(ours.split()[-1]) == pytest.approx(loss, rel=1e-4)
    assert 0 < difference < 2e-6  # observed: 1.8e-7


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
