"""docs/dialects.md says what the dialects do: its tables, settings and figure."""

import contextlib
import inspect
import json
import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_dialects import RECORDED, TRANSCRIBED, settings_of

import optax_rmsprop
from optax_rmsprop import dialects, rmsprop
from peers.record import FRAMEWORKS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "dialects.md").read_text()
REFUSED = (TypeError, ValueError)
DEFAULTS = inspect.signature(rmsprop).parameters


def tables():
    """Rows of cells, by the table's header; every row has the header's length."""
    for lines in re.findall(r"^\|.*\n\|[-|]+\n(?:\|.*\n)+", PAGE, re.M):
        header, _, *rows = [
            [cell.strip() for cell in line.strip("|\n").split("|")]
            for line in lines.splitlines()
        ]
        assert {len(row) for row in rows} == {len(header)}
        yield tuple(header), rows


TABLES = dict(tables())
SWITCHES = TABLES[
    "dialect", "is", "epsilon", "start", "learning rate", "weight decay", "centered"
]
CALLS = TABLES["call", "learning rate", "decay", "epsilon", "momentum", "held to"]
SLOTS = TABLES["dialect", "average of g²", "average of g", "momentum"]
SETTINGS = TABLES["setting", "of", "source"]


def named(rows, name):
    """The only row of this name, in code or as a call, without the name."""
    found = [
        row[1:]
        for row in rows
        if re.fullmatch(rf"`(dialects\.)?{name}(\(.*\))?`", row[0])
    ]
    assert len(found) == 1
    return found[0]


def names(rows):
    return [re.match(r"`(?:dialects\.)?(\w+)", row[0])[1] for row in rows]


def parameters(name):
    return inspect.signature(getattr(dialects, name)).parameters


def given(name, **case):
    """All that the dialect gives to rmsprop, or None if it refuses the case."""
    try:
        seen = settings_of(name, case)
    except REFUSED:
        return None
    return {key: seen.get(key, p.default) for key, p in DEFAULTS.items()}


def root(settings):
    return "under" if settings["eps_in_sqrt"] else "outside"


def buffer(settings):
    return "inside" if settings["lr_in_momentum"] else "outside"


def decay_of_weights(settings):
    return "decoupled" if settings["decoupled_weight_decay"] else "L2"


def other(value, name, option, describe, **case):
    """The value, or what the option turns it into where the dialect has it."""
    if option not in parameters(name):
        return value
    flipped = not parameters(name)[option].default
    return f"{value} or {describe(given(name, **case, **{option: flipped}))}"


def epsilon(name):
    cell = other(root(given(name)), name, "eps_in_sqrt", root)
    cell = other(cell, name, "eps_inside_sqrt", root)
    moving = with_momentum(name)
    if moving and root(moving) != root(given(name)):
        cell += f"; {root(moving)} with momentum"
    return cell


def start(name):
    value = f"{given(name)['initial_scale']:g}"
    if "initial_scale" in parameters(name):
        assert given(name, initial_scale=0.5)["initial_scale"] == 0.5
        value += " or any"
    return value


def with_momentum(name):
    return given(name, momentum=0.9) if "momentum" in parameters(name) else None


def learning_rate(name):
    settings = with_momentum(name)
    if settings is None:
        assert not given(name)["momentum"]
        return "no momentum"
    assert settings["momentum"] == 0.9
    return other(buffer(settings), name, "lr_in_momentum", buffer, momentum=0.9)


def weight_decay(name):
    argument = {"weight_decay", "wc"} & set(parameters(name))
    if not argument:
        assert not given(name)["weight_decay"]
        return "none"
    case = {argument.pop(): 0.1}
    assert given(name, **case)["weight_decay"] == 0.1
    kinds = [decay_of_weights(given(name, **case))]
    if "decoupled_decay" in parameters(name):
        kinds.append(decay_of_weights(given(name, **case, decoupled_decay=True)))
    if "corrected_weight_decay" in parameters(name):
        corrected = {"decoupled_decay": True, "corrected_weight_decay": True}
        assert callable(given(name, **case, **corrected, max_lr=1.0)["weight_decay"])
        kinds.append("corrected")
    return " or ".join([", ".join(kinds[:-1])] * (len(kinds) > 1) + kinds[-1:])


def centered(name):
    for option in {"centered", "centred"} & set(parameters(name)):
        settings = given(name, **{option: True})
        return "option" if settings and settings["centered"] else "never"
    return "always" if given(name)["centered"] else "never"


