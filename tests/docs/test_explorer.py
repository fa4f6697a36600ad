"""The interactive explorer: its JavaScript has our numbers, and its page works."""

import inspect
import itertools
import json
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_rmsprop import dialects, rmsprop

FOLDER = Path(__file__).parents[2] / "docs" / "explorer"
SOURCE = (FOLDER / "explorer.js").read_text(encoding="utf-8")
LABELS = json.loads((FOLDER / "labels.json").read_text("utf-8"))
BUILD = runpy.run_path(str(FOLDER / "build.py"))

STEPS = 40  # as many as 1/(1 - decay) in the middle of the settings below
SURFACES = ("valley", "saddle", "rosenbrock", "noisy", "plateau", "slope")
NUMBERS = ("learning_rate", "decay", "eps", "momentum", "weight_decay", "initial_scale")
FLAGS = (
    "nesterov",
    "centered",
    "decoupled_weight_decay",
    "eps_in_sqrt",
    "lr_in_momentum",
    "bias_correction",
)
# Relative to the way that a coordinate goes, or to the largest value of a state entry.
TOLERANCE_32 = 1e-6
TOLERANCE_64 = 1e-10


@pytest.fixture(scope="module")
def script():
    """Evaluates an expression in V8, where explorer.js has been read."""
    engine = pytest.importorskip("py_mini_racer").MiniRacer()
    engine.eval(SOURCE)

    def evaluate(expression, **values):
        for name, value in values.items():
            engine.eval(f"var {name} = {json.dumps(value)}")
        text = f"JSON.stringify({expression}, (_, x) => Object.is(x, NaN) ? 'NaN' : x)"
        return json.loads(engine.eval(text))

    return evaluate


def run(script, name, settings, dtype="FLOAT32"):
    """A run's record, as arrays with the steps in front."""
    path = script(f"run(framework, s, {dtype}, true)", framework=name, s=settings)
    precise = {"FLOAT32": np.float32, "FLOAT64": np.float64}[dtype]
    arrays = {n: np.array(path[n], precise) for n in ("points", "gradients", "states")}
    return {**path, **arrays}


def scene(**options):
    defaults = dict(surface="valley", steps=STEPS, schedule="constant")
    signature = inspect.signature(rmsprop).parameters
    given = {n: signature[n].default for n in (*NUMBERS, *FLAGS)}
    given = {n: 0.0 if x is None else x for n, x in given.items()}
    return {**given, **defaults, **options}


def programs():
    """16 choices of the flags: any three of them take all eight values."""
    for a, b, c, d in itertools.product((False, True), repeat=4):
        values = (a, b, c, d, a ^ b ^ c, b ^ c ^ d)
        yield dict(zip(FLAGS, values, strict=True))


def random_settings(number, flags):
    """Eight of them, whose numbers float32 has exactly."""
    rng = np.random.default_rng(number)
    for k in range(8):
        momentum = rng.uniform(0.1, 0.97)
        numbers = {
            "learning_rate": 10 ** rng.uniform(-4, -1),
            "decay": 1 - 10 ** rng.uniform(-3, -0.1),
            "eps": 10 ** rng.uniform(-4, -1.5),
            "momentum": momentum if k % 4 or flags["nesterov"] else 0,
            "weight_decay": 10 ** rng.uniform(-4, -1) if k % 3 else 0,
            "initial_scale": rng.uniform() if k % 2 > flags["bias_correction"] else 0,
        }
        numbers = {n: float(np.float32(x)) for n, x in numbers.items()}
        yield scene(**flags, **numbers, surface=SURFACES[(number + k) % 6])


def package_runs(tx_of, settings, paths, dtype):
    """Points and state entries of one program's runs, along given gradients."""
    numbers = {n: jnp.array([s[n] for s in settings], dtype) for n in NUMBERS}
    starts = jnp.array([path["points"][0] for path in paths], dtype)
    gradients = jnp.array([path["gradients"] for path in paths], dtype)

    def one(numbers, p, gradients):
        tx = tx_of(**numbers)

        def step(carry, g):
            p, state = carry
            updates, state = tx.update(g, state, p)
            p = p + updates
            entries = {"p": p}
            for name in ("nu", "var", "mu", "trace"):
                if (value := optax.tree.get(state, name)) is not None:
                    entries[name] = value
            return (p, state), entries

        return jax.lax.scan(step, (p, tx.init(p)), gradients)[1]

    return jax.jit(jax.vmap(one))(numbers, starts, gradients)


