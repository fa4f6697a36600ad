"""What a run of torch may hide is carried exactly, or refused with a remedy."""

import copy
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from helpers import update_in_torch
from optax_rmsprop.carry import (
    from_torch,
    from_torch_checkpoint,
    schedule_of,
    to_torch,
)


def two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))


def next_steps(run, gradients):
    """The parameters after updates in JAX."""
    params, state = run.params, run.opt_state
    for grads in gradients:
        updates, state = run.tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def ones(run):
    return jax.tree.map(jnp.ones_like, run.params)


def assert_torch_agrees(model, optimizer, run, steps=3, rtol=1e-5):
    """Both make some steps with gradients of 1."""
    expected = next_steps(run, [ones(run)] * steps)[0]
    update_in_torch(model, optimizer, torch.ones_like, steps)
    for name, parameter in model.named_parameters():
        if name in expected:
            np.testing.assert_allclose(
                expected[name], parameter.detach().numpy(), rtol=rtol
            )


# Slots


def test_slots_are_carried_whatever_the_step():
    """A3C shares the averages between processes, and not the steps."""
    model = two_layers()
    optimizer = torch.optim.RMSprop(model.parameters(), momentum=0.9)
    update_in_torch(model, optimizer, torch.ones_like, 2)
    for state in optimizer.state.values():
        state["step"].zero_()
    run = from_torch(model, optimizer, dict)
    assert run.opt_state[0].count == 0
    assert (run.opt_state[0].nu["0.bias"] > 0).all()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    to_torch(run.params, run.opt_state, model, optimizer, dict)
    after = optimizer.state_dict()["state"]
    for number, slots in before.items():
        for slot, value in slots.items():
            assert torch.equal(after[number][slot], value)
    assert_torch_agrees(model, optimizer, run)


def test_slots_keep_the_memory_format_of_their_parameter():
    model = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.RMSprop(model.parameters())
    update_in_torch(model, optimizer, torch.ones_like)
    run = from_torch(model, optimizer, dict)
    to_torch(run.params, run.opt_state, model, optimizer, dict)
    slot = optimizer.state[model.weight]["square_avg"]
    assert slot.is_contiguous(memory_format=torch.channels_last)


# Classes


class Inherits(torch.optim.RMSprop):
    """Has the step of torch's."""


class Overrides(torch.optim.RMSprop):
    def step(self, closure=None):
        return super().step(closure)


class RMSpropTF(torch.optim.RMSprop):
    """Has the name of timm's, and a step of its own."""

    def step(self, closure=None):
        return super().step(closure)


class Wraps(torch.optim.RMSprop):
    @functools.wraps(torch.optim.RMSprop.step)
    def step(self, closure=None):
        return super().step(closure)


def test_a_subclass_that_inherits_the_step_is_torchs():
    for kind in (Inherits, torch.optim.RMSprop):  # the first one made is patched
        model = two_layers()
        optimizer = kind(model.parameters())
        update_in_torch(model, optimizer, torch.ones_like)
        assert_torch_agrees(model, optimizer, from_torch(model, optimizer, dict))


@pytest.mark.parametrize("kind", [Overrides, RMSpropTF, Wraps, torch.optim.Adam])
def test_a_class_with_a_step_of_its_own_is_refused(kind):
    model = two_layers()
    optimizer = kind(model.parameters())
    with pytest.raises(TypeError, match=r"`optimizer` must be a .*dialect='torch' or"):
        from_torch(model, optimizer, dict)


def test_a_class_with_a_step_of_its_own_is_what_the_user_says():
    model = two_layers()
    optimizer = Overrides(model.parameters(), momentum=0.9)
    update_in_torch(model, optimizer, torch.ones_like)
    run = from_torch(model, optimizer, dict, dialect="torch")
    to_torch(run.params, run.opt_state, model, optimizer, dict, dialect="torch")
    assert_torch_agrees(model, optimizer, run)
    with pytest.raises(
        TypeError, match=r"an RMSprop of timm, but .* lacks decoupled_d"
    ):
        from_torch(model, optimizer, dict, dialect="timm")
    with pytest.raises(
        ValueError, match=r"`dialect` must be 'torch' or .*, got 'Torch'"
    ):
        from_torch(model, optimizer, dict, dialect="Torch")


def test_a_known_class_has_its_own_dialect():
    model, optimizer = timm_run(weight_decay=0.0)
    assert from_torch(model, optimizer, dict, dialect="timm").params
    with pytest.raises(
        ValueError, match="must be 'timm', which is that of `optimizer`"
    ):
        from_torch(model, optimizer, dict, dialect="torch")


