"""Saved runs, timm's runs, and what is wrong with a run."""

import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
import torch

from helpers import update_in_torch
from optax_rmsprop import from_torch, from_torch_checkpoint, scale_by_rms, to_torch
from optax_rmsprop.optimizer import ScaledTraceState

RECORDED = Path(__file__).parent.parent / "peers" / "recorded"


def port(weights):
    return {"kernel": weights["weight"].T, "bias": weights["bias"]}


def trained(named=True, **options):
    """A model after three steps, and its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    parameters = model.named_parameters() if named else model.parameters()
    optimizer = torch.optim.RMSprop(parameters, **options)
    update_in_torch(model, optimizer, torch.randn_like, 3)
    return model, optimizer


def saved_and_loaded(model, optimizer):
    file = io.BytesIO()
    state_dicts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state_dicts, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(run, other):
    """Whether two runs are, and go on, the same."""
    leaves = jax.tree.leaves((run.params, run.opt_state))
    others = jax.tree.leaves((other.params, other.opt_state))
    for a, b in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(a, b)
    grads = jax.tree.map(jnp.ones_like, run.params)
    for a, b in zip(
        *(
            jax.tree.leaves(r.tx.update(grads, r.opt_state, r.params)[0])
            for r in (run, other)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


OPTIONS = {"lr": 0.03, "momentum": 0.9, "centered": True, "maximize": True}
NAMES = ["weight", "bias"]


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_is_the_live_run(named):
    model, optimizer = trained(named, **OPTIONS)
    loaded = saved_and_loaded(model, optimizer)
    run = from_torch_checkpoint(
        loaded["model"], loaded["optimizer"], port, None if named else NAMES
    )
    same(run, from_torch(model, optimizer, port))


def test_a_checkpoint_takes_a_schedule():
    loaded = saved_and_loaded(*trained())
    rates = jnp.array([9.0, 9.0, 9.0, 0.0])
    run = from_torch_checkpoint(
        loaded["model"], loaded["optimizer"], port, learning_rate=rates.__getitem__
    )
    grads = jax.tree.map(jnp.ones_like, run.params)
    updates, _ = run.tx.update(grads, run.opt_state, run.params)
    assert not updates["kernel"].any()


def test_a_checkpoint_of_an_old_torch():
    """Its steps are ints, and maximize is not yet an option."""
    model, optimizer = trained(named=False, **OPTIONS | {"maximize": False})
    loaded = saved_and_loaded(model, optimizer)
    for state in loaded["optimizer"]["state"].values():
        state["step"] = int(state["step"])
    (group,) = loaded["optimizer"]["param_groups"]
    for option in ("maximize", "foreach", "capturable", "differentiable"):
        del group[option]
    run = from_torch_checkpoint(
        loaded["model"], loaded["optimizer"], port, NAMES, dialect="torch"
    )
    same(run, from_torch(model, optimizer, port))


def test_int_steps_in_a_live_optimizer():
    model, optimizer = trained()
    for state in optimizer.state.values():
        state["step"] = int(state["step"])
    assert from_torch(model, optimizer, port).opt_state[0].count == 3


def test_a_checkpoint_with_tied_and_frozen_parameters():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    optimizer = torch.optim.RMSprop(p for p in model.parameters() if p.requires_grad)
    update_in_torch(model, optimizer, torch.ones_like)
    loaded = saved_and_loaded(model, optimizer)

    def port(weights):  # uses the name that is not in `names`
        return {name: w for name, w in weights.items() if name != "0.weight"}

    names = ["0.weight", "0.bias", "1.bias"]
    run = from_torch_checkpoint(loaded["model"], loaded["optimizer"], port, names)
    updates, _ = run.tx.update(
        jax.tree.map(jnp.ones_like, run.params), run.opt_state, run.params
    )
    moved = {name for name, update in updates.items() if update.any()}
    assert moved == {"1.weight", "0.bias", "1.bias"}
    live = from_torch(model, optimizer, port)
    np.testing.assert_array_equal(run.params["1.weight"], live.params["1.weight"])


def bad_checkpoints():
    def spoil(change=None, names=NAMES, named=False):
        loaded = saved_and_loaded(*trained(named, **OPTIONS))
        model, optimizer = loaded["model"], loaded["optimizer"]
        if change:
            change(model, optimizer)
        return model, optimizer, port, names

    def of_adam(model, optimizer):
        optimizer["param_groups"][0] = {"lr": 1e-3, "betas": (0.9, 0.999)} | {
            "params": [0, 1]
        }

    def other_shape(model, optimizer):
        optimizer["state"][1]["square_avg"] = torch.ones(3)

    def lost_slot(model, optimizer):
        del optimizer["state"][0]["momentum_buffer"]

    def no_tensor(model, optimizer):
        model["bias"] = [0.0, 0.0]

    def sparse(model, optimizer):
        optimizer["state"][0]["square_avg"] = torch.ones(2, 3).to_sparse()

    def renamed(model, optimizer):
        model["Bias"] = model.pop("bias")

    yield spoil(names=None), ValueError, "one for each of the optimizer's 2 .* got 0;"
    yield spoil(names=["weight"]), ValueError, "optimizer's 2 parameters.* got 1; of"
    yield spoil(names=["weight", "b"]), ValueError, "in the model's state, got b; of"
    yield spoil(names=["bias", "bias"]), ValueError, "must differ, got bias 2 times"
    yield (
        spoil(names=["bias", "weight"]),
        ValueError,
        r"square_avg of `weight` must have its parameter's shape \(2, 3\), got \(2,\)",
    )
    yield spoil(of_adam), TypeError, "must be an RMSprop, .* options .*betas"
    yield spoil(other_shape), ValueError, r"square_avg of `bias` .* \(2,\), got \(3,\)"
    yield spoil(lost_slot), ValueError, "state of `weight` must have momentum_buffer"
    yield spoil(no_tensor), TypeError, "`bias` must be a tensor, got a list"
    yield spoil(sparse), TypeError, "`square_avg of weight` must be a dense tensor"
    yield (
        spoil(renamed, names=["weight", "Bias"]),
        KeyError,
        "the port asks for 'bias', which the model does not have; it has Bias",
    )

    def string_keys(model, optimizer):
        optimizer["state"] = {str(k): v for k, v in optimizer["state"].items()}

    def no_step(model, optimizer):
        del optimizer["state"][0]["step"]

    live = trained(named=False)
    yield (
        spoil(string_keys),
        ValueError,
        "a state for its own parameters only, got .* 0",
    )
    yield spoil(no_step), ValueError, "state of `weight` must have its step"
    yield spoil(names={"weight", "bias"}), TypeError, "must be a list, got a set"
    yield (
        spoil(names=["bias", "weight"], named=True),
        ValueError,
        "must be the checkpoint's own, weight, bias, got bias, weight",
    )
    yield (live[0], {}, port, NAMES), TypeError, "must be a state_dict, got a Lin"
    yield ({}, live[1], port, NAMES), TypeError, "`optimizer` must be a state_dict"
    model, _, *rest = spoil()
    yield (model, {"state": {}}, *rest), ValueError, "must be the state_dict .* state"


@pytest.mark.parametrize("case", range(len(list(bad_checkpoints()))))
def test_a_bad_checkpoint(case):
    arguments, error, text = list(bad_checkpoints())[case]
    with pytest.raises(error, match=text):
        from_torch_checkpoint(*arguments)


def test_an_error_within_a_port_stays_its_own():
    def port(weights):
        return {}["mine" if "weight" in weights else "other"]

    with pytest.raises(KeyError, match="asks for 'mine'"):
        from_torch(*trained(), port)
    with pytest.raises(KeyError, match=r"^'weight'$"):
        from_torch(*trained(), lambda weights: {}["weight"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("slot", ["square_avg", "grad_avg", "momentum_buffer"])
def test_nan_in_a_slot_is_carried_and_reported(slot, value):
    model, optimizer = trained(momentum=0.9, centered=True)
    optimizer.state[model.bias][slot][1] = float(value)
    text = f"carried as it is, with NaN or infinity: {slot} of `bias`; those"
    with pytest.warns(RuntimeWarning, match=re.escape(text)) as caught:
        run = from_torch(model, optimizer, port)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    leaves = jax.tree.leaves(run.opt_state)
    broken = [np.argwhere(~np.isfinite(leaf)) for leaf in leaves]
    assert sum(len(b) for b in broken) >= 1
    assert all((b == [1]).all() for b in broken if len(b))
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        to_torch(run.params, run.opt_state, model, optimizer, port)
    assert not torch.isfinite(optimizer.state[model.bias]["square_avg"][1]) or (
        slot == "momentum_buffer"
    )
    assert torch.isfinite(optimizer.state[model.weight][slot]).all()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", ["quantized", "sparse"])
def test_what_is_not_dense(kind):
    model, optimizer = trained()
    if kind == "sparse":
        buffer = torch.ones(2).to_sparse()
    else:
        buffer = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    model.register_buffer("buffer", buffer)
    with pytest.raises(TypeError, match="`buffer` must be a dense tensor"):
        from_torch(model, optimizer, dict)


def test_a_state_without_the_group():
    model, optimizer = trained(named=False)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    model.late = optimizer.param_groups[1]["params"][0]

    def port(weights):
        return dict(weights)

    run = from_torch(model, optimizer, port)
    inner = {k: v for k, v in run.opt_state.inner_states.items() if k != "1"}
    state = run.opt_state._replace(inner_states=inner)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    params = jax.tree.map(lambda p: p + 1, run.params)
    with pytest.raises(
        ValueError, match="must have the optimizer's groups 0, 1, got 0;"
    ):
        to_torch(params, state, model, optimizer, port)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_what_stayed_put_gets_no_state_in_another_optimizer():
    model, optimizer = trained()
    model.late = torch.nn.Parameter(torch.ones(2))
    optimizer.param_groups[0]["params"].append(model.late)

    def port(weights):
        return dict(weights)

    run = from_torch(model, optimizer, port)
    fresh = torch.optim.RMSprop(model.parameters())
    to_torch(run.params, run.opt_state, model, fresh, port)
    assert fresh.state.keys() == {model.weight, model.bias}


class RMSpropTF(torch.optim.Optimizer):
    """In the place of timm's, whose state and options are recorded."""

    def step(self):
        raise NotImplementedError