def held_to(name):
    evidence = []
    if name in FRAMEWORKS:
        package = FRAMEWORKS[name][1][0]
        record = json.loads((RECORDED / f"{name}.json").read_text())
        version = record["versions"][package].split("+")[0]
        of_another = name in ("graves2013", "jax_example_libraries")
        evidence.append(
            f"run, {package} {version}" if of_another else f"run, {version}"
        )
    if name in TRANSCRIBED:
        evidence.append("transcription")
    return "; ".join(evidence)


def test_every_dialect_has_one_row_in_each_table():
    for rows in (SWITCHES, CALLS, SLOTS):
        assert names(rows) == dialects.__all__


@pytest.mark.parametrize("name", dialects.__all__)
def test_switches(name):
    actual = [
        describe(name)
        for describe in (epsilon, start, learning_rate, weight_decay, centered)
    ]
    assert named(SWITCHES, name)[1:] == actual


@pytest.mark.parametrize("name", dialects.__all__)
def test_classes_are_named_in_the_docstring(name):
    text = inspect.getdoc(getattr(dialects, name))
    for path in re.findall(r"`([\w.]+)`", named(SWITCHES, name)[0]):
        assert path.split(".")[-1] in text


ROLES = {
    "decay": ["alpha", "rho", "gamma", "decay"],
    "eps": ["eps", "epsilon"],
    "momentum": ["momentum"],
}


@pytest.mark.parametrize("name", dialects.__all__)
def test_defaults(name):
    lr_cell, *cells, evidence = named(CALLS, name)
    lr = next(iter(parameters(name).values()))
    if lr.default is lr.empty:
        assert re.fullmatch(r"\*[\d.e-]+\*", lr_cell)
    else:
        assert float(lr_cell) == lr.default
    for (role, words), cell in zip(ROLES.items(), cells, strict=True):
        value = float(cell.removeprefix("fixed "))
        assert value == (given(name)[role] or 0)
        # tf_keras has a `decay` of the learning rate too, after its rho.
        argument = next((word for word in words if word in parameters(name)), None)
        fixed = argument is None or given(name, **{argument: 0.5}) is None
        assert fixed == cell.startswith("fixed ")
        if not fixed:
            assert value == (parameters(name)[argument].default or 0)
    assert evidence == held_to(name)


@pytest.mark.parametrize("name", dialects.__all__)
def test_calls_write_out_the_defaults_and_run(name):
    (call,) = [row[0].strip("`") for row in CALLS if name in names([row])]
    with spied() as seen:
        tx = eval(call, {"dialects": dialects})
    lr = float(named(CALLS, name)[0].strip("*"))
    expected = given(name) | {"learning_rate": lr}
    assert seen == [expected]
    shown = set(re.findall(r"\w+(?==)", call))
    for words, cell in zip(ROLES.values(), named(CALLS, name)[1:4], strict=True):
        assert bool(shown & set(words)) == (cell != "0" and "fixed" not in cell)
    trained(tx, 1)


@pytest.mark.parametrize("name", dialects.__all__)
def test_slots_are_those_it_can_have(name):
    squares, means, momenta = named(SLOTS, name)
    assert re.fullmatch(r"`\w+`", squares)
    assert (means == "none") == (centered(name) == "never")
    assert (momenta == "none") == (learning_rate(name) == "no momentum")


def test_slots_of_optax():
    """And that its trace has the other sign. The others' names are not checked here."""
    squares, mean, momentum = (
        re.sub("[`,].*", "", c[1:]) for c in named(SLOTS, "optax")
    )
    tx = optax.rmsprop(0.1, centered=True, momentum=0.9)
    params = jnp.ones(2)
    _, state = tx.update(params, tx.init(params))
    assert all(optax.tree.get(state, slot) is not None for slot in (squares, mean))
    assert jnp.all(optax.tree.get(state, momentum) < 0)
    assert "negative" in named(SLOTS, "optax")[2]


def defaults():
    return {key: p.default for key, p in DEFAULTS.items()}


@contextlib.contextmanager
def spied():
    """What is given to rmsprop meanwhile, and what stands in front of it."""
    seen, front = [], {}

    def spy(*args, **kwargs):
        settings = inspect.signature(rmsprop).bind(*args, **kwargs).arguments
        seen.append({**defaults(), **settings, **front})
        try:
            return rmsprop(*args, **kwargs)
        finally:  # rmsprop itself uses optax.add_decayed_weights
            front.clear()

    def noted(name):
        original = getattr(optax, name)

        def noting(value, *args):
            front[name] = value
            return original(value, *args)

        return noting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optax_rmsprop, "rmsprop", spy)
        for name in ("add_decayed_weights", "clip", "clip_by_global_norm"):
            patch.setattr(optax, name, noted(name))
        for name in dialects.__all__:
            module = sys.modules[getattr(dialects, name).__module__]
            patch.setattr(module, "rmsprop", spy)
        yield seen