def test_step_hooks_are_refused():
    model = two_layers()
    optimizer = torch.optim.RMSprop(model.parameters())
    for register in (
        optimizer.register_step_post_hook,
        register_optimizer_step_post_hook,
    ):
        hook = register(lambda *_: None)
        with pytest.raises(ValueError, match="must have no step post hooks"):
            from_torch(model, optimizer, dict)
        hook.remove()
    torch.optim.lr_scheduler.StepLR(optimizer, 2)  # which wraps the optimizer's step
    assert from_torch(model, optimizer, dict).params
    optimizer.step = lambda: None
    with pytest.raises(ValueError, match="got a step of its own, which is not carried"):
        from_torch(model, optimizer, dict)


def test_a_wrapped_optimizer_is_refused_with_the_remedy():
    optimizer = torch.optim.RMSprop(two_layers().parameters())
    wrapper = types.SimpleNamespace(optim=optimizer)
    with pytest.raises(TypeError, match=r"give the RMSprop in its `\.optim`"):
        from_torch(two_layers(), wrapper, dict)


class RMSpropTFLike(torch.optim.Optimizer):
    """Stable-Baselines3's, whose step is written here from its formula."""

    def __init__(self, params):
        options = {"lr": 0.01, "momentum": 0.0, "alpha": 0.99, "eps": 1e-5}
        super().__init__(params, options | {"centered": False, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state |= {"step": 0, "square_avg": torch.ones_like(parameter)}
            state["step"] += 1
            state["square_avg"].mul_(0.99).add_(0.01 * parameter.grad**2)
            root = (state["square_avg"] + group["eps"]).sqrt()
            parameter.sub_(group["lr"] * parameter.grad / root)


RMSpropTFLike.step.__module__ = "stable_baselines3.common.sb2_compat.rmsprop_tf_like"


@pytest.mark.parametrize("steps", [0, 2])
def test_stable_baselines3_goes_on(steps):
    model = two_layers()
    optimizer = RMSpropTFLike(model.parameters())
    update_in_torch(model, optimizer, torch.ones_like, steps)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"`dialect` must be given, .*several classes"):
        from_torch_checkpoint(*saved, dict, names)
    of_file = from_torch_checkpoint(*saved, dict, names, dialect="stable_baselines3")
    run = from_torch(model, optimizer, dict)
    to_torch(run.params, run.opt_state, model, optimizer, dict)
    assert bool(optimizer.state) == bool(steps)
    assert_torch_agrees(model, optimizer, run)
    for name, leaf in next_steps(of_file, [ones(run)] * 3)[0].items():
        np.testing.assert_array_equal(leaf, next_steps(run, [ones(run)] * 3)[0][name])


# timm's decoupled decay


def timm_run(made_with=0.1, **options):
    """A run of timm whose gradients are 0, so that only the decay changes it."""
    model = two_layers()

    class RMSpropTF(torch.optim.Optimizer):
        def step(self):
            raise NotImplementedError

    RMSpropTF.step.__module__ = "timm.optim.rmsprop_tf"
    RMSpropTF.step.__qualname__ = "RMSpropTF.step"
    defaults = dict(lr=made_with, alpha=0.9, eps=1e-3, weight_decay=0.5, momentum=0.0)
    defaults |= dict(centered=False, decoupled_decay=True, lr_in_momentum=True)
    optimizer = RMSpropTF(model.parameters(), defaults | options)
    optimizer.param_groups[0]["lr"] = 0.02  # as a scheduler has lowered it
    return model, optimizer


def decayed(run):
    """The factor of a parameter in an update without a gradient."""
    zeros = jax.tree.map(jnp.zeros_like, run.params)
    updates, _ = run.tx.update(zeros, run.opt_state, run.params)
    return float((updates["0.bias"] / run.params["0.bias"])[0])


def test_a_corrected_decay_divides_by_the_rate_that_timm_was_made_with():
    model, optimizer = timm_run(corrected_weight_decay=True)
    run = from_torch(model, optimizer, dict)
    assert decayed(run) == pytest.approx(-(0.02**2) / 0.1 * 0.5, rel=1e-5)
    saved = model.state_dict(), optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(
        ValueError, match=r"`max_lr_snapshot` must be in group 0 .*1.0.3"
    ):
        from_torch_checkpoint(*saved, dict, names)
    saved[1]["param_groups"][0]["max_lr_snapshot"] = 0.05
    run = from_torch_checkpoint(*saved, dict, names)
    assert decayed(run) == pytest.approx(-(0.02**2) / 0.05 * 0.5, rel=1e-5)


def test_a_decoupled_decay_of_an_unknown_version_is_refused():
    model, optimizer = timm_run()
    with pytest.raises(ValueError, match=r"timm up to 0.4 subtracts weight_decay"):
        from_torch(model, optimizer, dict)
    optimizer.param_groups[0]["corrected_weight_decay"] = False
    assert decayed(from_torch(model, optimizer, dict)) == pytest.approx(-0.02 * 0.5)
    model, optimizer = timm_run(weight_decay=0.0)
    assert decayed(from_torch(model, optimizer, dict)) == 0


# Rates of groups


def two_groups(rates=(1e-4, 1e-2), steps=2, **options):
    model = two_layers()
    groups = [
        {"params": layer.parameters(), "lr": rate}
        for layer, rate in zip(model, rates, strict=True)
    ]
    optimizer = torch.optim.RMSprop(groups, **options)
    update_in_torch(model, optimizer, torch.ones_like, steps)
    return model, optimizer


def lengths(run):
    """The steps of the two layers, relative to those with torch's rates."""
    updates, _ = run.tx.update(ones(run), run.opt_state, run.params)
    return [float(abs(updates[name][0])) for name in ("0.bias", "1.bias")]


def test_a_schedule_multiplies_rates_that_differ():
    model, optimizer = two_groups()
    expected = lengths(from_torch(model, optimizer, dict))
    half = from_torch(model, optimizer, dict, lambda count: jnp.float32(0.5))
    np.testing.assert_allclose(lengths(half), np.array(expected) / 2, rtol=1e-5)
    listed = from_torch(model, optimizer, dict, [lambda count: jnp.float32(0.5), 0.25])
    factors = np.array([0.5 / 1e-4, 0.25 / 1e-2])
    np.testing.assert_allclose(lengths(listed), factors * expected, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"`learning_rate` must be a list of one for e"
    ):
        from_torch(model, optimizer, dict, 0.5)


def test_a_schedule_multiplies_the_rates_with_which_a_scheduler_began():
    model, optimizer = two_groups(steps=0)

    def factor(count):
        return 0.5**count

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(2):
        update_in_torch(model, optimizer, torch.ones_like)
        scheduler.step()
    run = from_torch(model, optimizer, dict, factor)
    updates = [ones(run)] * 2
    after, _ = next_steps(run, updates)
    for _ in updates:
        update_in_torch(model, optimizer, torch.ones_like)
        scheduler.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(after[name], parameter.detach().numpy(), rtol=1e-6)


def test_a_schedule_multiplies_the_scales_of_timms_schedulers():
    model, optimizer = two_groups(rates=(0.0025, 0.01))
    for group, scale in zip(optimizer.param_groups, (0.25, 1.0), strict=True):
        group |= {"initial_lr": 0.04, "lr_scale": scale}
    expected = lengths(from_torch(model, optimizer, dict))
    run = from_torch(model, optimizer, dict, lambda count: jnp.float32(0.25))
    np.testing.assert_allclose(lengths(run), expected, rtol=1e-5)


def test_a_table_of_torchs_rates_must_be_of_this_run():
    model, optimizer = two_groups()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    schedules = schedule_of(scheduler, 5)
    expected = lengths(from_torch(model, optimizer, dict))
    run = from_torch(model, optimizer, dict, schedules)
    np.testing.assert_allclose(lengths(run), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="must be a list of one for each of 2 groups"):
        from_torch(model, optimizer, dict, schedules[0])
    with pytest.raises(ValueError, match=r"begins with the rate of group 0, 0\.\d+"):
        from_torch(model, optimizer, dict, schedules[::-1])
    optimizer.state.clear()
    early = schedule_of(scheduler, 5)
    model, optimizer = two_groups()
    with pytest.raises(ValueError, match=r"begins at the run's step, 2, got .* at 0;"):
        from_torch(model, optimizer, dict, early)
    with pytest.raises(
        TypeError, match=r"got a StepLR; give schedule_of\(scheduler, s"
    ):
        from_torch(model, optimizer, dict, [scheduler, 0.1])
    with pytest.raises(TypeError, match=r"got 'x' for group 1; give a number, a sche"):
        from_torch(model, optimizer, dict, [0.1, "x"])


def test_a_schedule_counts_the_steps_of_the_run_in_a_group_added_later():
    model = two_layers()
    optimizer = torch.optim.RMSprop(model[0].parameters())
    update_in_torch(model, optimizer, torch.ones_like, 2)
    optimizer.add_param_group({"params": model[1].parameters()})
    rates = jnp.array([9.0, 9.0, 0.0, 9.0])
    for given in (rates.__getitem__, [rates.__getitem__] * 2):
        assert lengths(from_torch(model, optimizer, dict, given)) == [0, 0]


class Cycled:
    """Rates, and momenta that go along, as `schedule_of` makes them."""

    def __init__(self, rates, momenta=None):
        self.rates, self.momentum = jnp.asarray(rates), momenta and Cycled(momenta)

    def __call__(self, count):
        return self.rates[count]


@pytest.mark.parametrize("of_groups", [1, 2])
def test_the_momentum_of_a_scheduler_goes_along(of_groups, x64):
    model = two_layers().double()
    groups = [{"params": layer.parameters()} for layer in model][:of_groups]
    optimizer = torch.optim.RMSprop(groups, momentum=0.9)
    optimizer.param_groups[-1]["weight_decay"] = 0.1
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=9)
    cycled = {"lr": [], "momentum": []}

    def step():
        for name, values in cycled.items():
            values.append(optimizer.param_groups[0][name])
        update_in_torch(model, optimizer, torch.ones_like)
        cycle.step()

    step(), step()
    before = copy.deepcopy((model, optimizer.state_dict()))
    for _ in range(4):
        step()
    expected = {name: p.detach().numpy() for name, p in model.named_parameters()}
    model, state_dict = before
    groups = [{"params": layer.parameters()} for layer in model][:of_groups]
    optimizer = torch.optim.RMSprop(groups)
    optimizer.load_state_dict(state_dict)
    schedule = Cycled(cycled["lr"], cycled["momentum"])
    run = from_torch(model, optimizer, dict, [schedule] * of_groups)
    update = jax.jit(run.tx.update)
    params, state = run.params, run.opt_state
    for _ in range(4):
        updates, state = update(ones(run), state, params)
        params = optax.apply_updates(params, updates)
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-10)
    to_torch(params, state, model, optimizer, dict)
    assert optimizer.state[model[0].bias]["step"] == 6


