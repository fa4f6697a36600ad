"""The examples of recipes: EfficientNet's schedule, parameter groups, first steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def efficientnet(import_example):
    return import_example("efficientnet_schedule")


def test_the_schedule_is_efficientnets(efficientnet):
    epoch, peak = efficientnet.EPOCH, 0.256 * 32 / 4096
    # utils.build_learning_rate of the published code, by hand
    in_epochs = {0: 0, 2.5: peak / 2, 5: 0.97**2 * peak, 24.1: 0.97**10 * peak}
    for epochs, rate in in_epochs.items():
        found = efficientnet.schedule(jnp.asarray(epochs * epoch))
        assert found == pytest.approx(rate, rel=1e-5), epochs


@pytest.fixture(scope="module")
def groups(import_example):
    return import_example("groups")


def params_of(groups):
    rng, shapes = np.random.default_rng(0), {"kernel": (3, 2), "bias": (2,)}
    return {
        name: {
            leaf: jnp.asarray(rng.normal(size=s), "f4") for leaf, s in shapes.items()
        }
        for name in groups.GROUPS
    }


def test_only_kernels_of_trained_groups_decay(groups):
    params, tx = params_of(groups), groups.in_groups()
    # Where gradients are 0, only weight decay makes an update.
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    moved = jax.tree.map(lambda u: bool(np.any(u)), updates)
    trained, frozen = {"kernel": True, "bias": False}, {"kernel": False, "bias": False}
    assert moved == {"stem": frozen, "backbone": trained, "head": trained}


def test_rates_are_those_of_the_groups_and_fall(groups):
    params, tx = params_of(groups), groups.in_groups()
    gradients = jax.tree.map(jnp.ones_like, params)

    def steps_of_biases(state):
        updates, _ = tx.update(gradients, state, params)
        return [float(np.abs(updates[name]["bias"]).max()) for name in groups.GROUPS]

    state = tx.init(params)
    stem, backbone, head = steps_of_biases(state)
    assert stem == 0
    assert backbone == pytest.approx(head / 10, rel=1e-5)
    groups.lower_rates(state)
    lower = [0, backbone / 10, head / 10]
    np.testing.assert_allclose(steps_of_biases(state), lower, rtol=1e-5)


def test_first_steps_equals_the_torch_lines_in_its_comments(
    import_example, tmp_path, capsys
):
    torch = pytest.importorskip("torch")
    keys = jax.random.split(jax.random.key(0))
    features = np.array(jax.random.normal(keys[0], (100, 10)))
    noise = np.array(jax.random.normal(keys[1], (100,)))
    targets = features @ np.arange(-5.0, 5.0, dtype=np.float32) / 5 + 0.1 * noise
    features, targets = torch.tensor(features), torch.tensor(targets)
    model = torch.nn.Linear(10, 1)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, alpha=0.99, eps=1e-8)
    for _ in range(100):
        loss = torch.nn.functional.mse_loss(model(features).squeeze(1), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    figure = tmp_path / "new folder" / "figure.png"
    last = import_example("first_steps").main([f"--output={figure}"])
    # observed: 3e-7; a loss near 0.01 after 100 float32 steps
    assert abs(last - loss.item()) < 3e-6
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"epoch 100: loss {loss.item():.4f}"
    assert figure.read_bytes().startswith(b"\x89PNG")