def trained(tx, steps):
    """The parameters before and after some updates."""
    old = {"kernel": jnp.full((2, 3), 0.5), "BatchNorm": {"scale": jnp.ones(3)}}
    new, state = old, tx.init(old)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 0.1), old)
    # optax's exponential_decay divides an integer by a float.
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            updates, state = tx.update(grads, state, new)
            new = optax.apply_updates(new, updates)
    assert jax.tree.all(jax.tree.map(lambda p: bool(jnp.isfinite(p).all()), new))
    return old, new


def settings_in(section):
    """By name, each setting in its code and what it gives to rmsprop."""
    found = {}
    for code in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S):
        scope = {}
        with spied() as seen:
            exec(compile(code, "docs", "exec"), scope)
        settings = {}
        for name, value in scope.items():
            if isinstance(value, optax.GradientTransformation):
                settings.setdefault(value, name)  # not of a loop over them
        for (value, name), one in zip(settings.items(), seen, strict=True):
            assert name not in found
            found[name] = value, one
    return found


PUBLISHED = settings_in(PAGE.split("\n## Published settings\n")[1].split("\n## ")[0])


def test_every_published_setting_is_in_the_table():
    assert names(SETTINGS) == list(dict.fromkeys(names(SETTINGS)))
    assert set(names(SETTINGS)) == PUBLISHED.keys()
    for row in SETTINGS:
        assert "`" in row[2]  # a file


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_train(name):
    old, new = trained(PUBLISHED[name][0], 2)
    assert jnp.all(new["kernel"] < old["kernel"])


# Copied from the sources by themselves: decay, eps, momentum, centered, start, and eps
# under the root; then learning rates after so many updates.
TF = {"initial_scale": 1, "eps_in_sqrt": True, "lr_in_momentum": True}
LIKE_TORCH = {"initial_scale": 0, "eps_in_sqrt": False, "lr_in_momentum": False}
EXPECTED = {
    "efficientnet": (
        {"decay": 0.9, "eps": 1e-3, "momentum": 0.9, **TF},
        # Warm-up of 3127 updates, which ends in the third stair of 1501.4.
        {0: 0, 1000: 0.128 * 1000 / 3127, 3127: 0.128 * 0.97**2, 6005: 0.128 * 0.97**3},
    ),
    "mnasnet": (
        {"decay": 0.9, "eps": 1e-3, "momentum": 0.9, **TF},
        {0: 0, 6254: 0.064 * 6254 / 6255, 6256: 0.064 * 0.97**2},
    ),
    "inception_v3": (
        {"decay": 0.9, "eps": 1, "momentum": 0.9, **TF},
        {0: 0.66, 3752: 0.66, 3753: 0.66 * 0.94, 10**6: 0.66e-4},
    ),
    "inception_v4": (
        {"decay": 0.9, "eps": 1, "momentum": 0.9, **TF},
        {
            0: 0.001,
            5004: 0.001,
            5005: 0.15 / 0.94**1.5 / 3,
            10010: 0.15 / 0.94**1.5 * 2 / 3,
            15014: 0.15 / 0.94**0.5,
            20018: 0.15 * 0.94**0.5,
            10**7: 0.15e-4 / 0.94**1.5,
        },
    ),
    "mobilenet_v1": (
        {"decay": 0.9, "eps": 1, "momentum": 0.9, **TF},
        {0: 0.66, 3752: 0.66, 3753: 0.66 * 0.94},
    ),
    "mobilenet_v2": (
        {"decay": 0.9, "eps": 1, "momentum": 0.9, **TF},
        {0: 0.045, 33362: 0.045, 33363: 0.045 * 0.98},
    ),
    "mobilenet_v3": (
        {"decay": 0.9, "eps": 0.0316, "momentum": 0.9, "weight_decay": 1e-5}
        | LIKE_TORCH,
        {0: 0.064, 2503: 0.064, 2504: 0.064 * 0.973},
    ),
    "amoebanet": (
        {"decay": 0.9, "eps": 1, "momentum": 0.9, **TF},
        {0: 1.5e-6, 60054: 0.0075, 120108: 0.015 * 0.97, 10**8: 1.5e-6},
    ),
    "impala": (
        {"decay": 0.99, "eps": 0.1, "momentum": 0, **TF},
        {0: 0.00048, 625_000: 0.00024, 1_250_000: 0},
    ),
    "dqn": (
        {"decay": 0.95, "eps": 0.01, "centered": True, "eps_in_sqrt": True},
        {0: 0.00025},
    ),
    "dopamine": (
        {"decay": 0.95, "eps": 1e-5, "momentum": 0, "centered": True, **TF},
        {0: 0.00025},
    ),
    "dqn_zoo": (
        {"decay": 0.95, "eps": 0.01 / 1024, "centered": True, "eps_in_sqrt": True},
        {0: 0.00025},
    ),
    "a2c": ({"decay": 0.99, "eps": 1e-5, "momentum": 0, **LIKE_TORCH}, {0: 7e-4}),
    "a2c_like_tensorflow": (
        {"decay": 0.99, "eps": 1e-5, "initial_scale": 1, "eps_in_sqrt": True},
        {0: 7e-4},
    ),
    "dpo": (
        {"decay": 0.99, "eps": 1e-8, "momentum": 0, "weight_decay": 0, **LIKE_TORCH},
        {0: 5e-7 / 151, 75: 5e-7 * 76 / 151, 149: 5e-7 * 150 / 151, 10**6: 5e-7},
    ),
}


