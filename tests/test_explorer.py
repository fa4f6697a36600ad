"""The interactive explorer: its JavaScript has our numbers, and the others'."""

import contextlib
import inspect
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_rmsprop import dialects, rmsprop

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SOURCE = (ROOT / "docs" / "explorer" / "explorer.js").read_text(encoding="utf-8")
LABELS = json.loads((ROOT / "docs" / "explorer" / "labels.json").read_text("utf-8"))

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
# Of the way that a coordinate goes, or of the largest value of a state entry.
TOLERANCE_32 = 1e-6
TOLERANCE_64 = 1e-10


@pytest.fixture(scope="module")
def explorer(import_example):
    return import_example("explorer")


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
    wide = {"FLOAT32": np.float32, "FLOAT64": np.float64}[dtype]
    arrays = {n: np.array(path[n], wide) for n in ("points", "gradients", "states")}
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


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("eps_in_sqrt", [False, True])
def test_float32_sees_an_eps_in_the_wrong_place(script, centered, eps_in_sqrt):
    flags = {**dict.fromkeys(FLAGS, False), "centered": centered}
    flags["eps_in_sqrt"] = eps_in_sqrt
    s = scene(eps=1e-2, decay=0.9, surface="noisy", **flags)
    path = run(script, "ours", s)
    entries = package_runs(lambda **n: rmsprop(**n, **flags), [s], [path], "f4")
    expected = entries["p"][0]
    assert relative_error(path["points"][1:], expected) <= TOLERANCE_32
    wrong = run(script, "ours", {**s, "eps_in_sqrt": not eps_in_sqrt})
    assert relative_error(wrong["points"][1:], expected) > 1000 * TOLERANCE_32


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


def test_every_preset_is_the_packages_and_its_call_runs(script):
    presets = script("Object.keys(PRESETS)")
    assert len(presets) == 7
    for preset in presets:
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


def framework_grid(**options):
    """Settings for a framework that has momentum, centering and weight decay."""
    for number, (momentum, centered, weight_decay) in enumerate(
        itertools.product((0.0, 0.9), (False, True), (0.0, 0.1))
    ):
        for surface in ("noisy", SURFACES[number % 6]):
            numbers = dict(learning_rate=0.01, decay=(0.9, 0.3)[number % 2], eps=1e-2)
            yield scene(
                surface=surface,
                momentum=momentum,
                centered=centered,
                weight_decay=weight_decay,
                **numbers,
                **options,
            )


def torch_points(s, path, dtype):
    import torch

    p = torch.tensor(path["points"][0], dtype=getattr(torch, dtype), requires_grad=True)
    optimizer = torch.optim.RMSprop(
        [p],
        lr=s["learning_rate"],
        alpha=s["decay"],
        eps=s["eps"],
        momentum=s["momentum"],
        centered=s["centered"],
        weight_decay=s["weight_decay"],
    )
    for g in path["gradients"]:
        p.grad = torch.tensor(g, dtype=p.dtype)
        optimizer.step()
        yield p.detach().clone().numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_torchs_formula_is_torchs(script, dtype):
    pytest.importorskip("torch")
    # torch rounds once where it fuses a multiplication and an addition
    tolerance = {"float32": 2 * TOLERANCE_32, "float64": TOLERANCE_64}[dtype]
    for s in framework_grid():
        if dtype == "float32" and s["centered"] and s["surface"] != "noisy":
            continue  # what subtracting loses is not the same in both
        path = run(script, "torch", s, dtype.upper())
        points = list(torch_points(s, path, dtype))
        assert relative_error(path["points"][1:], points) <= tolerance
        control = run(script, "keras", s, dtype.upper())["points"][1:]
        assert relative_error(control, points) > tolerance


def test_optaxs_formula_is_optaxs(script, x64):
    for number, s in enumerate(framework_grid()):
        s["nesterov"] = number % 3 == 0 and s["momentum"] > 0
        s["bias_correction"] = number % 4 == 0
        s["initial_scale"] = 0.0 if s["bias_correction"] else 0.5 * (number % 2)
        path = run(script, "optax", s, "FLOAT64")
        names = ("decay", "eps", "initial_scale", "nesterov", "centered")
        options = {n: s[n] for n in (*names, "bias_correction")}
        tx = optax.rmsprop(
            s["learning_rate"], momentum=s["momentum"] or None, **options
        )
        with jax.numpy_dtype_promotion("standard"):
            entries = package_runs(lambda tx=tx, **n: tx, [s], [path], "f8")
        assert relative_error(path["points"][1:], entries["p"][0]) <= TOLERANCE_64
        wrong = {**s, "weight_decay": 0.0, "eps_in_sqrt": False}
        control = run(script, "ours", wrong, "FLOAT64")["points"][1:]
        assert relative_error(control, entries["p"][0]) > TOLERANCE_64