RMSpropTF.step.__module__ = "timm.optim.rmsprop_tf"


def recorded_timm():
    record = json.loads((RECORDED / "runs_timm.json").read_text())
    assert record["versions"]["timm"]
    return record


TIMM = recorded_timm()


def checkpoint_of(run):
    model = {k: torch.tensor(t) for k, t in run["half"]["model"].items()}
    state = {
        int(place): {k: torch.tensor(t) for k, t in slots.items()}
        for place, slots in run["half"]["optimizer"]["state"].items()
    }
    groups = run["half"]["optimizer"]["param_groups"]
    return model, {"state": state, "param_groups": [dict(g) for g in groups]}


def finished(run, record):
    """The parameters after the second half, with the recorded gradients."""
    params, state = run.params, run.opt_state
    update = jax.jit(run.tx.update)
    gradients = {k: np.asarray(g, np.float32) for k, g in record["gradients"].items()}
    for step in range(record["half"], 2 * record["half"]):
        grads = port({k: g[step] for k, g in gradients.items()})
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def ids(run):
    return " ".join(f"{k}={v}" for k, v in run["options"].items())


@pytest.mark.parametrize("run", TIMM["runs"], ids=ids)
def test_timm_goes_on(run):
    rates = jnp.asarray(TIMM["learning_rates"])
    carried = from_torch_checkpoint(
        *checkpoint_of(run), port, NAMES, learning_rate=rates.__getitem__
    )
    params, _ = finished(carried, TIMM)
    expected = port({k: np.asarray(t) for k, t in run["end"].items()})
    for name, array in expected.items():
        np.testing.assert_allclose(params[name], array, rtol=2e-6, atol=1e-7)


