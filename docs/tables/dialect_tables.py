"""The tables of dialects.md."""

import functools
import json
from pathlib import Path

from generated import number, rows_of, table
from optax_rmsprop import dialects
from originals import LEARNING_RATES, ORIGINALS, SLOTS
from settings import ARGUMENTS, flipped, given, option_of, parameters
from words import Words

PEERS = Path(__file__).resolve().parents[2] / "tests" / "peers"


def side_of_eps(settings):
    return "under" if settings["eps_in_sqrt"] else "outside"


def side_of_lr(settings):
    return "inside" if settings["lr_in_momentum"] else "outside"


def kind_of_decay(settings):
    return "decoupled" if settings["decoupled_weight_decay"] else "L2"


def with_momentum(name):
    return given(name, momentum=0.9) if "momentum" in parameters(name) else None


def eps_cell(name, words):
    sides = [side_of_eps(given(name))]
    if option := option_of(name, ("eps_in_sqrt", "eps_inside_sqrt")):
        sides.append(side_of_eps(given(name, **flipped(name, option))))
    cell = words.either(sides)
    moving = with_momentum(name)
    if moving and side_of_eps(moving) != sides[0]:
        cell += words.semicolon
        side = side_of_eps(moving)
        cell += f"有动量时为{words(side)}" if words.chinese else f"{side} with momentum"
    return cell


def start_cell(name, words):
    choices = [number(given(name)["initial_scale"])]
    return words.either([*choices, "any"][: 1 + ("initial_scale" in parameters(name))])


def lr_cell(name, words):
    settings = with_momentum(name)
    if settings is None:
        return words("no momentum")
    sides = [side_of_lr(settings)]
    if "lr_in_momentum" in parameters(name):
        other = given(name, momentum=0.9, **flipped(name, "lr_in_momentum"))
        sides.append(side_of_lr(other))
    return words.either(sides)


def weight_decay_cell(name, words):
    argument = option_of(name, ("weight_decay", "wc"))
    if argument is None:
        return words("none")
    case = {argument: 0.1}
    kinds = [kind_of_decay(given(name, **case))]
    if "decoupled_decay" in parameters(name):
        kinds.append(kind_of_decay(given(name, **case, decoupled_decay=True)))
    if "corrected_weight_decay" in parameters(name):
        kinds.append("corrected")
    return words.either(kinds)


def centered_cell(name, words):
    if option := option_of(name, ("centered", "centred")):
        settings = given(name, **{option: True})
        return words("option" if settings and settings["centered"] else "never")
    return words("always" if given(name)["centered"] else "never")


@table("switches")
def switches(language):
    """The choice of each dialect where frameworks differ."""
    words = Words(language)
    header = ["dialect", "is", "epsilon", "start", "learning rate", "weight decay"]
    if words.chinese:
        header = ["方言", "对应的实现", "ε", "初值", "学习率", "权重衰减"]
    cells = (eps_cell, start_cell, lr_cell, weight_decay_cell, centered_cell)
    rows = [
        [f"`{name}`", words.of(ORIGINALS[name]), *(cell(name, words) for cell in cells)]
        for name in dialects.__all__
    ]
    return rows_of([*header, "中心化" if words.chinese else "centered"], rows)


def evidence(name, words):
    """The evidence of a dialect in tests: a recorded run, a transcription, or both."""
    found = []
    record = PEERS / "recorded" / f"{name}.json"
    if record.exists():
        package, version = next(
            iter(json.loads(record.read_text())["versions"].items())
        )
        version = version.split("+")[0]
        of_another = name in ("graves2013", "jax_example_libraries")
        source = f"{package} {version}" if of_another else version
        found.append(f"{words('run')}{words.comma}{source}")
    if f"def {name}(" in (PEERS / "transcriptions.py").read_text():
        found.append(words("transcription"))
    return words.semicolon.join(found)


def call(name, words):
    """The call with its defaults written out, and a cell for each of its numbers."""
    lr = LEARNING_RATES.get(name)
    first = next(iter(parameters(name).values()))
    cells = [number(first.default) if lr is None else f"*{number(lr)}*"]
    shown = {}
    for setting, options in ARGUMENTS.items():
        value = number(given(name)[setting] or 0)
        argument = option_of(name, options)
        if argument is None or given(name, **{argument: 0.5}) is None:
            value = f"{words('fixed')} {value}"
        elif value != "0":
            shown[argument] = value
        cells.append(value)
    arguments = [f"{a}={shown[a]}" for a in parameters(name) if a in shown]
    text = ", ".join([cells[0].strip("*"), *arguments])
    return f"`dialects.{name}({text})`", cells


@table("calls")
def calls(language):
    """The call of each dialect with its defaults, and what tests compare it with."""
    words = Words(language)
    header = ["call", "learning rate", "decay", "epsilon", "momentum", "compared with"]
    if words.chinese:
        header = ["调用", "学习率", "平滑常数", "ε", "动量", "对照依据"]
    rows = []
    for name in dialects.__all__:
        text, cells = call(name, words)
        rows.append([text, *cells, evidence(name, words)])
    return rows_of(header, rows)


@table("slots")
def slots(language):
    words = Words(language)
    header = ["dialect", "average of g²", "average of g", "momentum"]
    if words.chinese:
        header = ["方言", "g² 的滑动平均", "g 的滑动平均", "动量"]
    rows = []
    for name in dialects.__all__:
        cells = [words.comma.join(map(words, c.split(", "))) for c in SLOTS[name]]
        rows.append([f"`{name}`", *cells])
    return rows_of(header, rows)


@functools.cache
def curves():
    import five_dialects

    shown = list(five_dialects.SHOWN)
    losses = {
        k: five_dialects.losses(tx)[shown] for k, tx in five_dialects.DIALECTS.items()
    }
    return shown, losses


@table("losses", slow=True, tolerance=0.15)  # training amplifies how sums are rounded
def losses(language):
    """The losses of the figure five_dialects.png."""
    shown, found = curves()
    rows = [[f"`{name}`", *(f"{x:.3f}" for x in line)] for name, line in found.items()]
    return rows_of(["更新次数" if language == "zh" else "updates", *shown], rows)
