"""Runs of torch, Keras and JAX are recorded, saved, loaded and identified."""

import contextlib
import functools
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_identify import gradients, names, recording

from optax_rmsprop import dialects, rmsprop
from optax_rmsprop.identify import (
    Recording,
    compare,
    identify,
    load,
    record,
    recorded,
    recording_of,
)
from optax_rmsprop.identify.__main__ import main

G = gradients(20)
P = recording(rmsprop(1e-2, 0.9, 1e-3), G)
RUN = Recording({"w": P}, {"w": G}, np.full(20, 1e-2))
CALL = "dialects.torch(0.01, alpha=0.9, eps=0.001)"


def loss(params, batch):
    return jnp.sum((params["a"] @ batch) ** 2) + jnp.sum((params["b"] - batch) ** 2)


def test_recorded_within_a_compiled_loop():
    inner = dialects.tensorflow(1e-2, 0.9, 0.9, 1e-3)
    clip = optax.clip_by_global_norm(100.0)
    tx = optax.chain(clip, recorded(inner, steps=30))
    plain = optax.chain(clip, inner)
    batches = jax.random.normal(jax.random.key(0), (40, 5))
    start = {"a": jnp.ones((600, 5)), "b": jnp.ones(5)}

    def train(tx):
        @jax.jit
        def step(carry, batch):
            params, state = carry
            grads = jax.grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (start, tx.init(start)), batches)[0]

    (params, state), (expected, _) = train(tx), train(plain)
    np.testing.assert_array_equal(params["a"], expected["a"])
    run = recording_of(state, 1e-2)
    assert {n: x.shape for n, x in run.params.items()} == {
        "['a']": (31, 512),
        "['b']": (31, 5),
    }
    assert run.learning_rate.shape == (30,)
    assert compare(inner, *run).same


@pytest.mark.usefixtures("standard_promotion")
def test_recorded_is_donated_and_keeps_wide_gradients():
    """16-bit parameters may have gradients of 32 bits, which overflow in 16."""
    trained = {"x": True, "labels": False}
    tx = recorded(optax.masked(rmsprop(1e-2), trained), steps=10)
    p = {"x": jnp.ones(3, jnp.float16), "labels": jnp.arange(3)}
    state = tx.init(p)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        grads = {"x": jnp.full(3, 1e6), "labels": np.zeros(3, jax.dtypes.float0)}
        return tx.update(grads, state, p)[1]

    for _ in range(11):
        state = step(state)
    run = recording_of(state)
    assert [*run.params] == [*run.grads] == ["['x']"]
    assert np.all(run.grads["['x']"] == np.float32(1e6))


def test_recorded_needs_params_and_enough_updates():
    tx = recorded(rmsprop(1e-2))
    p = jnp.ones(3)
    with pytest.raises(ValueError, match="`params` must be given"):
        tx.update(p, tx.init(p))
    _, state = tx.update(p, tx.init(p), p)
    with pytest.raises(ValueError, match="at least 11 updates, got 1"):
        recording_of(state)
    with pytest.raises(ValueError, match="one state of `recorded`, got 0"):
        recording_of(rmsprop(1e-2).init(p))
    with pytest.raises(ValueError, match="`steps` must be at least 10"):
        recorded(rmsprop(1e-2), steps=5)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float64])
def test_a_file_has_what_was_saved(tmp_path, dtype):
    run = Recording({"a/b": P.astype(dtype)}, {"a/b": G.astype(dtype)})
    run.save(tmp_path / "run.npz")
    again = load(tmp_path / "run.npz")
    assert again.learning_rate is None
    for kind in ("params", "grads"):
        array, expected = getattr(again, kind)["a/b"], getattr(run, kind)["a/b"]
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, expected)