def live_timm(run):
    weights, state_dict = checkpoint_of(run)
    model = torch.nn.Linear(3, 2)
    model.load_state_dict(weights)
    (group,) = state_dict["param_groups"]
    optimizer = RMSpropTF(model.parameters(), {k: v for k, v in group.items()})
    optimizer.load_state_dict(state_dict)
    return model, optimizer


@pytest.mark.parametrize("run", TIMM["runs"], ids=ids)
def test_a_live_timm_there_and_back(run):
    model, optimizer = live_timm(run)
    before = {
        (name, slot): value.clone()
        for name, p in model.named_parameters()
        for slot, value in optimizer.state[p].items()
    }
    carried = from_torch(model, optimizer, port)
    same(carried, from_torch_checkpoint(*checkpoint_of(run), port, NAMES))
    for parameter in model.parameters():
        for value in optimizer.state[parameter].values():
            value.zero_()
    to_torch(carried.params, carried.opt_state, model, optimizer, port)
    after = {
        (name, slot): value
        for name, p in model.named_parameters()
        for slot, value in optimizer.state[p].items()
    }
    assert after.keys() == before.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-6, atol=1e-7)


def test_a_timm_that_has_not_stepped_starts_at_1():
    (run,) = (r for r in TIMM["runs"] if r["options"] == TIMM["runs"][0]["options"])
    model, optimizer = live_timm(run)
    optimizer.state.clear()
    carried = from_torch(model, optimizer, port)
    assert (carried.opt_state[0].nu["kernel"] == 1).all()


