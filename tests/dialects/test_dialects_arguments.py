"""The arguments of dialects: taken or refused in their framework's words, and help."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import arrays as arrays_of_float64
from helpers import train
from optax_rmsprop import dialects

NAMES = dialects.__all__
everyone = pytest.mark.parametrize("name", NAMES)


def call(name, /, *args, **kwargs):
    return getattr(dialects, name)(*args, **kwargs)


def parameters(name):
    return inspect.signature(getattr(dialects, name)).parameters


@everyone
def test_an_unknown_argument_names_the_dialect_and_what_it_takes(name):
    text = rf"^dialects\.{name}: .*'warmth'; it takes {', '.join(parameters(name))} \("
    with pytest.raises(TypeError, match=text):
        call(name, 0.1, warmth=1)


@pytest.mark.parametrize("name", ["torch", "mindspore"])
def test_parameters_go_to_init(name):
    with pytest.raises(TypeError, match=r"'params'; it takes .* init takes the param"):
        call(name, params=[jnp.ones(2)])


# The framework's name of each number, and a value out of its range.
OUT_OF_RANGE = {
    "learning_rate": ("learning_rate", "lr", "step_size", "eta"),
    "decay": ("decay", "alpha", "rho", "gamma"),
    "eps": ("eps", "epsilon"),
    "momentum": ("momentum",),
    "weight_decay": ("weight_decay", "wc"),
}
NUMBERS = [
    (name, foreign)
    for name in NAMES
    for foreigns in OUT_OF_RANGE.values()
    for foreign in foreigns
    if foreign in parameters(name)
    # Its decay is of the learning rate; its lr is an alias.
    and (name, foreign) not in {("tf_keras", "decay"), ("tf_keras", "lr")}
]


@pytest.mark.parametrize(("name", "argument"), NUMBERS)
def test_a_number_out_of_range_is_called_by_its_name(name, argument):
    first = next(iter(parameters(name)))
    arguments = {first: 0.1} | {argument: -0.5}
    with pytest.raises(ValueError, match=rf"^dialects\.{name}: `{argument}` must be"):
        call(name, **arguments)


def test_every_dialect_has_numbers_to_check():
    assert {name for name, _ in NUMBERS} == set(NAMES)
    assert len(NUMBERS) > 3 * len(NAMES)


# Dialect, arguments, error, what its text must match.
REFUSED = [
    ("torch", {"alpha": 1.5}, ValueError, r"`alpha` .* \[0, 1\), got 1\.5$"),
    ("torch", {"centered": 1}, TypeError, r"`centered` must be True or False"),
    ("timm", {"caution": True}, ValueError, r"`caution` must be False, .*in the chain"),
    (
        "timm",
        {"corrected_weight_decay": True, "weight_decay": 0.1},
        ValueError,
        r"`corrected_weight_decay` must be False without decoupled_decay",
    ),
    (
        "timm",
        {
            "lr": lambda count: 0.1,
            "decoupled_decay": True,
            "corrected_weight_decay": True,
        },
        TypeError,
        r"`max_lr` must be a number in \(0, inf\), got None; .* its maximum",
    ),
    ("bitsandbytes", {"momentum": 0.9}, ValueError, r"`momentum` .* dialects\.torch"),
    ("bitsandbytes", {"centered": True}, ValueError, r"`centered` .* dialects\.torch"),
    ("bitsandbytes", {"optim_bits": 8}, ValueError, r"`optim_bits` must be 32"),
    ("bitsandbytes", {"args": 1}, ValueError, r"`args` must be None"),
    ("bitsandbytes", {"percentile_clipping": 5}, ValueError, r"clip_by_global_norm"),
    ("bitsandbytes", {"alpha": 0}, ValueError, r"`alpha` .* \(0, 1\), got 0"),
    ("keras", {"clipnorm": 1.0}, ValueError, r"`clipnorm` .*clip_by_global_norm"),
    (
        "keras",
        {"global_clipnorm": 1.0},
        ValueError,
        r"`global_clipnorm` .*_global",
    ),
    ("keras", {"clipvalue": 1.0}, ValueError, r"`clipvalue` .* optax\.clip before"),
    ("keras", {"use_ema": True}, ValueError, r"`use_ema` .*incremental_update"),
    ("keras", {"ema_momentum": 0.9}, ValueError, r"`ema_momentum` .*incremental_up"),
    ("keras", {"ema_overwrite_frequency": 1}, ValueError, r"_frequency` .*increment"),
    ("keras", {"loss_scale_factor": 2.0}, ValueError, r"_factor` .* divide the grad"),
    ("keras", {"gradient_accumulation_steps": 2}, ValueError, r"optax\.MultiSteps"),
    ("tf_keras", {"clipnorm": 1.0}, ValueError, r"`clipnorm` .*clip_by_global_norm"),
    ("tf_keras", {"clipvalue": 1.0}, ValueError, r"`clipvalue` .* optax\.clip before"),
    ("tf_keras", {"global_clipnorm": 1.0}, ValueError, r"`global_clipnorm` .* optax"),
    ("tf_keras", {"decay": 1e-3}, ValueError, r"`decay` must be 0, .* schedule learn"),
    (
        "tf_keras",
        {"momentum": jnp.float32(0.9)},
        TypeError,
        r"`momentum` must be a Python number, .* static_args",
    ),
    ("tf_keras", {"momentum": lambda t: 0.9}, TypeError, r"a Python number, .*epsilon"),
    ("tf_keras", {"momentum": None}, TypeError, r"`momentum` must be a number"),
    ("tf_keras", {"lr": -1}, ValueError, r"`lr` .* got -1; to ascend put optax\.scale"),
    ("tf_keras", {"lr": float}, TypeError, r"`lr` must be a number .* <class 'float'>"),
    (
        "tf_keras",
        {"centered": jnp.array([1, 2])},
        TypeError,
        r"`centered` must be True",
    ),
    ("keras", {"clipnorm": [1] * 10**6}, ValueError, r"`clipnorm` .*clip_by_global_no"),
    ("keras", {"clipnorm": np.zeros((), "V4")}, ValueError, r"`clipnorm` .*clip_by_gl"),
    (
        "keras",
        {"clipnorm": 10**400},
        ValueError,
        r"`clipnorm` .* 1000+ \.\.\. .*clip_by",
    ),
    (
        "torch",
        {"maximize": jnp.array([1, 2])},
        TypeError,
        r"`maximize` must be True or",
    ),
    ("timm", {"max_lr": 0.1}, ValueError, r"`max_lr` .* for corrected_weight_decay"),
    ("timm", {"decoupled_decay": 2}, TypeError, r"`decoupled_decay` must be True or"),
    ("timm", {"corrected_weight_decay": "no"}, TypeError, r"`corrected_.*` must be T"),
    ("optimisers_jl", {"centered": 1}, TypeError, r"`centered` must be True or False"),
    ("keras", {"clipnorm": jnp.float32(1)}, ValueError, r"`clipnorm` .*clip_by_glob"),
    ("keras", {"clipnorm": np.ones(2)}, ValueError, r"`clipnorm` .*clip_by_global_no"),
    (
        "paddle",
        {"learning_rate": 0.1, "grad_clip": 1},
        ValueError,
        r"grad_clip` .*cli",
    ),
    ("mindspore", {"loss_scale": 2.0}, ValueError, r"`loss_scale` must be 1.* divide"),
    ("mindspore", {"epsilon": 0.0}, ValueError, r"`epsilon` .* \(0, inf\), got 0"),
    ("mlx", {"learning_rate": 0.1, "eps": 0.0}, ValueError, r"`eps` .* \(0, inf\)"),
    ("optimisers_jl", {"centred": 1}, TypeError, r"`centred` must be True or False"),
    ("chainer", {"eps_inside_sqrt": 1}, TypeError, r"`eps_inside_sqrt` must be True"),
    ("graves2013", {"alpha": 0.0}, ValueError, r"`alpha` .* \(0, 1\), .* variance 0"),
    (
        "optax",
        {"learning_rate": 0.1, "nesterov": True},
        ValueError,
        r"`nesterov` must be False without momentum",
    ),
]


@pytest.mark.parametrize(
    ("name", "arguments", "error", "text"),
    REFUSED,
    ids=[f"{name}-{'-'.join(arguments)}" for name, arguments, *_ in REFUSED],
)
def test_what_is_not_reproduced_is_refused(name, arguments, error, text):
    with pytest.raises(error, match=rf"^dialects\.{name}: .*{text}") as raised:
        call(name, **arguments)
    assert len(str(raised.value)) <= 600


SCHEDULED = [
    row
    for row in NUMBERS
    if row[1] in OUT_OF_RANGE["learning_rate"] + ("weight_decay", "wc")
] + [("tf_keras", "lr")]


@pytest.mark.parametrize(("name", "argument"), SCHEDULED)
def test_a_schedule_is_called_by_its_name(name, argument):
    first = next(iter(parameters(name)))
    tx = call(name, **{first: 0.1} | {argument: lambda count: None})
    p = jnp.ones(2)
    with pytest.raises(TypeError, match=rf"^`{argument}` must be .* got None from its"):
        tx.update(p, tx.init(p), p)


def test_a_corrected_decay_of_two_schedules():
    for argument in ("lr", "weight_decay"):
        schedules = {"lr": lambda count: 0.1, "weight_decay": lambda count: 0.1}
        tx = dialects.timm(
            **schedules | {argument: lambda count: "x"},
            decoupled_decay=True,
            **CORRECTED,
            max_lr=0.1,
        )
        p = jnp.ones(2)
        with pytest.raises(TypeError, match=rf"^`{argument}` must be .* got 'x' from"):
            tx.update(p, tx.init(p), p)


def test_refused_under_inject_hyperparams_too():
    tx = optax.inject_hyperparams(dialects.bitsandbytes)(momentum=lambda count: 0.9)
    with pytest.raises(ValueError, match=r"`momentum` must be 0, .* dialects\.torch"):
        tx.init(jnp.ones(2))


# Options that choose how a framework executes, and its labels.
WITHOUT_EFFECT = [
    ("torch", {"foreach": True, "capturable": True, "differentiable": True}),
    ("timm", {"foreach": False}),
    ("bitsandbytes", {"min_8bit_size": 1, "block_wise": False}),
    ("tensorflow", {"use_locking": True, "name": "opt"}),
    ("tf_keras", {"name": "opt"}),
    ("keras", {"name": "opt"}),
    ("paddle", {"name": "opt"}),
    ("mindspore", {"use_locking": True}),
]


@pytest.mark.parametrize(("name", "arguments"), WITHOUT_EFFECT)
@pytest.mark.usefixtures("x64")
def test_options_of_execution_change_nothing(name, arguments):
    run = arrays_of_float64(3)
    with_them = train(call(name, 0.1, **arguments), *run)[0]
    without = train(call(name, 0.1), *run)[0]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, with_them, without))


MASKED = [name for name in NAMES if "weight_decay_mask" in parameters(name)]


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.usefixtures("x64")
def test_a_mask_chooses_what_decays(name):
    params, gradients = arrays_of_float64(3)
    decay = "wc" if name == "dqn2015" else "weight_decay"
    mask = {"matrix": True, "scalar": False, "empty": True}
    masked = train(
        call(name, 0.1, **{decay: 0.1}, weight_decay_mask=mask), params, gradients
    )[0]
    full = train(call(name, 0.1, **{decay: 0.1}), params, gradients)[0]
    none = train(call(name, 0.1), params, gradients)[0]
    assert jnp.array_equal(masked["matrix"], full["matrix"])
    assert jnp.array_equal(masked["scalar"], none["scalar"])
    assert not jnp.array_equal(full["scalar"], none["scalar"])


def test_every_decay_has_a_mask():
    assert len(MASKED) > 0
    decays = {n for n in NAMES if parameters(n).keys() & {"weight_decay", "wc"}}
    assert decays == set(MASKED)


@pytest.mark.parametrize(
    "epsilon", [0, 0.0, None, np.float32(0), np.array(0.0), jnp.float32(0)], ids=repr
)
def test_tf_keras_takes_no_epsilon_for_its_default(epsilon):
    g = jnp.array([1e-7, 1.0])
    tx, default = dialects.tf_keras(epsilon=epsilon), dialects.tf_keras(lr=0.001)
    assert jnp.array_equal(
        tx.update(g, tx.init(g))[0], default.update(g, default.init(g))[0]
    )


def after_a_step_without_gradient(make, lr, **options):
    """A parameter of 1, which only weight decay moves."""
    tx = make(lr, weight_decay=0.5, decoupled_decay=True, **options)
    p, g = jnp.ones(()), jnp.zeros(())
    state = tx.init(p)
    updates, _ = tx.update(g, state, p)
    return float(p + updates)


def injected(lr, **options):
    return optax.inject_hyperparams(dialects.timm)(lr=lr, **options)


CORRECTED = {"corrected_weight_decay": True}


@pytest.mark.parametrize(
    ("lr", "options", "shrunk"),
    [
        (0.1, {}, 0.5 * 0.1),
        (0.1, CORRECTED, 0.5 * 0.1),  # timm: lr²/lr
        (0.1, CORRECTED | {"max_lr": 0.2}, 0.5 * 0.1**2 / 0.2),
        (lambda count: 0.1, CORRECTED | {"max_lr": 0.2}, 0.5 * 0.1**2 / 0.2),
        (jnp.float32(0.1), CORRECTED | {"max_lr": 0.2}, 0.5 * 0.1**2 / 0.2),
    ],
)
def test_timm_corrects_by_the_largest_learning_rate(lr, options, shrunk):
    for make in (dialects.timm, injected):
        if make is injected and options == CORRECTED:
            continue  # a learning rate that changes: refused, below
        after = after_a_step_without_gradient(make, lr, **options)
        assert after == pytest.approx(1 - shrunk, rel=1e-6)


@pytest.mark.parametrize("max_lr", [None, 0.0, -1.0, "x"])
def test_timm_needs_the_largest_learning_rate(max_lr):
    with pytest.raises((TypeError, ValueError), match=r"`max_lr` must be a number in"):
        after_a_step_without_gradient(injected, 0.1, **CORRECTED, max_lr=max_lr)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"tf_keras"}))
def test_under_inject_hyperparams_and_jit(name):
    learning_rate, *_ = parameters(name)
    tx = optax.inject_hyperparams(getattr(dialects, name))(**{learning_rate: 0.1})
    g = jnp.array([1.0, -2.0])
    state = tx.init(g)
    updates, _ = jax.jit(tx.update)(g, state, g)
    alone = call(name, 0.1)
    expected, _ = alone.update(g, alone.init(g), g)
    assert jnp.allclose(updates, expected, rtol=1e-6)
    assert state.hyperparams[learning_rate] == jnp.float32(0.1)


@everyone
def test_help_numbers_the_differences_and_names_the_evidence(name):
    text = inspect.getdoc(getattr(dialects, name))
    differences = text.split("\nDiffers from torch's")[1].split("\n\n")[0]
    numbers = re.findall(r"^  (\d)\. ", differences, re.M)
    assert numbers == [str(i + 1) for i in range(len(numbers))] != []
    assert re.search(r"^(Run|Not run): ", text, re.M)


@everyone
def test_help_explains_every_argument(name):
    text = inspect.getdoc(getattr(dialects, name)).split("\nArgs:\n")[1]
    entries = re.findall(r"^  (\w[\w, \n]*): ", text.split("\n\n")[0], re.M)
    explained = [argument for entry in entries for argument in re.split(r",\s+", entry)]
    assert sorted(explained) == sorted(parameters(name))