def test_a_momentum_needs_a_buffer():
    model, optimizer = two_groups(rates=(0.01, 0.01))
    schedule = Cycled([0.1] * 9, [0.9] * 9)
    with pytest.raises(ValueError, match="must have a momentum of None for a group"):
        from_torch(model, optimizer, dict, [schedule, schedule])


# Groups that do the same


def test_groups_that_do_the_same_are_joined():
    model = two_layers()
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    optimizer = torch.optim.RMSprop(groups, momentum=0.9)
    update_in_torch(model, optimizer, torch.ones_like, 2)
    run = from_torch(model, optimizer, dict)
    assert run.opt_state[0].count == 2  # the state of a chain, not of a partition
    _, state = next_steps(run, [ones(run)])
    to_torch(run.params, state, model, optimizer, dict)
    assert all(state["step"] == 3 for state in optimizer.state.values())
    other = from_torch(model, optimizer, dict, [0.1, 0.1, 0.1, 0.2])
    assert other.opt_state.inner_states.keys() == {"0", "3", "frozen"}
    optimizer.param_groups[3]["alpha"] = 0.5
    with pytest.raises(ValueError, match=r"`1.bias` in group 0, .* 3, whose options"):
        to_torch(run.params, state, model, optimizer, dict)


def test_optaxs_tools_take_a_run_of_several_groups():
    model, optimizer = two_groups()
    run = from_torch(model, optimizer, dict)
    named = optax.tree_map_params(
        run.tx,
        lambda _, name: name,
        run.opt_state,
        {name: name for name in run.params},
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    assert named.inner_states["1"].inner_state[0].nu["1.bias"] == "1.bias"


# Which parameters train


def unfrozen(weight_decay=0.0):
    """A run whose first layer was frozen, and is not any more."""
    model = two_layers()
    decay = weight_decay
    optimizer = torch.optim.RMSprop(
        model.parameters(), momentum=0.9, weight_decay=decay
    )
    for parameter in model[1].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_what_has_had_no_gradient_starts_as_in_torch():
    model, optimizer = unfrozen()
    run = from_torch(model, optimizer, dict)
    to_torch(run.params, run.opt_state, model, optimizer, dict)
    assert model[0].bias not in optimizer.state
    _, state = next_steps(run, [ones(run)])
    copied = copy.deepcopy((model, optimizer))[0]
    other = torch.optim.RMSprop(copied.parameters(), momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    to_torch(run.params, state, copied, other, dict)
    assert (other.state[copied[0].bias]["square_avg"] > 0).all()
    assert_torch_agrees(model, optimizer, run)
    # The port may leave out a parameter that has had none.
    head = {"1.weight", "1.bias"}
    part = from_torch(*unfrozen(), lambda w: {name: w[name] for name in head})
    assert part.params.keys() == head


def test_what_decays_without_a_gradient_does_not_train_unless_it_is_said():
    model, optimizer = unfrozen(weight_decay=0.1)
    with pytest.warns(RuntimeWarning, match=r"do not train, .*: 0.weight, 0.bias; if"):
        run = from_torch(model, optimizer, dict)
    assert moved(run) == {"1.weight", "1.bias"}
    names = [name for name, _ in model.named_parameters()]
    run = from_torch(model, optimizer, dict, trainable=names)
    assert_torch_agrees(model, optimizer, run)
    assert moved(from_torch(model, optimizer, dict, trainable=names[:2])) == {
        *names[:2]
    }


def frozen_backbone(**options):
    """A checkpoint whose first group was frozen, and the names of its parameters."""
    model = two_layers()
    model[0].requires_grad_(False)
    groups = [{"params": layer.parameters()} for layer in model]
    optimizer = torch.optim.RMSprop(groups, **options)
    for parameter in model[1].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = model.state_dict(), optimizer.state_dict()
    return *saved, dict, [name for name, _ in model.named_parameters()]


def moved(run):
    updates, _ = run.tx.update(ones(run), run.opt_state, run.params)
    return {name for name, update in updates.items() if update.any()}


def test_a_checkpoint_with_a_group_without_a_state_asks_which_parameters_train():
    saved = frozen_backbone()
    with pytest.raises(ValueError, match=r"`trainable` must be given, because group 0"):
        from_torch_checkpoint(*saved)
    head = {"1.weight", "1.bias"}
    assert moved(from_torch_checkpoint(*saved, trainable=head)) == head
    assert moved(from_torch_checkpoint(*saved, trainable=saved[-1])) == {*saved[-1]}
    with pytest.raises(
        ValueError, match=r"`trainable` must be names of .* got 2.bias; "
    ):
        from_torch_checkpoint(*saved, trainable=["2.bias"])
    with pytest.raises(TypeError, match=r"`trainable` must be a list of names, got '1"):
        from_torch_checkpoint(*saved, trainable="1.bias")


def test_a_trainable_parameter_without_a_state_starts_as_in_torch():
    model, state_dict, *rest = frozen_backbone(momentum=0.9)
    state_dict["state"].pop(3)
    run = from_torch_checkpoint(
        model, state_dict, *rest, trainable=["1.weight", "1.bias"]
    )
    updates, _ = run.tx.update(ones(run), run.opt_state, run.params)
    # The first step of any parameter: lr / √(1 - alpha).
    np.testing.assert_allclose(updates["1.bias"], -0.01 / 0.1, rtol=1e-5)


def tied_in_a_file():
    """A file in which the two names of a tied weight have lost their common memory."""
    model = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4))
    model[1].weight = model[0].weight
    optimizer = torch.optim.RMSprop(model.parameters())
    update_in_torch(model, optimizer, torch.ones_like)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return saved, optimizer.state_dict()