def test_keras_formula_is_that_of_its_dialect(script, x64):
    for s in framework_grid():
        path = run(script, "keras", s, "FLOAT64")
        tx = dialects.keras(
            s["learning_rate"],
            rho=s["decay"],
            momentum=s["momentum"],
            epsilon=s["eps"],
            centered=s["centered"],
            weight_decay=s["weight_decay"],
        )
        entries = package_runs(lambda tx=tx, **n: tx, [s], [path], "f8")
        assert relative_error(path["points"][1:], entries["p"][0]) <= TOLERANCE_64
        control = run(script, "torch", s, "FLOAT64")["points"][1:]
        assert relative_error(control, entries["p"][0]) > TOLERANCE_64


@pytest.mark.parametrize("name", ["torch", "keras", "optax"])
def test_each_is_ours_with_its_options(script, name):
    """What the page's reasons rest on."""
    fixed = script("FIXED[framework]", framework=name)
    for number, flags in enumerate(programs()):
        for s in random_settings(number, flags):
            for schedule in ("constant", "drop"):
                s = {**s, "schedule": schedule}
                theirs = run(script, name, s, "FLOAT64")["points"]
                ours = run(script, "ours", {**s, **fixed}, "FLOAT64")["points"]
                # centered on the slope they lose eight digits by subtracting
                tolerance = 1e-7 if s["centered"] else TOLERANCE_64
                assert relative_error(theirs, ours) <= tolerance


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
    x, y = script("SURFACES[surface].start")
    assert left < x < right
    assert bottom < y < top
    if lowest := script("SURFACES[surface].lowest"):
        assert script("SURFACES[surface].gradient(...p)", p=lowest) == [0, 0]


def test_the_noise_is_normal(script):
    noise = np.array(script("Array.from({length: 3200}, (_, t) => noiseAt(t))"))
    assert np.abs(noise.mean(0)).max() < 3 / math.sqrt(3200)
    assert np.abs(noise.std(0) - 1).max() < 3 / math.sqrt(6400)
    assert np.abs(np.corrcoef(noise[1:].T, noise[:-1].T) - np.eye(4)).max() < 0.06


def verdict(script, name, **options):
    s = scene(**options)
    return script("compare(f, s, run('ours', s), run(f, s))", f=name, s=s)


UNDER_ROOT, OUTSIDE = "eps_in_sqrt:true", "eps_in_sqrt:false"
VERDICTS = [
    ("torch", {}, "same", []),
    ("torch", {"eps": 1e-2, "surface": "plateau"}, "same", []),
    ("keras", {"eps": 1.0}, "differs", [UNDER_ROOT]),
    ("optax", {"eps": 1.0}, "differs", [UNDER_ROOT]),
    ("optax", {"eps": 1e-2, "eps_in_sqrt": True}, "same", []),
    ("torch", {"eps": 1e-1, "eps_in_sqrt": True}, "differs", [OUTSIDE]),
    (
        "optax",
        {"weight_decay": 1.0, "surface": "saddle"},
        "differs",
        ["weight_decay:0", UNDER_ROOT],  # its decay slows the start of y to eps
    ),
    ("keras", {"weight_decay": 1.0}, "differs", ["decoupled_weight_decay:true"]),
    ("keras", {"momentum": 0.9}, "same", []),
    (
        "keras",
        {"momentum": 0.9, "schedule": "drop"},
        "differs",
        ["lr_in_momentum:true"],
    ),
    ("torch", {"initial_scale": 1.0}, "differs", ["initial_scale:0"]),
    ("torch", {"bias_correction": True}, "differs", ["bias_correction:false"]),
    ("optax", {"bias_correction": True}, "same", []),
    ("keras", {"momentum": 0.9, "nesterov": True}, "differs", ["nesterov:false"]),
    ("torch", {"surface": "rosenbrock", "learning_rate": 1e6}, "differs", ["overflow"]),
]


@pytest.mark.parametrize(("name", "options", "kind", "reasons"), VERDICTS)
def test_it_says_why_one_differs(script, name, options, kind, reasons):
    found = verdict(script, name, **options)
    assert found["kind"] == kind
    assert found.get("reasons", []) == reasons
    assert 0 < found.get("step", 1) < STEPS


