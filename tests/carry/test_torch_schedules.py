"""A table of a scheduler has torch's own rates and momenta, to the last bit."""

import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
import torch
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from optax_rmsprop import dialects
from optax_rmsprop.carry import schedule_of
from optax_rmsprop.carry._torch._schedules import Schedule

RATES = (0.1, 0.03)
PERIOD = 7
STEPS = 2 * PERIOD


def halving(epoch):
    return 0.5 ** (epoch % PERIOD)


CASES = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, [halving, lambda e: 1 / (1 + e)]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda e: 0.9 + 0.01 * e),
    "StepLR": lambda o: lrs.StepLR(o, 3, gamma=0.7),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 2, 5, 11], gamma=0.3),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.3, PERIOD),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.3, 0.7, PERIOD),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.83),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, PERIOD, 1.7),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, PERIOD, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, [0.2, 0.5], 5 * PERIOD),
    "OneCycleLR three phases": lambda o: lrs.OneCycleLR(
        o, 0.2, 5 * PERIOD, three_phase=True, anneal_strategy="linear"
    ),
    "OneCycleLR rates only": lambda o: lrs.OneCycleLR(
        o, 0.2, 5 * PERIOD, cycle_momentum=False
    ),
    **{
        f"CyclicLR {mode}": functools.partial(
            lrs.CyclicLR,
            base_lr=[0.01, 0.02],
            max_lr=0.1,
            step_size_up=3,
            step_size_down=4,
            mode=mode,
            gamma=0.9,
        )
        for mode in ("triangular", "triangular2", "exp_range")
    },
    "CyclicLR by a function": lambda o: lrs.CyclicLR(
        o, 0.01, 0.1, 3, scale_fn=lambda x: 1 / x, scale_mode="cycle"
    ),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o,
        [
            lrs.LinearLR(o, 0.1, total_iters=4),
            lrs.CosineAnnealingLR(o, 5),
            lrs.ExponentialLR(o, 0.9),
        ],
        milestones=[4, 9],
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.1, 4), lrs.ExponentialLR(o, 0.9)], o
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=[0.05, 0.01], anneal_epochs=PERIOD),
}
in_every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def rmsprop(rates=RATES, **options):
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.float64))], "lr": rate}
        for rate in rates
    ]
    return torch.optim.RMSprop(groups, **options)


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def advance(scheduler, steps=1):
    """Train as torch's users do: an update, then a step of the scheduler."""
    for _ in range(steps):
        for parameter in parameters(scheduler.optimizer):
            parameter.grad = torch.cos(parameter.detach())
        scheduler.optimizer.step()
        scheduler.step()


def present(scheduler, option="lr"):
    return [float(group[option]) for group in scheduler.optimizer.param_groups]


def everything(scheduler):
    """All that a step of the scheduler or of its optimizer changes."""
    optimizer = scheduler.optimizer
    return pickle.dumps(
        (
            scheduler.state_dict(),
            optimizer.state_dict(),
            parameters(optimizer),
            [id(group) for group in optimizer.param_groups],
            sorted(vars(optimizer)),
            id(optimizer.step),
            getattr(optimizer, "_opt_called", None),
        )
    )


@in_every_case
@pytest.mark.parametrize("made", [0, 5])
def test_rates_and_momenta_are_those_of_torch(make, made):
    scheduler = make(rmsprop(momentum=0.5))
    advance(scheduler, made)
    before = everything(scheduler)
    schedules = schedule_of(scheduler, STEPS)
    assert everything(scheduler) == before
    rates, momenta = [], []
    for _ in range(STEPS):
        rates.append(present(scheduler))
        momenta.append(present(scheduler, "momentum"))
        advance(scheduler)
    assert all(schedule.start == made for schedule in schedules)
    found = [schedule.rates for schedule in schedules]
    np.testing.assert_array_equal(np.transpose(found), rates)
    assert found[0].dtype == np.float64
    assert len(np.unique(found[0])) > 1
    if np.ptp(momenta):
        found = np.transpose([schedule.momenta for schedule in schedules])
        np.testing.assert_array_equal(found, momenta)
    else:
        assert all(schedule.momenta is None for schedule in schedules)
        assert all(schedule.momentum is None for schedule in schedules)


