"""docs/parameters.md is true: its sections, its numbers, its figures."""

import importlib
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from test_dialects import settings_of

from optax_rmsprop import diagnose, dialects, rmsprop

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "parameters.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
NAMES = {name: title for title in SECTIONS for name in re.findall(r"`(\w+)`", title)}
IMAGE = r"^!\[([^]]+)\]\(figures/(parameters_(\w+)\.png)\)\n\n\*([^*]+)\*$"
FIGURES = re.findall(IMAGE, PAGE, re.M)
SCRIPTS = ("parameters", "parameters_average", "parameters_momentum")


def section(name):
    return " ".join(SECTIONS[NAMES[name]].split())


def says(name, text):
    """Checks that the section has these words, and passes their numbers on."""
    assert text in section(name)
    return [float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?", text)]


def test_every_argument_has_its_section():
    arguments = list(inspect.signature(rmsprop).parameters)
    in_titles = re.findall(r"`(\w+)`", " ".join(SECTIONS))
    assert sorted(in_titles) == sorted(arguments)


@pytest.mark.parametrize("name", NAMES)
def test_sections_have_the_same_parts(name):
    text = SECTIONS[NAMES[name]]
    parts = re.findall(r"^(?:- )?\*\*(.+?)\.\*\*", text, re.M)
    assert parts == ["What it does", "Range to try", "Common mistake", "Elsewhere"]
    assert text.count("\n$$ ") >= 1
    assert len(re.findall(r"^!\[", text, re.M)) == (name != "maximize")


def test_figures_exist_and_captions_name_what_draws_them(modules):
    assert len(FIGURES) == PAGE.count("![")
    files = {path.name for path in DOCS.glob("figures/parameters_*.png")}
    assert files == {file for _, file, _, _ in FIGURES}
    for _, _, name, caption in FIGURES:
        script = re.search(r"Made\s+by\s+`python docs/figures/(\w+)\.py`\.$", caption)[
            1
        ]
        assert name in modules[script].FIGURES


# Numbers small enough to run in a second or two.
SMALL = {
    "valley": {"updates": 5},
    "learning_rate": {"updates": 8, "window": 4},
    "eps": {"updates": 3, "sizes": 4},
    "decay": {"updates": 30, "numbers": 4},
    "eps_in_sqrt": {"sizes": 4},
    "initial_scale": {"updates": 5},
    "bias_correction": {"updates": 5},
    "centered": {"updates": 6, "ratios": 3, "numbers": 2},
    "accumulator_dtype": {"updates": 6, "numbers": 4096},
    "momentum": {"updates": 5, "trained": 3},
    "lr_in_momentum": {"updates": 30},
    "nesterov": {"updates": 5},
    "weight_decay": {"updates": 5, "rest": 5, "numbers": 3},
}


@pytest.fixture(scope="module")
def modules():
    """The scripts that draw the figures, whose style ends with this module."""
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context():
        patch.syspath_prepend(DOCS / "figures")
        yield {name: importlib.import_module(name) for name in SCRIPTS}


@pytest.mark.parametrize("name", SMALL)
def test_figures_can_be_drawn(modules, name):
    (draw,) = [m.FIGURES[name] for m in modules.values() if name in m.FIGURES]
    figure = draw(**SMALL[name])
    lines = [line for axes in figure.axes for line in axes.lines]
    plt.close(figure)
    drawn = [np.asarray(line.get_ydata(), float) for line in lines]
    assert drawn
    assert all(np.isfinite(y).all() for y in drawn)


def test_every_figure_is_tried():
    assert sorted(SMALL) == sorted(name for _, _, name, _ in FIGURES)


def steps(gradients, lr=1.0, start=0.0, **settings):
    """How far down each gradient moves a parameter."""
    tx = rmsprop(lr, **settings)

    def step(carry, g):
        p, state = carry
        updates, state = tx.update(g, state, p)
        return (p + updates, state), -updates

    gradients = jnp.asarray(gradients, jnp.float32)
    p = jnp.full(gradients.shape[1:], start)
    return np.asarray(jax.lax.scan(step, (p, tx.init(p)), gradients)[1])


def test_the_loss_can_be_rescaled():
    assert "near 1000 or near 0.001" in PAGE
    g = np.random.default_rng(0).normal(size=50)
    small, large = steps(0.001 * g, eps=0), steps(1000 * g, eps=0)
    np.testing.assert_allclose(small, large, rtol=1e-5)
    assert np.abs(steps(0.001 * g, eps=1e-3) - large).max() > 0.1


def test_steps_of_torch_s_default():
    first, late = says(
        "learning_rate",
        "moves by up to 0.1 in the first update and still by about 0.01 in the",
    )
    moved = steps(np.ones(100), lr=0.01)
    assert moved[0] == pytest.approx(first, rel=1e-5)
    assert moved[-1] == pytest.approx(late, rel=0.3)


def test_rmsprop_rescales_parameters_not_directions(modules):
    descent, turned = modules["parameters"].descent, modules["parameters"].turned
    left = {}
    for degrees in (0, 45):
        turn = turned(degrees)
        curvature = jnp.asarray(turn @ np.diag([1, 100]) @ turn.T, jnp.float32)
        for name, tx in (("SGD", optax.sgd(0.018)), ("RMSprop", rmsprop(0.1, 0.9))):
            path = descent(tx, lambda p, c=curvature: c @ p, turn @ (-3, 0.8), 50)
            left[name, degrees] = float(np.hypot(*path[-1]))
    assert left["SGD", 0] == pytest.approx(left["SGD", 45], rel=1e-3)
    assert left["SGD", 0] > 1
    assert left["RMSprop", 0] < 0.1
    assert left["RMSprop", 45] > 0.8 * left["SGD", 45]


def test_factors_differ_and_steps_do_not(modules):
    """Between the quantiles of 10 and 90 %, in the first layer."""
    factors, changes = modules["parameters"].training(
        rmsprop(1e-3),
        lambda _, changes, state: (diagnose(state).step_size["in"], changes["in"]),
        100,
    )
    low, high = np.quantile(factors[-1], (0.1, 0.9))
    assert high > 30 * low
    lengths = np.sqrt(np.mean(np.square(changes[60:]), 0))
    low, high = np.quantile(lengths, (0.1, 0.9))
    assert high < 4 * low


def test_the_longest_step():
    numbers = says("decay", "3.2 at 0.9, 10 at 0.99, 31.6 at 0.999")
    spike = np.zeros(20)
    spike[10] = 5
    for longest, decay in np.reshape(numbers, (-1, 2)):
        assert steps(spike, decay=decay, eps=0).max() == pytest.approx(longest, 0.02)


def test_the_noise_of_the_divisor(modules):
    numbers = says("decay", "16 % at 0.9, 5 % at 0.99, 1.6 % at 0.999")
    for percent, decay in np.reshape(numbers, (-1, 2)):
        formula = np.sqrt((1 - decay) / (2 + 2 * decay))
        assert 100 * formula == pytest.approx(percent, rel=0.02)
    noise = modules["parameters_average"].noise
    # 512 * 100 squares, of which a tenth are independent: 1 % of error.
    assert noise(0.9, 200, 512) == pytest.approx(np.sqrt(0.1 / 3.8), rel=0.07)


def test_eps_halves_steps_and_has_the_unit_of_the_gradient():
    (times, _) = says(
        "eps", "eps has to be 32 times as large for the same steps. (Here, `eps=0`"
    )
    assert steps(np.full(300, 1e-3), decay=0.9, eps=1e-3)[-1] == pytest.approx(0.5)
    g = np.random.default_rng(0).normal(size=50)
    mean, total = steps(g, eps=0.1), steps(times * g, eps=times * 0.1)
    np.testing.assert_allclose(mean, total, rtol=1e-5)
    assert steps(np.zeros(3), eps=0).tolist() == [0, 0, 0]


def test_eps_under_the_root():
    g = np.geomspace(1e-6, 1e-2, 41)
    steady = np.tile(g, (300, 1))
    outside = steps(steady, decay=0.9, eps=1e-4)[-1]
    square = steps(steady, decay=0.9, eps=1e-8, eps_in_sqrt=True)[-1]
    assert "$\\sqrt{2}$ at most, where $|g| = \\varepsilon$" in section("eps_in_sqrt")
    assert (square / outside).max() == pytest.approx(2**0.5, rel=1e-4)
    assert g[(square / outside).argmax()] == pytest.approx(1e-4)
    gradient, eps, left, percent = says(
        "eps_in_sqrt",
        "gradients of 1e-4, 1e-8 under the root already shortens steps to 0.7 learning "
        "rates, outside by 0.01 %",
    )
    steady = np.full(300, gradient)
    under = steps(steady, decay=0.9, eps=eps, eps_in_sqrt=True)[-1]
    assert under == pytest.approx(left, rel=0.02)
    outside = steps(steady, decay=0.9, eps=eps)[-1]
    assert 1 - outside == pytest.approx(percent / 100, rel=0.05)
    assert np.sqrt(0.001) == pytest.approx(0.0316, rel=1e-3)


def test_momentum_lengthens_steps():
    (times,) = says("momentum", "steps here are 10 times as long")
    moved = steps(np.ones(200), momentum=0.9, bias_correction=True)
    assert moved[-1] == pytest.approx(times, rel=1e-5)


def test_momentum_wants_a_smaller_learning_rate(modules):
    """On digits, loss after 100 updates."""
    plain, same, tenth = (
        modules["parameters"].training(tx, modules["parameters_momentum"].loss, 100)[-1]
        for tx in (
            rmsprop(1e-3),
            rmsprop(1e-3, momentum=0.9),
            rmsprop(1e-4, momentum=0.9),
        )
    )
    assert tenth == pytest.approx(float(plain), rel=0.2)
    assert same < 0.4 * plain


def test_a_change_of_the_learning_rate_arrives_late():
    (updates,) = says(
        "lr_in_momentum", "it is twice as long as it should be 20 updates after a fall"
    )

    def schedule(count):
        return jnp.where(count < 200, 1.0, 0.1)

    settings = {"momentum": 0.9, "bias_correction": True}
    outside = steps(np.ones(300), schedule, **settings)
    inside = steps(np.ones(300), schedule, lr_in_momentum=True, **settings)
    assert outside[200] == pytest.approx(1, rel=1e-4)
    assert inside[199 + int(updates)] / outside[-1] == pytest.approx(2, rel=0.06)
    same = steps(np.ones(300), lr_in_momentum=True, **settings)
    np.testing.assert_allclose(same, steps(np.ones(300), **settings), rtol=1e-6)


def test_the_weights_of_nesterov():
    m, newest = says("nesterov", "with momentum 0.9: 1.9 for the newest")
    impulse = np.eye(200)[0]
    ahead = steps(impulse, decay=0, eps=0, momentum=m, nesterov=True)
    plain = steps(impulse, decay=0, eps=0, momentum=m)
    assert ahead[0] == pytest.approx(newest)
    np.testing.assert_allclose(ahead[1:], m * plain[1:], rtol=1e-5)
    np.testing.assert_allclose([ahead.sum(), plain.sum()], 1 / (1 - m), rtol=1e-5)
    with pytest.raises(ValueError, match="without momentum"):
        rmsprop(nesterov=True)


def test_centered_steps_grow():
    tenfold, decay, after, length = says(
        "centered",
        "the step grows tenfold every 460 updates with decay 0.99: after 920 it is 100",
    )
    moved = steps(np.ones(1500), decay=decay, centered=True)
    assert moved[int(after) - 1] == pytest.approx(length, rel=0.05)
    ratio = moved[int(after) - 1] / moved[int(after - tenfold) - 1]
    assert ratio == pytest.approx(10, rel=0.05)
    bounded = steps(np.ones(1500), centered=True, eps=0.01)
    assert 90 < bounded.max() < 100


def test_where_weights_come_to_rest(modules):
    assert "$\\sqrt{\\eta s / (2 \\lambda)}$" in section("weight_decay")
    noisy = modules["parameters_momentum"].noisy
    sizes, lr, decay = np.array([1.0, 4.0]), 0.05, 0.5
    spread = {}
    for decoupled in (False, True):
        tx = rmsprop(lr, weight_decay=decay, decoupled_weight_decay=decoupled)
        spread[decoupled] = noisy(tx, sizes, 1000, 500, 0.0)[0].std(1)
    # A spread of 500 is known to 3 %; the pull adds to the root.
    np.testing.assert_allclose(
        spread[False], np.sqrt(lr * sizes / 2 / decay), rtol=0.12
    )
    np.testing.assert_allclose(spread[True], np.sqrt(lr / 2 / decay), rtol=0.12)


def test_l2_without_any_other_gradient():
    weak, strong = says("weight_decay", "per update, with 1e-4 as with 1e-2, until eps")
    settings = {"lr": 1e-3, "start": 1.0, "eps": 0}
    none = np.zeros(300)
    moved = steps(none, weight_decay=weak, **settings)
    np.testing.assert_allclose(
        moved, steps(none, weight_decay=strong, **settings), 1e-4
    )
    assert moved[-1] == pytest.approx(1e-3, rel=0.15)


def test_the_start_at_1():
    decay, g, reached, updates = says(
        "initial_scale",
        "0.9 and gradients of 0.01, steps reach 0.7 learning rates after 87 updates",
    )
    t = np.arange(1, 201)
    formula = g / np.sqrt(decay**t + (1 - decay**t) * g**2)
    moved = steps(np.full(200, g), decay=decay, initial_scale=1)
    np.testing.assert_allclose(moved, formula, rtol=1e-4)
    assert moved[int(updates) - 1] == pytest.approx(reached, rel=0.01)


def test_bias_correction_is_adam_s():
    g = np.random.default_rng(0).normal(size=50)
    corrected = steps(g, lr=0.1, bias_correction=True)
    adam = optax.adam(0.1, b1=0, b2=0.99)
    state, moved = adam.init(jnp.zeros([])), []
    # optax raises a float to an integer.
    with jax.numpy_dtype_promotion("standard"):
        for value in g:
            updates, state = adam.update(jnp.asarray(value, jnp.float32), state)
            moved.append(-float(updates))
    np.testing.assert_allclose(corrected, moved, rtol=1e-4)
    decay, times = says(
        "bias_correction", "the first step with decay 0.99 is 10 times as long"
    )
    assert steps(g, lr=0.1, decay=decay)[0] / corrected[0] == pytest.approx(times, 1e-4)
    assert "a hundred updates later still more than three" in section("bias_correction")
    assert 3 < steps(np.ones(101), decay=0.999)[100] < 3.3
    with pytest.raises(ValueError, match="initial_scale"):
        rmsprop(initial_scale=1, bias_correction=True)


def test_bfloat16_averages_do_not_fall():
    (_, percent) = says(
        "accumulator_dtype", "8 significant bits, and a change by less than 0.19 %"
    )
    x = jnp.geomspace(1, 4, 500).astype(jnp.bfloat16)
    for sign in (-1, 1):
        changed = x.astype(jnp.float32) * (1 + sign * percent / 100)
        assert jnp.all(changed.astype(jnp.bfloat16) == x)
    assert jnp.bfloat16(0.999) == 1
    assert jnp.float16(1e-4) ** 2 == 0
    with np.errstate(over="ignore"):
        assert np.isinf(np.float16(300) ** 2)
    tx = optax.scale_by_rms(0.999, initial_scale=1.0)
    none = jnp.zeros(3, jnp.bfloat16)
    state = tx.init(none)
    for _ in range(5):
        state = tx.update(none, state)[1]
    assert jnp.all(state.nu == 1)
    with pytest.raises(ValueError, match="float32"):
        rmsprop(accumulator_dtype=jnp.bfloat16)


def test_weight_decay_pulls_to_0_whichever_way_the_gradient_goes():
    assert "pulls towards 0 in both cases" in section("maximize")
    for maximize in (False, True):
        moved = steps(np.zeros(5), 0.01, start=1.0, weight_decay=0.1, maximize=maximize)
        assert np.all(moved > 0)


DIALECTS = {
    "torch": "torch",
    "timm": "timm",
    "bitsandbytes": "bitsandbytes",
    "Keras": "keras",
    "TensorFlow 1": "tensorflow",
    "Paddle": "paddle",
    "MLX": "mlx",
    "optax": "optax",
    "MindSpore": "mindspore",
    "Chainer": "chainer",
    "Optimisers.jl": "optimisers_jl",
}
WORDS = {
    "learning_rate": {"lr", "learning_rate"},
    "decay": {"alpha", "rho", "decay"},
    "eps": {"eps", "epsilon"},
}


@pytest.mark.parametrize("name", WORDS)
def test_names_and_defaults_elsewhere(name):
    text = section(name).split("**Elsewhere.**")[1].split("```")[0]
    checked = 0
    for clause in re.split(r"[;.] ", text):
        for framework in DIALECTS:
            if not re.search(rf"\b{re.escape(framework)}[:, ]", clause):
                continue
            arguments = inspect.signature(
                getattr(dialects, DIALECTS[framework])
            ).parameters
            (word,) = re.findall(r"`(\w+)`", clause)
            assert word in WORDS[name]
            default = arguments[word].default
            given = re.findall(r"(?<=, )[\de.-]+\d", clause)
            expected = [] if default is inspect.Parameter.empty else [default]
            assert [float(n) for n in given] == expected
            checked += 1
    assert checked >= 8


SIDES = {
    "eps_in_sqrt": ("Outside", "Under", {}),
    "lr_in_momentum": ("Outside", "Inside", {"momentum": 0.9}),
    "initial_scale": ("Fixed at 0", "Fixed at 1", {}),
}


@pytest.mark.parametrize("name", SIDES)
def test_sides_elsewhere(name):
    off, on, case = SIDES[name]
    text = section(name).split("**Elsewhere.**")[1].split("tf.keras")[0]
    checked = 0
    for sentence in re.split(r"\. (?=[A-Z])", text):
        for framework, dialect in DIALECTS.items():
            side = re.match(rf" ?({off}|{on})\b", sentence)
            if side and re.search(rf"\b{re.escape(framework)}\b", sentence):
                assert bool(settings_of(dialect, case).get(name)) == (side[1] == on)
                checked += 1
    assert checked >= 6