def test_it_says_where_one_turns_nan(script):
    s = script("({...DEFAULTS, ...SCENE, ...PRESETS.steady})")
    ours = run(script, "ours", s)
    assert ours["end"] is None
    assert np.isfinite(ours["points"]).all()
    for name in ("torch", "keras", "optax"):
        end = run(script, name, s)["end"]
        assert end["why"] == "negative"
        assert 0 < end["step"] < s["steps"]
    pytest.importorskip("torch")
    points = np.array(list(torch_points(s, ours, "float32")))
    assert np.isnan(points[-1]).any()


def test_it_says_what_else_ends_a_run(script):
    blows_up = {"learning_rate": 10.0, "weight_decay": 10.0}
    s = scene(**blows_up, decoupled_weight_decay=True, steps=200)
    assert run(script, "ours", s)["end"]["why"] in ("parameter", "gradient")
    s = scene(eps=0.0, decay=0.0, surface="plateau", learning_rate=30.0)
    ends = [run(script, n, s)["end"] for n in ("ours", "torch")]
    assert ends[0] is None
    assert ends[1]["why"] == "zero"


def test_the_defaults_are_the_packages(script):
    expected = {n: x for n, x in scene().items() if n in (*NUMBERS, *FLAGS)}
    assert script("DEFAULTS") == expected
    arguments = set(inspect.signature(rmsprop).parameters)
    missing = {"weight_decay_mask", "maximize", "accumulator_dtype"}
    assert script("DEFAULTS").keys() == arguments - missing


REFUSED = {
    "nesterov": {"nesterov": True},
    "decay": {"centered": True, "decay": 0.0},
    "initial_scale": {"bias_correction": True, "initial_scale": 1.0},
}


@pytest.mark.parametrize("why", REFUSED)
def test_it_refuses_what_the_package_refuses(script, why):
    s = scene(**REFUSED[why])
    assert script("refusal(s)", s=s) == why
    assert script("pythonCall(s)", s=s).startswith("# raises ValueError\nrmsprop(")
    with pytest.raises(ValueError, match=why):
        rmsprop(**{n: s[n] for n in (*NUMBERS, *FLAGS)})


def test_it_refuses_nothing_else(script):
    for number, flags in enumerate(programs()):
        for s in random_settings(number, flags):
            assert script("refusal(s)", s=s) is None
            rmsprop(**{n: s[n] for n in (*NUMBERS, *FLAGS)})


@pytest.mark.parametrize("bound", [("decay", 1), ("momentum", 1), ("eps", 1e39)])
def test_numbers_have_the_packages_bounds(script, bound):
    name, value = bound
    for x, allowed in ((value, False), (-1e-9, False), (0.5, True), (0, True)):
        assert script("isAllowed(name, x)", name=name, x=x) == allowed
        context = contextlib.nullcontext()
        if not allowed:
            context = pytest.raises(ValueError, match=name)
        with context:
            rmsprop(**{name: x})


def test_the_hash_keeps_a_setting(script):
    for number, flags in enumerate(programs()):
        for s in random_settings(number, flags):
            found = script("fromHash(`#${toHash(s)}`)", s=s)
            assert found == {"settings": s, "ignored": []}
    usual = script("fromHash('')")["settings"]
    assert script("toHash(s)", s=usual) == ""


@pytest.mark.parametrize(
    ("text", "ignored"),
    [
        (
            "#decay=1.5&eps=x&steps=99999&momentum=",
            ["decay", "eps", "steps", "momentum"],
        ),
        ("#surface=toString&toString=1&lr=3", ["surface", "toString", "lr"]),
        ("#nesterov&centered=yes&schedule=never", ["nesterov", "centered", "schedule"]),
        ("#decay=%zz&%E4=1&=5&steps=20.5&decay=2", ["decay", "%E4", "=5", "steps"]),
        ("#" + "a" * 1000, ["a" * 40]),
        ("#&&", []),
    ],
)
def test_what_a_hash_has_beside_settings_is_named(script, text, ignored):
    usual = script("fromHash('')")["settings"]
    found = script("fromHash(text)", text=text)
    assert found == {"settings": usual, "ignored": ignored}


def test_a_hash_may_be_escaped(script):
    found = script(
        "fromHash(text)", text="#decay=0.9%20&%65ps=%31e-3&surface=saddle%20"
    )
    settings = scene(decay=0.9, eps=1e-3, surface="saddle", steps=200)
    assert found == {"settings": settings, "ignored": []}