FRONT = {
    "efficientnet": {"add_decayed_weights": 1e-5},
    "mnasnet": {"add_decayed_weights": 1e-5},
    "inception_v3": {"add_decayed_weights": 4e-5},
    "inception_v4": {"add_decayed_weights": 4e-5},
    "mobilenet_v1": {"add_decayed_weights": 4e-5},
    "mobilenet_v2": {"add_decayed_weights": 4e-5},
    "amoebanet": {"add_decayed_weights": 4e-5, "clip_by_global_norm": 10},
    "a2c": {"clip_by_global_norm": 0.5},
    "a2c_like_tensorflow": {"clip_by_global_norm": 0.5},
    "dpo": {"clip_by_global_norm": 10},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    settings, rates = EXPECTED[name]
    actual = PUBLISHED[name][1]
    assert {key: actual[key] for key in settings} == settings
    front = {key: value for key, value in actual.items() if key not in DEFAULTS}
    assert front == FRONT.get(name, {})
    lr = actual["learning_rate"]
    with jax.numpy_dtype_promotion("standard"):
        got = [lr(jnp.asarray(n)) if callable(lr) else lr for n in rates]
    np.testing.assert_allclose(np.array(got, float), list(rates.values()), rtol=1e-4)


def test_weight_decay_spares_batch_norm():
    """Where it stands in front of the dialect; torchvision decays all."""
    decaying = [name for name in FRONT if "add_decayed_weights" in FRONT[name]]
    assert len(decaying) == 7
    for name in decaying:
        tx = PUBLISHED[name][0]
        params = {"kernel": jnp.ones((2, 2)), "BatchNorm_0": {"scale": jnp.ones(2)}}
        zero = jax.tree.map(jnp.zeros_like, params)
        state = tx.init(params)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(2):
                updates, state = tx.update(zero, state, params)
        assert jnp.all(updates["kernel"] < 0)
        assert jnp.all(updates["BatchNorm_0"]["scale"] == 0)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_weight_decay_spares_depthwise_kernels_in_slim(name):
    tx = PUBLISHED[name][0]
    params = {name: {"kernel": jnp.ones((3, 3))} for name in ("pointwise", "depthwise")}
    zero = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(zero, tx.init(params), params)
    assert jnp.all(updates["pointwise"]["kernel"] < 0)
    assert jnp.all(updates["depthwise"]["kernel"] == 0)


def test_the_figure_s_losses():
    """Other processors round otherwise, which training amplifies: hence 15 %."""
    figure = runpy.run_path(str(DOCS / "figures" / "five_dialects.py"))
    rows = TABLES["updates", *map(str, figure["SHOWN"])]
    assert names(rows) == list(figure["DIALECTS"])
    for name in ("torch", "timm"):  # two of five, for time
        curve = figure["losses"](figure["DIALECTS"][name])
        shown = [float(cell) for cell in named(rows, name)]
        np.testing.assert_allclose(curve[list(figure["SHOWN"])], shown, rtol=0.15)