def test_files_that_are_no_recording(tmp_path):
    file = tmp_path / "run.npz"
    file.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="cannot be read"):
        load(file)
    np.savez(file, weights=P)
    with pytest.raises(ValueError, match="weights"):
        load(file)
    np.savez(file, **{"params/w": P, "params/b": P, "grads/w": G})
    with pytest.raises(ValueError, match=r"got b in"):
        load(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("params/a", b"hello")
    with pytest.raises(ValueError, match="params/a is no array"):
        load(file)
    with pytest.raises(TypeError, match="arrays of floats, got int"):
        Recording({"w": P.astype(int)}, {"w": G}).save(file)
    np.save(tmp_path / "run.npy", P)
    with pytest.raises(ValueError, match="npz"):
        load(tmp_path / "run.npy")


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    RUN.save(tmp_path / "run.npz")
    figure = tmp_path / "differences.png"
    assert main([str(tmp_path / "run.npz"), "--figure", str(figure)]) == 0
    assert CALL in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_finds_none(tmp_path, capsys):
    RUN.save(tmp_path / "run.npz")
    assert main([str(tmp_path / "run.npz"), "--learning-rate", "0.02"]) == 1
    assert "the learning rate is 0.5 times" in capsys.readouterr().out.lower()


def test_the_command_refuses(tmp_path, capsys):
    RUN.save(tmp_path / "run.npz")
    Recording({"w": P[:5]}, {"w": G[:4]}).save(tmp_path / "short.npz")
    for arguments, message in [
        (["absent.npz"], "absent.npz"),
        (["short.npz"], "at least 10 steps"),
        (["run.npz", "--figure", str(tmp_path / "no" / "x.png")], "no folder"),
        (["run.npz", "--figure", str(tmp_path / "x")], "must end in .png"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path / arguments[0]), *arguments[1:]])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_after_ctrl_c_the_command_says_so(tmp_path, capsys, monkeypatch):
    RUN.save(tmp_path / "run.npz")

    def stopped(params, grads, rate, counted):
        assert list(counted(["a form"])) == ["a form"]
        raise KeyboardInterrupt

    monkeypatch.setitem(main.__globals__, "identified", stopped)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([str(tmp_path / "run.npz")]) == 130
    assert capsys.readouterr().err == "\rfit 1\r\033[Kstopped\n"