def test_the_call_has_what_differs_from_the_defaults(script):
    assert script("pythonCall(s)", s=scene()) == "rmsprop()"
    for number, flags in enumerate(programs()):
        for s in random_settings(number, flags):
            given = eval(script("pythonCall(s)", s=s), {"rmsprop": dict})
            given_or_usual = {**scene(), **given}
            assert {n: given_or_usual[n] for n in s} == {
                **s,
                "surface": "valley",
                "steps": STEPS,
            }
            assert all(scene()[n] != x for n, x in given.items())


def test_sliders_stop_at_round_numbers(script):
    for name in script("Object.keys(SLIDERS)"):
        low, high = script(
            "[SLIDERS[name].low, SLIDERS[name].high].map((x) => x * STOPS_A_DECADE)",
            name=name,
        )
        stops = list(range(int(low), int(high) + 1))
        values = script("stops.map((x) => fromPosition(name, x))", stops=stops)
        assert values == sorted(values)
        assert script("v.every((x) => isAllowed(name, x))", v=values)
        back = script("v.map((x) => toPosition(name, x))", v=values)
        assert np.abs(np.subtract(back, stops)).max() <= 1
    for x in (0.9, 0.99, 0.999):
        assert script("fromPosition('decay', toPosition('decay', x))", x=x) == x
    for name in ("eps", "weight_decay", "initial_scale", "learning_rate"):
        assert script("fromPosition(name, toPosition(name, 0))", name=name) == 0


def test_labels_exist_in_both_languages():
    english, chinese = LABELS["en"], LABELS["zh"]
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert text.strip()
        assert chinese[key].strip()
        holes = [sorted(re.findall(r"\{\w+\}", t)) for t in (text, chinese[key])]
        assert holes[0] == holes[1], key
    terms = {
        "learning_rate": "学习率",
        "decay": "平滑常数",
        "momentum": "动量",
        "weight_decay": "权重衰减",
        "centered": "中心化",
    }
    assert {key: chinese[key] for key in terms} == terms


def test_every_label_that_is_asked_for_exists(explorer):
    template, code = explorer.piece("template.html"), explorer.piece("page.js")
    asked = re.findall(r'data-label="([^"]+)"', template)
    asked += re.findall(r'\bsay\("([^"]+)"', code)
    assert len(asked) > 30
    assert set(asked) <= LABELS["en"].keys()


def test_every_reason_has_a_label(script):
    fixed = script("FIXED")
    for options in fixed.values():
        for key, value in options.items():
            assert f"reason.{key}:{json.dumps(value)}" in LABELS["en"]
    for name in ("subtraction", "rounding", "overflow", "together"):
        assert f'"{name}"' in SOURCE
        assert f"reason.{name}" in LABELS["en"]
    ends = SOURCE.split("function whyNotFinite")[1].split("\n}")[0]
    for why in re.findall(r'return "(\w+)"', ends):
        assert f"end.{why}" in LABELS["en"]
    for name in script("Object.keys(DEFAULTS)"):
        assert {name, f"{name}.help"} <= LABELS["en"].keys()


def test_the_page_fetches_nothing(explorer):
    html = explorer.page()
    assert "{{" not in html
    assert 'id="home"' not in html
    assert explorer.outside_references(html) == []
    for bad in (
        '<img alt="" src="a.png">',
        '<link rel="stylesheet" href="https://a.b/c.css">',
        "<style>a { background: url(a.png) }</style>",
        "<script>fetch('a')</script>",
    ):
        assert explorer.outside_references(html + bad)


def test_it_writes_the_page(explorer, tmp_path):
    output = tmp_path / "new folder" / "explorer.html"
    command = [sys.executable, str(EXAMPLES / "explorer.py"), "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{output} (")
    assert output.read_text("utf-8") == explorer.page()


def test_it_says_where_it_cannot_write(explorer, capsys):
    with pytest.raises(SystemExit, match="2"):
        explorer.main(["--output", f"{__file__}/explorer.html"])
    assert "--output: " in capsys.readouterr().err