def test_no_scheduler_of_torch_is_missed():
    classes = {
        kind
        for kind in vars(lrs).values()
        if isinstance(kind, type) and issubclass(kind, lrs.LRScheduler)
    }
    steps_by_itself = {type(make(rmsprop(momentum=0.5))) for make in CASES.values()}
    base = {lrs.LRScheduler, lrs._LRScheduler}
    assert classes - base - {lrs.ReduceLROnPlateau} == steps_by_itself - {SWALR}


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR triangular2"])
def test_momentum_is_cycled(name):
    (schedule, _) = schedule_of(CASES[name](rmsprop(momentum=0.5)), STEPS)
    assert np.ptp(schedule.momenta) > 0.02
    np.testing.assert_array_equal(schedule.momentum.rates, schedule.momenta)
    assert schedule.momentum.momentum is None


def test_rates_that_are_tensors():
    optimizer = rmsprop([torch.tensor(0.1)])
    scheduler = lrs.ExponentialLR(optimizer, 0.9)
    rate = optimizer.param_groups[0]["lr"]
    (schedule,) = schedule_of(scheduler, STEPS)
    assert rate is optimizer.param_groups[0]["lr"]
    assert rate.item() == torch.tensor(0.1).item()
    for expected in schedule.rates:
        assert present(scheduler) == [expected]
        advance(scheduler)


def test_it_starts_where_the_optimizer_is():
    optimizer = rmsprop()
    first, second = parameters(optimizer)
    for parameters_of_step in ([first], [first, second]):
        for parameter in parameters_of_step:
            parameter.grad = torch.ones(2, dtype=torch.float64)
        optimizer.step()
    scheduler = lrs.StepLR(optimizer, 1, gamma=0.5)
    for schedule in schedule_of(scheduler, 3):
        assert schedule.start == 2


# How a schedule is called.


def table(rates=(4.0, 3.0, 2.0), start=10, every=1, momenta=None):
    return Schedule(np.array(rates), momenta, start, every)


BY_COUNT = {0: 4.0, 9: 4.0, 10: 4.0, 11: 3.0, 12: 2.0, 13: 2.0, 10**9: 2.0}


@pytest.mark.parametrize("x64_mode", [False, True])
@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, jnp.int32, jnp.uint32])
def test_by_a_count_of_any_kind(x64_mode, kind):
    jax.config.update("jax_enable_x64", x64_mode)
    try:
        for count, rate in BY_COUNT.items():
            if kind is not np.uint8 or count < 256:
                found = table()(kind(count))
                assert found == rate
                assert found.dtype == (jnp.float64 if x64_mode else jnp.float32)
                assert found.shape == ()
    finally:
        jax.config.update("jax_enable_x64", False)


def test_traced_and_vectorised():
    counts, rates = (jnp.array(list(x)) for x in (BY_COUNT.keys(), BY_COUNT.values()))
    schedule = table()
    np.testing.assert_array_equal(jax.jit(jax.vmap(schedule))(counts), rates)
    np.testing.assert_array_equal(schedule(counts), rates)
    _, found = jax.lax.scan(lambda c, _: (c + 1, schedule(c)), 9, length=5)
    np.testing.assert_array_equal(found, [4, 4, 3, 2, 2])


def test_an_epoch_of_several_updates():
    schedule = table(start=10, every=3)
    found = [float(schedule(count)) for count in range(8, 21)]
    assert found == [4.0] * 5 + [3.0] * 3 + [2.0] * 5