def torch_run(torch, make, dtype=None, steps=30, **recording):
    """Train a linear model on noise, and return it with what was recorded."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 30, dtype=dtype)
    optimizer = make(model.named_parameters())
    with record(optimizer, steps, **recording) as recorder:
        for _ in range(steps + 5):
            x = torch.randn(8, 40, dtype=dtype)
            optimizer.zero_grad()
            (model(x) ** 2).mean().backward()
            optimizer.step()
    return recorder.recording


TORCH = [
    {"alpha": 0.9, "momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.5, "centered": True, "eps": 1e-3, "maximize": True},
]


@pytest.mark.parametrize("options", TORCH, ids=str)
def test_torch_is_recorded_and_found(options):
    torch = pytest.importorskip("torch")
    run = torch_run(torch, lambda p: torch.optim.RMSprop(p, lr=1e-3, **options))
    assert {name: x.shape for name, x in run.params.items()} == {
        "weight": (31, 512),
        "bias": (31, 30),
    }
    found = identify(*run)
    assert "dialects.torch" in names(found), str(found)
    call = next(f.call for f in found if f.call.startswith("dialects.torch("))
    assert all(f"{name}={value}" in call for name, value in options.items()), call


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_torch_in_another_dtype(dtype):
    torch = pytest.importorskip("torch")
    options = {"lr": 1e-2, "alpha": 0.9, "eps": 1e-3}
    run = torch_run(
        torch, lambda p: torch.optim.RMSprop(p, **options), getattr(torch, dtype)
    )
    assert run.params["weight"].dtype == jnp.dtype(dtype)
    assert "dialects.torch" in names(identify(*run))


def test_what_torch_must_not_do_while_it_is_recorded():
    torch = pytest.importorskip("torch")
    layers = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    groups = [{"params": layer.parameters()} for layer in layers]
    optimizer = torch.optim.RMSprop(groups)
    with pytest.raises(ValueError, match="2 groups"), record(optimizer):
        pass
    with pytest.raises(ValueError, match="index below 2"), record(optimizer, group=2):
        pass
    optimizer = torch.optim.RMSprop(layers[0].parameters())
    with record(optimizer) as recorder:
        with pytest.raises(ValueError, match="without a closure"):
            optimizer.step(lambda: 0.0)
        with pytest.raises(ValueError, match="at least 10 steps, got 0"):
            recorder.recording  # noqa: B018
        for step in range(12):
            for p in layers[0].parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            if step == 5:
                layers[0].bias.data.zero_()
    with pytest.raises(ValueError, match="changed between the steps 5 and 6"):
        recorder.recording  # noqa: B018
    assert not optimizer._optimizer_step_pre_hooks
    optimizer = torch.optim.RMSprop(layers[1].parameters())
    with record(optimizer) as recorder:
        for step in range(13):
            for p in layers[1].parameters():
                p.grad = torch.ones_like(p)
            (group,) = optimizer.param_groups
            group["eps"] = None if step in (4, 12) else 1e-8
            with contextlib.suppress(TypeError):  # of a step that is not taken
                optimizer.step()
    params, grads, rates = recorder.recording
    assert params["param_groups[0][0]"].shape == (12, 4)
    assert grads["param_groups[0][0]"].shape == (11, 4)
    assert rates.shape == (11,)
    assert not optimizer._optimizer_step_post_hooks


def test_names_that_come_twice_are_two():
    optimizer, variables = KerasOptimizer(), (Variable(P[0]), Variable(P[0]))
    with record(optimizer, steps=12) as recorder:
        for g in G:
            optimizer.apply([g, g], variables)
    assert [*recorder.recording.params] == ["dense/kernel", "dense/kernel (2)"]


@pytest.mark.parametrize("clip", ["clipnorm", "inner_optimizer"])
def test_what_changes_gradients_within_the_optimizer_is_refused(clip):
    optimizer = KerasOptimizer()
    setattr(optimizer, clip, 1.0)
    with pytest.raises(ValueError, match=r"as they are|after clipping"):
        record(optimizer).__enter__()


class Variable:
    """What `record` uses of a variable of Keras."""

    def __init__(self, value):
        self.value, self.path = value, "dense/kernel"


class KerasOptimizer:
    """What `record` uses of an optimizer of Keras, with its numbers."""

    learning_rate = 1e-2

    def __init__(self):
        self.square = 0.0

    def build(self, variables):
        self._trainable_variables = variables

    def apply(self, grads, trainable_variables=None):
        for variable, g in zip(trainable_variables, grads, strict=True):
            self.square = 0.9 * self.square + 0.1 * g * g
            variable.value = np.float32(
                variable.value - 1e-2 * g / np.sqrt(self.square + 1e-4)
            )


def test_keras_is_recorded_and_found():
    optimizer, variable = KerasOptimizer(), Variable(P[0])
    with record(optimizer, steps=15) as recorder:
        for g in G:
            optimizer.apply([g], [variable])
    assert optimizer.apply.__func__ is KerasOptimizer.apply
    run = recorder.recording
    assert run.grads["dense/kernel"].shape == (15, 48)
    found = identify(*run)
    assert "dialects.keras(0.01, epsilon=0.0001)" in [f.call for f in found]


def test_a_compiled_step_of_keras_is_refused():
    optimizer = KerasOptimizer()
    with record(optimizer), pytest.raises(ValueError, match="run_eagerly=True"):
        jax.jit(lambda g: optimizer.apply([g], [Variable(g)]))(G[0])


def test_other_optimizers_are_refused():
    with pytest.raises(TypeError, match="torch or Keras"), record(rmsprop(1e-2)):
        pass