def luminance(color):
    parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_have_the_contrast_of_wcag_aa(explorer):
    roots = re.findall(r":root \{(.*?)\}", explorer.piece("explorer.css"), re.S)
    light, dark, printed = roots
    assert "--page: #ffffff;" in printed
    for theme in (light, dark):
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", theme))
        assert len(colors) == 15
        for ground in ("page", "card"):
            for text in ("text", "muted", "nan"):
                assert contrast(colors[text], colors[ground]) >= 4.5
            for edge in ("input-edge", "focus"):
                assert contrast(colors[edge], colors[ground]) >= 3
        for ground in ("card", "low", "high"):
            for line in ("ours", "torch", "keras", "optax", "nan"):
                assert contrast(colors[line], colors[ground]) >= 3, (line, ground)


CHROMIUM_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, headless=True, args=CHROMIUM_OPTIONS
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(explorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    explorer.main(["--output", str(path)])
    return path.as_uri()


@pytest.fixture
def open_page(browser, address):
    """Opens the page, and afterwards checks that it was quiet."""
    contexts, complaints, requests = [], [], set()

    def opened(rest="", width=1280, height=800, locale="en-US", **options):
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, locale=locale, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.add(request.url.split(":")[0]))
        page.goto(address + rest)
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
    """Where the page is by its own account: the driver hears of it a moment later."""
    return page.evaluate("location.href")


def test_the_page_loads_and_draws(open_page):
    page = open_page()
    assert page.title() == "RMSprop explorer"
    for name in ("ours", "torch", "keras", "optax"):
        assert path_of(page, name).count("L") == 200
    for chart in ("loss", "rate-0", "rate-1"):
        assert page.locator(f"#{chart} .curve").count() == 4
        assert "step" in page.locator(f"#{chart} text").all_text_contents()
        assert "optax_rmsprop: from" in page.get_attribute(f"#{chart}", "aria-label")
    assert page.inner_text("#call") == "rmsprop()"
    assert page.input_value("#preset") == "torch"


def test_every_slider_moves_by_keyboard(open_page, script):
    for name in script("Object.keys(SLIDERS)"):
        page = open_page("#momentum=0.5&weight_decay=0.1&schedule=drop&surface=noisy")
        before = path_of(page), page.inner_text("#call"), address_of(page)
        page.focus(f"#{name}-slider")
        page.keyboard.press("ArrowRight")
        value = page.get_attribute(f"#{name}-slider", "aria-valuetext")
        assert page.input_value(f"#{name}") == value
        assert f"{name}={value}" in address_of(page)
        assert page.inner_text("#call") != before[1]
        page.keyboard.press("End")
        after = path_of(page), page.inner_text("#call"), address_of(page)
        assert all(a != b for a, b in zip(after, before, strict=True)), name


def test_every_checkbox_changes_the_path(open_page):
    page = open_page("#momentum=0.5&weight_decay=0.1&schedule=drop&eps=0.1")
    for name in FLAGS:
        before = path_of(page)
        page.focus(f"#{name}")
        page.keyboard.press("Space")
        assert path_of(page) != before, name
        assert f"{name}=True" in page.inner_text("#call")
        page.keyboard.press("Space")
        assert path_of(page) == before


def test_a_number_can_be_typed(open_page):
    page = open_page()
    page.fill("#eps", "1e-3")
    assert page.inner_text("#call") == "rmsprop(eps=0.001)"
    slider = page.get_attribute("#eps-slider", "aria-valuetext")
    assert slider == "0.001"
    before = path_of(page)
    page.fill("#decay", "1.5")
    assert page.get_attribute("#decay", "aria-invalid") == "true"
    assert page.inner_text("#decay-error") == "Must be a number in [0, 1)."
    assert path_of(page) == before
    page.fill("#decay", "0.5")
    assert page.get_attribute("#decay", "aria-invalid") is None
    assert page.inner_text("#decay-error") == ""
    assert path_of(page) != before


def test_the_address_is_the_setting(open_page, expect):
    page = open_page("#momentum=0.9&nesterov=true&surface=saddle")
    assert page.inner_text("#ignored") == ""
    assert page.input_value("#surface") == "saddle"
    assert page.is_checked("#nesterov")
    assert "rmsprop(momentum=0.9, nesterov=True)" in page.inner_text("#call")
    path = path_of(page)
    page.click("#reset")
    assert address_of(page).endswith("explorer.html")
    assert path_of(page) != path
    page.evaluate("location.hash = 'momentum=0.9&nesterov=true&surface=saddle'")
    expect(page.locator("#nesterov")).to_be_checked()
    assert path_of(page) == path