def test_every_is_the_schedule_of_torch():
    scheduler = lrs.ExponentialLR(rmsprop(), 0.9)
    schedules = schedule_of(scheduler, 4, every=3)
    momentum = Schedule(np.ones(2), np.ones(2), 1, 3).momentum
    assert (momentum.start, momentum.every) == (1, 3)
    for update in range(12):
        found = [schedule(update) for schedule in schedules]
        np.testing.assert_allclose(found, present(scheduler), rtol=1e-6)
        for parameter in parameters(scheduler.optimizer):
            parameter.grad = torch.ones(2, dtype=torch.float64)
        scheduler.optimizer.step()
        if update % 3 == 2:
            scheduler.step()


def test_it_can_be_pickled_and_hashed():
    schedule = schedule_of(lrs.OneCycleLR(rmsprop(), 0.1, 9), 5)[0]
    copy = pickle.loads(pickle.dumps(schedule))
    np.testing.assert_array_equal(copy.rates, schedule.rates)
    np.testing.assert_array_equal(copy.momenta, schedule.momenta)
    assert copy(2) == schedule(2)
    assert {schedule: 1}[schedule] == 1
    with pytest.raises(AttributeError):
        schedule.start = 3


def test_a_long_table_is_one_constant():
    schedule = table(np.linspace(1, 0, 10**6), start=0)
    text = jax.jit(schedule).lower(jnp.int32(3)).as_text()
    assert text.count("tensor<1000000xf32>") <= 6
    assert jax.jit(schedule)(500_000) == pytest.approx(0.5, rel=1e-5)


# Beside torch. The updates are eager and few, float64 agrees to 1e-15.


def beside_torch(scheduler, tx, state, steps):
    """The largest difference of the parameters, in the first group, in all steps."""
    parameter = parameters(scheduler.optimizer)[0]
    params, worst = jnp.asarray(parameter.detach().numpy()), 0.0
    for _ in range(steps):
        updates, state = tx.update(jnp.cos(params), state, params)
        params = optax.apply_updates(params, updates)
        advance(scheduler)
        difference = np.abs(params - parameter.detach().numpy()).max()
        worst = max(worst, difference)
    return worst


@pytest.mark.usefixtures("x64")
def test_training_beside_torch():
    scheduler = lrs.CosineAnnealingWarmRestarts(rmsprop(momentum=0.9), PERIOD)
    schedule = schedule_of(scheduler, STEPS)[0]
    for rate, is_same in ((schedule, True), (RATES[0], False)):
        scheduler = lrs.CosineAnnealingWarmRestarts(rmsprop(momentum=0.9), PERIOD)
        tx = dialects.torch(rate, momentum=0.9)
        worst = beside_torch(scheduler, tx, tx.init(jnp.ones(2)), STEPS)
        assert (worst < 1e-10) == is_same


@pytest.mark.usefixtures("x64")
def test_training_beside_torch_with_a_cycled_momentum():
    scheduler = lrs.OneCycleLR(rmsprop(), 0.1, STEPS)
    schedule = schedule_of(scheduler, STEPS)[0]
    for momentum, is_same in ((schedule.momentum, True), (0.95, False)):
        scheduler = lrs.OneCycleLR(rmsprop(), 0.1, STEPS)
        tx = optax.inject_hyperparams(dialects.torch)(lr=schedule, momentum=momentum)
        worst = beside_torch(scheduler, tx, tx.init(jnp.ones(2)), STEPS)
        assert (worst < 1e-10) == is_same


# Functions that refer to the scheduler or the optimizer.

the_optimizer = None


def by_a_global(epoch):
    return 0.5 + the_optimizer.param_groups[0]["lr"]


class Trainer:
    def __init__(self, optimizer):
        self.optimizer, self.calls = optimizer, 0
        self.data = (i for i in ())  # cannot be copied

    def factor(self, epoch):
        self.calls += 1
        return self.calls / (1 + self.optimizer.param_groups[0]["lr"])