def with_options(**options):
    return next(r for r in TIMM["runs"] if r["options"].items() >= options.items())


def test_a_buffer_with_learning_rates_inside_goes_to_no_optimizer_without():
    inside = live_timm(with_options(momentum=0.9, centered=False))
    run = from_torch(*inside, port)
    outside = trained(momentum=0.9)
    why = "outside the momentum buffer, got it inside; learning rates of the past"
    with pytest.raises(ValueError, match=why):
        to_torch(run.params, run.opt_state, *outside, port)
    run = from_torch(*outside, port)
    with pytest.raises(ValueError, match="inside the momentum buffer, got it outside"):
        to_torch(run.params, run.opt_state, *inside, port)


def test_a_plain_buffer_elsewhere_in_a_chain_is_refused():
    """As in a chain of the user's own, or in a state pickled by older versions."""
    inside = live_timm(with_options(momentum=0.9, centered=False))
    params, _, (average, rate, trace, *rest) = from_torch(*inside, port)
    assert isinstance(trace, ScaledTraceState)
    plain = optax.TraceState(*trace)
    says = r"whether its momentum buffer has the learning rate inside, got .* at \[2\]"
    for run in (inside, trained(momentum=0.9)):
        with pytest.raises(ValueError, match=says):
            to_torch(params, (average, rate, plain, *rest), *run, port)
    before = (plain, average, rate, *rest)
    with pytest.raises(ValueError, match=r"has the learning rate inside, got .*\[0\]"):
        to_torch(params, before, *trained(momentum=0.9), port)
    # The remedy that the message names.
    told = (average, rate, ScaledTraceState(*plain), *rest)
    to_torch(params, told, *inside, port)


def test_a_chain_of_ones_own_whose_buffer_has_no_learning_rate():
    model, optimizer = trained(momentum=0.9)
    params, _, state = from_torch(model, optimizer, port)
    own = optax.chain(
        optax.clip(1.0),
        scale_by_rms(0.99),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.01),
    )
    state = (optax.EmptyState(), *state)
    assert jax.tree.structure(state) == jax.tree.structure(own.init(params))
    buffer = optimizer.state[model.bias]["momentum_buffer"].clone()
    optimizer.state.clear()
    to_torch(params, state, model, optimizer, port)
    assert torch.equal(optimizer.state[model.bias]["momentum_buffer"], buffer)


def test_timm_with_caution_is_refused():
    model, optimizer = live_timm(TIMM["runs"][0])
    optimizer.param_groups[0]["caution"] = True
    with pytest.raises(ValueError, match="`caution` must be False, because other"):
        from_torch(model, optimizer, port)