def test_it_says_what_it_ignores_of_the_address(open_page, expect):
    page = open_page("#decay=2&eps=0.1%20&surface=foo")
    said = "Ignored from the address: decay, surface"
    assert page.inner_text("#ignored") == said
    assert page.get_attribute("#ignored", "role") == "status"
    assert page.inner_text("#call") == "rmsprop(eps=0.1)"
    assert address_of(page).endswith("explorer.html#eps=0.1")
    page.press("#decay-slider", "ArrowRight")
    assert page.inner_text("#ignored") == said  # nothing jumps under the hand
    page.select_option("#language", "zh")
    assert page.inner_text("#ignored") == "地址中以下设置无效，已忽略：decay、surface"
    page.click("#reset")
    assert page.inner_text("#ignored") == ""
    page.evaluate("location.hash = 'steps=99999&eps=%'")
    expect(page.locator("#ignored")).to_have_text(
        "地址中以下设置无效，已忽略：steps、eps"
    )
    assert address_of(page).endswith("?lang=zh")


def test_it_says_where_the_others_turn_nan(open_page, expect):
    page = open_page()
    text = page.get_attribute("#path", "aria-label")
    page.select_option("#preset", "steady")
    said = page.inner_text("#why-torch")
    pattern = r"Turned NaN at step \d+: square_avg − grad_avg² rounded below zero, in ."
    assert re.match(pattern, said)
    assert page.inner_text("#why-ours") == ""
    assert page.locator("#path .cross").count() == 3
    assert page.get_attribute("#path", "aria-label") != text
    expect(page.locator("#summary")).to_contain_text(f"torch: {said}")
    page.click("#show-torch")
    assert page.locator("#path .cross").count() == 2
    assert page.locator(".charts .curve.torch").count() == 0


def test_what_rmsprop_refuses_is_said(open_page):
    page = open_page("#nesterov=true")
    assert page.inner_text("#refusal") == LABELS["en"]["refusal.nesterov"]
    assert page.locator("#path .curve.ours").count() == 0
    assert page.inner_text("#why-torch") == LABELS["en"]["unchecked"]
    assert page.inner_text("#call") == "# raises ValueError\nrmsprop(nesterov=True)"
    page.fill("#momentum", "0.5")
    assert not page.is_visible("#refusal")
    assert page.inner_text("#call") == "rmsprop(momentum=0.5, nesterov=True)"
    assert page.locator("#path .curve.ours").count() == 1


def labels_shown(page):
    return page.eval_on_selector_all(
        "[data-label]", "nodes => nodes.map((n) => [n.dataset.label, n.textContent])"
    )


def test_it_speaks_both_languages(open_page):
    page = open_page()
    assert page.get_attribute("html", "lang") == "en"
    for key, text in labels_shown(page):
        assert text == LABELS["en"][key]
    page.select_option("#language", "zh")
    assert page.get_attribute("html", "lang") == "zh-Hans"
    assert address_of(page).endswith("?lang=zh")
    assert page.title() == LABELS["zh"]["title"]
    shown = labels_shown(page)
    assert len(shown) > 60
    for key, text in shown:
        assert text == LABELS["zh"][key]
    assert page.inner_text("label[for=learning_rate]").startswith("学习率")
    assert page.get_attribute("#decay-slider", "aria-label") == "平滑常数，滑块"

    assert open_page(locale="zh-CN").get_attribute("html", "lang") == "zh-Hans"
    page = open_page("?lang=en#decay=0.5", locale="zh-CN")
    assert page.get_attribute("html", "lang") == "en"
    page.press("#decay-slider", "ArrowRight")
    assert "?lang=en#decay=" in address_of(page)


@pytest.mark.parametrize("language", LABELS)
@pytest.mark.parametrize("width", [320, 360, 390, 700, 900])
def test_nothing_scrolls_sideways(open_page, language, width):
    page = open_page(f"?lang={language}", width=width, height=780)
    for preset in ("torch", "steady", "efficientnet"):
        page.select_option("#preset", preset)
        needed = page.evaluate("document.documentElement.scrollWidth")
        assert needed <= width
    if width < 800:  # one column
        lefts = page.eval_on_selector_all(
            "#path-figure, #controls, .charts, .call",
            "nodes => nodes.map((n) => n.getBoundingClientRect().left)",
        )
        assert len(set(lefts)) == 1


def box(page, selector):
    return page.locator(selector).bounding_box()


def inside(page, selector, height):
    """Whether it is in view from top to bottom."""
    found = box(page, selector)
    return found["y"] >= 0 and found["y"] + found["height"] <= height