def relative_error(found, expected):
    """The largest of a coordinate, of its way or of itself; arrays of (steps, 2)."""
    expected = np.asarray(expected)
    way = np.abs(np.diff(expected, axis=0)).sum(0)
    error = np.abs(found - expected).max(0) / np.maximum(np.abs(expected).max(0), way)
    return float(error.max())


def states_of(s, path):
    states = {"var" if s["centered"] else "nu": path["states"][..., 0]}
    if s["centered"]:
        states["mu"] = path["states"][..., 1]
    if s["momentum"]:
        states["trace"] = path["states"][..., 2]
    return states


@pytest.mark.parametrize(("number", "flags"), list(enumerate(programs())))
def test_float32_is_the_packages(script, number, flags):
    settings = list(random_settings(number, flags))
    paths = [run(script, "ours", s) for s in settings]
    entries = package_runs(lambda **n: rmsprop(**n, **flags), settings, paths, "f4")
    for k, (s, path) in enumerate(zip(settings, paths, strict=True)):
        assert path["end"] is None
        lost = 1
        if s["centered"]:  # what the difference of gradient and mean loses
            denominator = np.sqrt(entries["var"][k]) + s["eps"]
            lost += np.max(np.abs(entries["mu"][k]) / denominator) / s["decay"]
        error = relative_error(path["points"][1:], entries["p"][k])
        assert error <= TOLERANCE_32 * lost, s


@pytest.mark.slow
@pytest.mark.parametrize(("number", "flags"), list(enumerate(programs())))
def test_without_rounding_it_is_the_packages_float64(script, number, flags, x64):
    settings = list(random_settings(number, flags))
    paths = [run(script, "ours", s, "FLOAT64") for s in settings]
    entries = package_runs(lambda **n: rmsprop(**n, **flags), settings, paths, "f8")
    for k, (s, path) in enumerate(zip(settings, paths, strict=True)):
        expected = jax.tree.map(lambda entry: entry[k], entries)  # noqa: B023
        found = {"p": path["points"][1:], **states_of(s, path)}
        for name, values in found.items():
            assert relative_error(values, expected[name]) <= TOLERANCE_64, (name, s)
        wrong = {**s, "eps_in_sqrt": not s["eps_in_sqrt"]}
        control = run(script, "ours", wrong, "FLOAT64")["points"][1:]
        assert relative_error(control, expected["p"]) > TOLERANCE_64, s