class Factor:
    """LambdaLR saves the attributes of a callable object, as its state."""

    def __init__(self, optimizer):
        self.optimizer, self.history = optimizer, []

    def __call__(self, epoch):
        self.history.append(epoch)
        return len(self.history) + self.optimizer.param_groups[0]["lr"]


def by_a_closure(optimizer):
    calls, group = 0, optimizer.param_groups[0]

    def inner():
        return optimizer.param_groups[0]["lr"] + group["lr"]

    def factor(epoch):
        nonlocal calls
        calls += 1
        return inner() / calls

    return factor


def by_a_default(optimizer):
    return lambda epoch, groups=optimizer.param_groups: 1 + groups[0]["lr"]


def by_partial(optimizer):
    def factor(optimizer, epoch, *, group):
        return optimizer.param_groups[0]["lr"] + group["lr"]

    return functools.partial(factor, optimizer, group=optimizer.param_groups[0])


def writing(optimizer):
    def factor(epoch):
        optimizer.param_groups[0]["momentum"] = epoch / 100
        return 1 / (1 + epoch)

    return factor


FUNCTIONS = {
    "a global": lambda optimizer: by_a_global,
    "a closure": by_a_closure,
    "a default": by_a_default,
    "a partial": by_partial,
    "a method": lambda optimizer: Trainer(optimizer).factor,
    "an object": Factor,
    "one that writes": writing,
}


@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_that_refer_to_the_optimizer(make, monkeypatch):
    optimizer = rmsprop(momentum=0.5)
    monkeypatch.setitem(globals(), "the_optimizer", optimizer)
    scheduler = lrs.MultiplicativeLR(optimizer, make(optimizer))
    advance(scheduler, 2)
    before = everything(scheduler)
    schedules = schedule_of(scheduler, 5)
    assert everything(scheduler) == before
    for step in range(5):
        assert present(scheduler) == [schedule.rates[step] for schedule in schedules]
        advance(scheduler)


def test_a_function_of_its_own_scheduler():
    scheduler = None

    def factor(epoch):
        return 1.0 if scheduler is None else 1 / (1 + scheduler.last_epoch)

    scheduler = lrs.LambdaLR(rmsprop(), factor)
    schedule = schedule_of(scheduler, 3)[0]
    np.testing.assert_array_equal(schedule.rates, [0.1, 0.1 / 2, 0.1 * (1 / 3)])
    assert scheduler.last_epoch == 0


def test_no_warning_of_torch_escapes():
    scheduler = lrs.StepLR(rmsprop(), 3)
    del scheduler.optimizer.step  # the hook that torch looks for
    schedule_of(scheduler, 5)  # pytest turns a warning into an error


# Refused.


class Wrapper:
    def __init__(self, scheduler):
        self.scheduler = scheduler


class OfLoss(lrs.LRScheduler):
    def step(self, loss=None, *, metric=0):
        self.optimizer.param_groups[0]["lr"] = 0.1


class NeedsLoss(OfLoss):
    def _initial_step(self):
        pass

    def step(self, loss):
        pass


class OfDecay(lrs.LRScheduler):
    def get_lr(self):
        self.optimizer.param_groups[0]["weight_decay"] = 0.1 * self.last_epoch
        return self.base_lrs


class OfParameters(lrs.LRScheduler):
    def get_lr(self):
        (parameter,) = self.optimizer.param_groups[0]["params"]
        return [parameter.norm().item(), 0.0]


class OfState(lrs.LRScheduler):
    def get_lr(self):
        return [float(len(self.optimizer.state)), 0.0]


def nan_after(optimizer, steps):
    return lrs.LambdaLR(optimizer, lambda e: math.nan if e >= steps else 1.0)


def uncopyable(optimizer):
    scheduler = lrs.StepLR(optimizer, 3)
    scheduler.stream = (i for i in range(3))
    return scheduler