WIDE = [(1280, 720), (1280, 1000), (1000, 720), (960, 540), (844, 390), (640, 360)]


@pytest.mark.parametrize(("width", "height"), WIDE)
def test_a_slider_and_all_results_are_in_reach_together(open_page, width, height):
    page = open_page(width=width, height=height)
    for name in ("decay", "weight_decay"):
        page.locator(f"#{name}-slider").evaluate(
            "e => e.scrollIntoView({block: 'center'})"
        )
        assert inside(page, f"#{name}-slider", height)
        assert inside(page, "#path", height)
        assert inside(page, "#play", height)
        assert box(page, "#path")["x"] > box(page, f"#{name}-slider")["x"] + 100
        scroll = "e => e.scrollTo(0, e.scrollHeight)"
        page.eval_on_selector(".results", scroll)
        assert inside(page, "#copy", height)
        assert inside(page, f"#{name}-slider", height)
        page.eval_on_selector(".results", "e => e.scrollTo(0, 0)")


def test_the_results_do_not_lie_on_each_other(open_page):
    for width, height in WIDE:
        page = open_page("#nesterov=true", width=width, height=height)
        cards = [".map", ".look", ".charts", ".call"]
        if width < 1100:
            cards.insert(2, ".implementations")
        boxes = [box(page, card) for card in cards]
        for above, below in itertools.pairwise(boxes):
            assert below["y"] >= above["y"] + above["height"] + 10


def test_play_stays_where_it_is(open_page):
    page = open_page()
    place = box(page, "#play")
    below_the_map = place["y"] - box(page, ".map")["y"] - box(page, ".map")["height"]
    assert below_the_map < 40
    for rest in ("learning_rate=1e-6&decay=0.9&centered=true&surface=slope", "eps=1"):
        assert box(open_page(f"#{rest}"), "#play") == place
    page.click("#nesterov")
    page.evaluate("scrollTo(0, 0)")
    assert box(page, "#play") == place
    said, drawn = box(page, "#refusal"), box(page, "#path")
    assert said["y"] > drawn["y"] + drawn["height"] / 2
    assert said["y"] + said["height"] < drawn["y"] + drawn["height"]


def rings(page):
    """Names and radii of the marks at the ends, in the order of their drawing."""
    read = "nodes => nodes.map((n) => [n.classList[1], Number(n.getAttribute('r'))])"
    return page.eval_on_selector_all("#path .place", read)


def test_equal_ends_lie_around_each_other(open_page):
    page = open_page()
    drawn = rings(page)
    assert [name for name, _ in drawn] == ["optax", "keras", "torch", "ours"]
    radii = [r for _, r in drawn]
    assert all(a >= b + 3 for a, b in itertools.pairwise(radii))
    page = open_page("#eps=0.5&decay=0.9&momentum=0.5&steps=100")
    apart = dict(rings(page))  # torch with ours, and optax with Keras
    assert apart["ours"] == apart["keras"] < apart["torch"] == apart["optax"]


def test_the_axes_are_named(open_page):
    page = open_page("?lang=zh")
    assert page.locator("#path .axis").all_text_contents() == ["x", "y"]
    frame = box(page, "#path")
    across, up = (page.locator("#path .axis").nth(i).bounding_box() for i in (0, 1))
    assert across["x"] + across["width"] > frame["x"] + frame["width"] - 20
    assert across["y"] + across["height"] > frame["y"] + frame["height"] - 20
    assert up["x"] < frame["x"] + 20
    assert up["y"] < frame["y"] + 20
    assert "步" in page.locator("#loss text").all_text_contents()


@pytest.fixture(scope="module")
def site_address(explorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("site") / "explore.html"
    path.write_text(explorer.page(home="index.html?a=1&b"), "utf-8")
    return path.as_uri()


def test_within_a_site_it_leads_back(open_page, site_address):
    page = open_page(width=320)
    assert page.locator("header a").count() == 0
    page.goto(site_address)
    assert page.get_attribute("header a", "href") == "index.html?a=1&b"
    assert page.inner_text("header a") == "Documentation"
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    page.select_option("#language", "zh")
    assert page.inner_text("header a") == "文档"


@pytest.mark.parametrize("system", ["light", "dark"])
def test_within_a_site_it_keeps_the_theme_of_the_site(open_page, site_address, system):
    page = open_page(color_scheme=system)
    ground = "getComputedStyle(document.body).backgroundColor"
    grounds = {system: page.evaluate(ground)}
    other = {"light": "dark", "dark": "light"}[system]
    page.evaluate(f"localStorage.setItem('mode', '{other}')")
    page.reload()
    assert page.evaluate(ground) == grounds[system]
    page.goto(site_address)
    grounds[other] = page.evaluate(ground)
    assert grounds == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 22, 29)"}
    scheme = "getComputedStyle(document.documentElement).colorScheme"
    assert page.evaluate(scheme) == other
    page.evaluate("localStorage.setItem('mode', 'auto')")
    page.reload()
    assert page.evaluate(ground) == grounds[system]