ARGUMENTS = {
    "torch": {"lr": "learning_rate", "alpha": "decay", "eps": "eps"},
    "keras": {"learning_rate": "learning_rate", "rho": "decay", "epsilon": "eps"},
    "optax": {"learning_rate": "learning_rate", "decay": "decay", "eps": "eps"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_other_formulas_are_those_of_their_dialects(script, name, x64):
    """And so is ours with the options that the page fixes for them."""
    dialect = getattr(dialects, name)
    fixed = script("FIXED[framework]", framework=name)
    cases = itertools.product((0.0, 0.9), (False, True), (0.0, 0.1), SURFACES[2:4])
    for momentum, centered, weight_decay, surface in cases:
        s = scene(surface=surface, decay=0.9, eps=1e-2, momentum=momentum)
        s |= {"centered": centered, "weight_decay": weight_decay}
        given = {theirs: s[ours] for theirs, ours in ARGUMENTS[name].items()}
        given |= {"momentum": momentum, "centered": centered}
        if name != "optax":
            given["weight_decay"] = weight_decay
        path = run(script, name, s, "FLOAT64")
        entries = package_runs(
            lambda given=given, **_: dialect(**given), [s], [path], "f8"
        )
        expected = entries["p"][0]
        ours = run(script, "ours", {**s, **fixed}, "FLOAT64")
        assert relative_error(path["points"][1:], expected) <= TOLERANCE_64
        assert relative_error(ours["points"][1:], expected) <= TOLERANCE_64
        wrong = {**s, **fixed, "eps_in_sqrt": not fixed["eps_in_sqrt"]}
        control = run(script, "ours", wrong, "FLOAT64")["points"][1:]
        assert relative_error(control, expected) > TOLERANCE_64


def test_the_call_of_every_preset_runs_and_has_its_numbers(script):
    for preset in script("Object.keys(PRESETS)"):
        s = script("({...DEFAULTS, ...SCENE, ...PRESETS[preset]})", preset=preset)
        s["steps"] = 60
        tx = eval(script("pythonCall(s)", s=s), {"rmsprop": rmsprop, "optax": optax})
        path = run(script, "ours", s)
        p, points = jnp.asarray(path["points"][0]), []
        state, update = tx.init(p), jax.jit(tx.update)
        for g in path["gradients"]:
            with jax.numpy_dtype_promotion("standard"):  # optax's schedule
                updates, state = update(jnp.asarray(g), state, p)
            p = p + updates
            points.append(p)
        # steady: the mean is 10000 deviations
        tolerance = 1e-3 if preset == "steady" else TOLERANCE_32
        assert relative_error(path["points"][1:], np.array(points)) <= tolerance


@pytest.mark.parametrize("surface", SURFACES)
def test_gradients_are_those_of_the_loss(script, surface):
    rng = np.random.default_rng(0)
    left, right, bottom, top = script("SURFACES[surface].view", surface=surface)
    for x, y in rng.uniform((left, bottom), (right, top), (10, 2)):
        h = 1e-5
        near = [[x + h, y], [x - h, y], [x, y + h], [x, y - h]]
        losses = script("near.map((p) => SURFACES[surface].loss(...p))", near=near)
        slopes = np.subtract(losses[::2], losses[1::2]) / (2 * h)
        exact = script("SURFACES[surface].gradient(...p)", p=[x, y])
        np.testing.assert_allclose(slopes, exact, rtol=1e-5, atol=1e-8)


VERDICTS = [
    ("torch", {}, []),
    ("optax", {"eps": 1.0}, ["eps_in_sqrt:true"]),
    ("optax", {"eps": 1e-2, "eps_in_sqrt": True}, []),
    ("torch", {"eps": 1e-1, "eps_in_sqrt": True}, ["eps_in_sqrt:false"]),
    ("keras", {"weight_decay": 1.0}, ["decoupled_weight_decay:true"]),
    ("keras", {"momentum": 0.9}, []),
    ("keras", {"momentum": 0.9, "schedule": "drop"}, ["lr_in_momentum:true"]),
    ("torch", {"initial_scale": 1.0}, ["initial_scale:0"]),
    ("optax", {"bias_correction": True}, []),
    ("torch", {"surface": "rosenbrock", "learning_rate": 1e6}, ["overflow"]),
]


@pytest.mark.parametrize(("name", "options", "reasons"), VERDICTS)
def test_it_says_why_one_differs(script, name, options, reasons):
    s = scene(**options)
    found = script("compare(f, s, run('ours', s), run(f, s))", f=name, s=s)
    assert found["kind"] == ("differs" if reasons else "same")
    assert found.get("reasons", []) == reasons


def test_the_others_turn_nan_where_centered_and_ours_does_not(script):
    s = script("({...DEFAULTS, ...SCENE, ...PRESETS.steady})")
    assert run(script, "ours", s)["end"] is None
    for name in ("torch", "keras", "optax"):
        end = run(script, name, s)["end"]
        assert end["why"] == "negative"
        assert 0 < end["step"] < s["steps"]


def test_the_defaults_are_the_packages(script):
    expected = {n: x for n, x in scene().items() if n in (*NUMBERS, *FLAGS)}
    assert script("DEFAULTS") == expected
    arguments = set(inspect.signature(rmsprop).parameters)
    missing = {"weight_decay_mask", "maximize", "accumulator_dtype"}
    assert script("DEFAULTS").keys() == arguments - missing


def test_an_empty_address_begins_with_four_different_paths(script):
    s = script("fromHash('').settings")
    left, right, bottom, top = script("SURFACES[s.surface].view", s=s)
    paths = [
        run(script, name, s)["points"] for name in ("ours", "torch", "keras", "optax")
    ]
    for p, q in itertools.combinations(paths, 2):
        way = np.abs(p[:, None] - q[None]) / [right - left, top - bottom]
        nearest = np.linalg.norm(way, axis=2).min(1)
        assert nearest.max() > 0.04  # of the map: 20 pixels
    assert script("fromHash(`#${toHash({...DEFAULTS, ...SCENE})}`).settings") == scene(
        steps=200
    )


REFUSED = {
    "nesterov": {"nesterov": True},
    "decay": {"centered": True, "decay": 0.0},
    "initial_scale": {"bias_correction": True, "initial_scale": 1.0},
}


@pytest.mark.parametrize("why", REFUSED)
def test_it_refuses_what_the_package_refuses(script, why):
    s = scene(**REFUSED[why])
    assert script("refusal(s)", s=s) == why
    with pytest.raises(ValueError, match=why):
        rmsprop(**{n: s[n] for n in (*NUMBERS, *FLAGS)})


@pytest.mark.parametrize("bound", [("decay", 1), ("momentum", 1), ("eps", 1e39)])
def test_numbers_have_the_packages_bounds(script, bound):
    name, value = bound
    for x in (value, -1e-9):
        assert not script("isAllowed(name, x)", name=name, x=x)
        with pytest.raises(ValueError, match=name):
            rmsprop(**{name: x})
    assert script("isAllowed(name, 0.5)", name=name)


def test_the_address_keeps_a_setting_and_names_what_it_cannot_take(script):
    for number, flags in enumerate(programs()):
        for s in random_settings(number, flags):
            found = script("fromHash(`#${toHash(s)}`)", s=s)
            assert found == {"settings": s, "ignored": []}
    text = "#decay=1.5&eps=x&surface=toString&centered=yes&%E4=1&momentum=0.9%20"
    found = script("fromHash(text)", text=text)
    assert found["settings"] == scene(momentum=0.9, steps=200)
    assert found["ignored"] == ["decay", "eps", "surface", "centered", "%E4"]


def test_every_label_exists_in_both_languages(script):
    english, chinese = LABELS["en"], LABELS["zh"]
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        holes = [sorted(re.findall(r"\{\w+\}", t)) for t in (text, chinese[key])]
        assert holes[0] == holes[1], key
    asked = re.findall(r'data-label="([^"]+)"', BUILD["piece"]("template.html"))
    asked += re.findall(r'\bsay\("([^"]+)"', BUILD["piece"]("page.js"))
    asked += script("Object.keys(DEFAULTS)")
    asked += [
        f"reason.{key}:{json.dumps(value)}"
        for options in script("FIXED").values()
        for key, value in options.items()
    ]
    assert set(asked) <= english.keys()


def test_the_page_is_one_file_that_fetches_nothing(tmp_path):
    output = tmp_path / "new folder" / "explorer.html"
    BUILD["main"](["--output", str(output)])
    html = output.read_text("utf-8")
    assert "{{" not in html
    assert BUILD["outside_references"](html) == []
    for bad in ('<img src="a.png">', "<style>a { background: url(a.png) }</style>"):
        assert BUILD["outside_references"](html + bad)


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens the page, and afterwards checks that it was quiet."""
    path = tmp_path / "explorer.html"
    path.write_text(BUILD["page"](home="index.html"), "utf-8")
    contexts, complaints, requests = [], [], set()

    def opened(rest="", width=1280):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, locale="en-US", has_touch=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.add(request.url.split(":")[0]))
        page.goto(path.as_uri() + rest)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert requests <= {"file", "data"}


@pytest.fixture(scope="module")
def expect(browser):
    """Waits for what comes a moment later."""
    return pytest.importorskip("playwright.sync_api").expect


def path_of(page, name="ours"):
    return page.get_attribute(f"#path .curve.{name}", "d")


def address_of(page):
    """Ask the page itself, because the driver learns of a change a moment later."""
    return page.evaluate("location.href")


@pytest.mark.slow
def test_the_page_loads_and_draws(open_page):
    page = open_page()
    for name in ("ours", "torch", "keras", "optax"):
        assert path_of(page, name).count("L") == 200
    for chart in ("loss", "rate-0", "rate-1"):
        assert page.locator(f"#{chart} .curve").count() == 4
    assert "bias_correction=True" in page.inner_text("#call")
    assert page.get_attribute("header a", "href") == "index.html"


@pytest.mark.slow
def test_every_control_changes_the_path(open_page, script):
    setting = "#momentum=0.5&weight_decay=0.1&schedule=drop&surface=noisy"
    for name in script("Object.keys(SLIDERS)"):
        page = open_page(setting)
        before = path_of(page)
        page.focus(f"#{name}-slider")
        page.keyboard.press("End")
        value = page.get_attribute(f"#{name}-slider", "aria-valuetext")
        assert page.input_value(f"#{name}") == value
        assert f"{name}={value}" in address_of(page)
        assert path_of(page) != before, name
    page = open_page("#momentum=0.5&weight_decay=0.1&schedule=drop&eps=0.1")
    for name in FLAGS:
        before = path_of(page)
        page.focus(f"#{name}")
        page.keyboard.press("Space")
        assert path_of(page) != before, name
        assert f"{name}=True" in page.inner_text("#call")
        page.keyboard.press("Space")
        assert path_of(page) == before


@pytest.mark.slow
def test_a_typed_number_is_taken_or_marked(open_page):
    page = open_page("#learning_rate=0.01")
    page.fill("#eps", "1e-3")
    assert page.inner_text("#call") == "rmsprop(eps=0.001)"
    before = path_of(page)
    page.fill("#decay", "1.5")
    assert page.get_attribute("#decay", "aria-invalid") == "true"
    assert path_of(page) == before
    page.fill("#decay", "0.5")
    assert page.get_attribute("#decay", "aria-invalid") is None
    assert path_of(page) != before


@pytest.mark.slow
def test_the_address_is_the_setting(open_page, expect):
    page = open_page("#momentum=0.9&nesterov=true&surface=saddle&decay=2")
    assert page.input_value("#surface") == "saddle"
    assert page.is_checked("#nesterov")
    assert page.inner_text("#ignored").endswith("decay")
    path = path_of(page)
    page.click("#reset")
    assert page.input_value("#preset") == "apart"
    assert path_of(page) != path
    page.evaluate("location.hash = 'momentum=0.9&nesterov=true&surface=saddle'")
    expect(page.locator("#nesterov")).to_be_checked()
    assert path_of(page) == path


@pytest.mark.slow
def test_refusals_and_nan_are_shown(open_page):
    page = open_page("#nesterov=true")
    assert page.inner_text("#refusal") == LABELS["en"]["refusal.nesterov"]
    assert page.locator("#path .curve.ours").count() == 0
    page.fill("#momentum", "0.5")
    assert not page.is_visible("#refusal")
    assert page.locator("#path .curve.ours").count() == 1
    page.select_option("#preset", "steady")
    assert re.search(r"step \d+", page.inner_text("#why-torch"))
    assert page.inner_text("#why-ours") == ""
    assert page.locator("#path .cross").count() == 3
    page.click("#show-torch")
    assert page.locator("#path .cross").count() == 2


@pytest.mark.slow
def test_the_language_can_be_chosen(open_page):
    page = open_page()
    for language in ("zh", "en"):
        page.select_option("#language", language)
        assert page.title() == LABELS[language]["title"]
        read = "nodes => nodes.map((n) => [n.dataset.label, n.textContent])"
        shown = page.eval_on_selector_all("[data-label]", read)
        assert len(shown) > 60
        assert all(text == LABELS[language][key] for key, text in shown)


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 900])
def test_nothing_scrolls_sideways(open_page, width):
    for language in LABELS:
        page = open_page(f"?lang={language}", width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_swipe_over_a_slider_scrolls_and_sets_nothing(open_page, expect):
    page = open_page(width=390)
    slider = page.locator("#decay-slider")
    assert slider.evaluate("node => getComputedStyle(node).touchAction") == "pan-y"
    slider.scroll_into_view_if_needed()
    box, top, value = (
        slider.bounding_box(),
        *page.evaluate("[scrollY, $('decay').value]"),
    )
    touch = page.context.new_cdp_session(page)
    kinds = "touchStart", *["touchMove"] * 8, "touchEnd"
    for k, kind in enumerate(kinds):
        point = {"x": box["x"] + box["width"] * 0.9, "y": box["y"] + 10 - 15 * k}
        points = [] if kind == "touchEnd" else [point]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    expect(page.locator("#decay")).to_have_value(value)
    assert page.evaluate("scrollY") > top + 50


@pytest.mark.slow
def test_a_run_can_be_played(open_page, expect):
    page = open_page()
    page.focus("#look")
    page.keyboard.press("Home")
    assert path_of(page).count("L") == 0
    page.click("#play")
    expect(page.locator("#look")).to_have_value("200")
    assert path_of(page).count("L") == 200