REFUSED = {
    "an optimizer": (lambda o: o, (3,), TypeError, "LRScheduler, got a RMSprop"),
    "a class": (lambda o: lrs.StepLR, (3,), TypeError, "LRScheduler, got a type"),
    "a wrapper": (
        lambda o: Wrapper(lrs.StepLR(o, 3)),
        (3,),
        TypeError,
        r"LRScheduler, got a Wrapper; give its \.scheduler",
    ),
    "a plateau": (
        lrs.ReduceLROnPlateau,
        (3,),
        TypeError,
        r"ReduceLROnPlateau, .* by metrics; .*optax\.contrib\.reduce_on_plateau",
    ),
    "a metric": (NeedsLoss, (3,), TypeError, "NeedsLoss, which steps by loss"),
    "no steps": (
        lambda o: lrs.StepLR(o, 3),
        (0,),
        ValueError,
        r"`steps` must be an integer in \[1, 2³¹\), got 0; give how often",
    ),
    "half a step": (lambda o: lrs.StepLR(o, 3), (1.5,), TypeError, "got 1.5"),
    "True": (lambda o: lrs.StepLR(o, 3), (True,), TypeError, "got True"),
    "too many": (lambda o: lrs.StepLR(o, 3), (2**31,), ValueError, "`steps` must"),
    "no updates": (
        lambda o: lrs.StepLR(o, 3),
        (3, -1),
        ValueError,
        r"`every` must be an integer in \[1, 2³¹\), got -1; give the updates",
    ),
    "past the end": (
        lambda o: lrs.OneCycleLR(o, 0.1, 9),
        (10,),
        ValueError,
        "`steps` must be at most 9, got 10: the scheduler has 9 left, .*; give 9",
    ),
    "another option": (
        OfDecay,
        (3,),
        ValueError,
        "but changes weight_decay of group 0; .*inject_hyperparams",
    ),
    "parameters": (OfParameters, (3,), ValueError, "next one raises KeyError: 'params"),
    "a state": (OfState, (3,), ValueError, "next one raises AttributeError: .*state"),
    "NaN": (
        lambda o: nan_after(o, 2),
        (5,),
        ValueError,
        "`lr` of group 0 must be finite, got nan after 2 steps",
    ),
    "a generator": (uncopyable, (3,), TypeError, "can be copied, got a StepLR: "),
}


@pytest.mark.parametrize(
    ("make", "arguments", "kind", "says"), REFUSED.values(), ids=REFUSED
)
def test_refused(make, arguments, kind, says):
    scheduler = make(rmsprop())
    with pytest.raises(kind, match=says) as error:
        schedule_of(scheduler, *arguments)
    assert len(str(error.value)) < 600


def test_a_scheduler_at_its_end_is_refused():
    scheduler = lrs.OneCycleLR(rmsprop(), 0.1, 9)
    advance(scheduler, 4)
    assert len(schedule_of(scheduler, 5)[0].rates) == 5
    with pytest.raises(ValueError, match="`steps` must be at most 5, got 6"):
        schedule_of(scheduler, 6)
    advance(scheduler, 5)
    with pytest.raises(ValueError, match=r"must have a step left, .*Tried to step 10"):
        schedule_of(scheduler, 1)


def test_a_step_that_is_no_integer_is_refused():
    scheduler = lrs.StepLR(rmsprop(), 3)
    advance(scheduler)
    state = scheduler.optimizer.state[parameters(scheduler.optimizer)[1]]
    state["step"] = torch.tensor(1.5)
    with pytest.raises(ValueError, match=r"`step` of .* must be an integer .*got 1\.5"):
        schedule_of(scheduler, 3)


def test_a_scheduler_may_keep_books_in_its_groups():
    class WithBooks(lrs.LRScheduler):
        def get_lr(self):
            for group in self.optimizer.param_groups:
                group["called"] = group.get("called", 0) + 1
            return [rate / group["called"] for rate in self.base_lrs]

    schedule = schedule_of(WithBooks(rmsprop()), 3)[0]
    np.testing.assert_array_equal(schedule.rates, [0.1, 0.1 / 2, 0.1 / 3])