def test_it_prints_what_it_shows(open_page):
    page = open_page(color_scheme="dark", width=718, height=1000)
    picture = "document.getElementById('shade').toDataURL()"
    drawn = page.evaluate(picture)
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_function(f"drawn => {picture} !== drawn", arg=drawn)
    for gone in ("#controls", "#language", "#play", "#look", "#copy", "#reset"):
        assert not page.is_visible(gone), gone
    for kept in ("#surface", "#path", "#why-torch", "#loss", "#call"):
        assert page.is_visible(kept), kept
    for name in (".map", ".results"):
        position = page.eval_on_selector(name, "e => getComputedStyle(e).position")
        assert position == "static"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"


def test_everything_that_takes_focus_has_a_name_and_shows_it(open_page):
    page = open_page()
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        element = page.evaluate(
            """() => {
              const a = document.activeElement;
              const named = a.getAttribute("aria-labelledby");
              const name = a.labels?.[0]?.textContent || a.getAttribute("aria-label")
                || (named && document.getElementById(named).textContent)
                || (a.tagName === "BUTTON" && a.textContent);
              return [a.id, name, getComputedStyle(a).outlineStyle,
                a.getBoundingClientRect().width];
            }"""
        )
        if element[0] in ("", *(e[0] for e in seen)):
            break
        seen.append(element)
    roles = "nodes => nodes.map((n) => n.getAttribute('role'))"
    assert page.eval_on_selector_all("[tabindex]", roles) == ["region"]
    ids = [element[0] for element in seen]
    assert all(name and name.strip() for _, name, *_ in seen)
    assert all(outline == "solid" for *_, outline, _ in seen)
    first = ["language", "preset", "surface", "reset", "learning_rate"]
    assert ids[:5] == first
    assert ids[-1] == "copy"
    assert {*FLAGS, *NUMBERS, "steps", "schedule", "look", "play"} <= set(ids)


def test_a_step_can_be_looked_at(open_page, expect):
    page = open_page()
    last = page.inner_text("#where-ours")
    page.focus("#look")
    page.keyboard.press("Home")
    assert path_of(page).count("L") == 0
    assert page.inner_text("#where-ours") == "loss 27 at (−2, 1)"
    page.click("#play")
    expect(page.locator("#look")).to_have_value("200")
    assert page.inner_text("#play") == "Play"
    assert page.inner_text("#where-ours") == last


def test_play_goes_on_where_it_was_paused(open_page):
    page = open_page("#steps=400")
    page.clock.install()
    page.clock.pause_at(page.evaluate("Date.now()") + 1000)
    step = lambda: int(page.input_value("#look"))  # noqa: E731

    page.click("#play")
    page.clock.run_for(1000)  # of 4000 ms, from the start
    paused = step()
    assert 80 <= paused <= 120
    page.click("#play")
    page.clock.run_for(1000)
    assert step() == paused
    page.click("#play")
    page.clock.run_for(1000)
    assert paused + 80 <= step() <= paused + 120
    page.clock.run_for(3000)
    assert step() == 400
    assert page.inner_text("#play") == "Play"
    page.click("#play")
    page.clock.run_for(1000)
    assert 80 <= step() <= 120


def test_it_copies_the_call(open_page, expect):
    page = open_page("#decay=0.5", permissions=["clipboard-read", "clipboard-write"])
    page.click("#copy")
    expect(page.locator("#copied")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "rmsprop(decay=0.5)"


def test_it_respects_what_the_system_asks_for(open_page):
    page = open_page(reduced_motion="reduce")
    assert not page.is_visible("#play")
    assert page.is_visible("#look")
    color = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(color)
    picture = "document.getElementById('shade').toDataURL()"
    drawn = page.evaluate(picture)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(color) != light
    # Pages hear of a change of theme with their next frame.
    page.wait_for_function(f"drawn => {picture} !== drawn", arg=drawn)