def test_a_copy_of_a_tied_weight_is_refused():
    saved = tied_in_a_file()
    names = ["0.weight", "1.bias"]
    says = "`1.weight`, which the optimizer does not have, .* a copy of `0.weight`"
    with pytest.raises(ValueError, match=says):
        from_torch_checkpoint(*saved, dict, names)

    def port(weights):
        return {name: weights[name] for name in names}

    assert moved(from_torch_checkpoint(*saved, port, names)) == {*names}
    with pytest.raises(ValueError, match=says):
        from_torch_checkpoint(*saved, dict, names, trainable=names)


def test_what_another_optimizer_trains_is_not_overwritten():
    """As in a GAN, whose generator goes on in torch."""
    model = two_layers()
    optimizer = torch.optim.RMSprop(model[1].parameters())
    update_in_torch(model, optimizer, torch.ones_like)
    run = from_torch(model, optimizer, dict)
    to_torch(run.params, run.opt_state, model, optimizer, dict)
    with torch.no_grad():
        model[0].bias.add_(1)
    expected = model[0].bias.detach().clone()
    with pytest.raises(
        ValueError, match=r"`0.bias`, which `optimizer` does not train,"
    ):
        to_torch(run.params, run.opt_state, model, optimizer, dict)
    assert torch.equal(model[0].bias, expected)
