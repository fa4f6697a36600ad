"""The tables of dialects.md, and the lists "Elsewhere" of parameters.md."""

import functools
import json
import textwrap
from pathlib import Path

from generated import number, rows_of, table
from settings import given, parameters

from optax_rmsprop import dialects

PEERS = Path(__file__).resolve().parents[2] / "tests" / "peers"
ZH = {
    "outside": "外",
    "under": "内",
    "inside": "内",
    "or": "或",
    "any": "任意",
    "none": "无",
    "no momentum": "无动量",
    "decoupled": "解耦",
    "corrected": "修正",
    "option": "可选",
    "always": "是",
    "never": "否",
    "fixed": "固定",
    "run": "实跑",
    "transcription": "转写",
    "negative": "符号相反",
    "no default": "没有默认值",
}
# Where each original is; where the languages differ, in English and in Chinese.
ORIGINALS = {
    "bitsandbytes": (
        "`bitsandbytes.optim.RMSprop`, 32 bits",
        "`bitsandbytes.optim.RMSprop`，32 位",
    ),
    "chainer": "`chainer.optimizers.RMSprop`",
    "dqn2015": ("the Lua code of DQN in Nature", "Nature 论文中 DQN 的 Lua 代码"),
    "graves2013": (
        "arXiv:1308.0850; `chainer.optimizers.RMSpropGraves`",
        "arXiv:1308.0850；`chainer.optimizers.RMSpropGraves`",
    ),
    "jax_example_libraries": (
        "`rmsprop`, `rmsprop_momentum` of `jax.example_libraries.optimizers`",
        "`jax.example_libraries.optimizers` 的 `rmsprop`、`rmsprop_momentum`",
    ),
    "keras": (
        "Keras 3's `keras.optimizers.RMSprop`",
        "Keras 3 的 `keras.optimizers.RMSprop`",
    ),
    "mindspore": "`mindspore.nn.RMSProp`",
    "mlx": "`mlx.optimizers.RMSprop`",
    "optax": "`optax.rmsprop`",
    "optimisers_jl": (
        "`RMSProp` of Julia's Optimisers.jl and Flux",
        "Julia 的 Optimisers.jl 与 Flux 的 `RMSProp`",
    ),
    "paddle": "`paddle.optimizer.RMSProp`",
    "stable_baselines3": (
        "Stable-Baselines3's `RMSpropTFLike`",
        "Stable-Baselines3 的 `RMSpropTFLike`",
    ),
    "tensorflow": "`tf.compat.v1.train.RMSPropOptimizer`",
    "tf_keras": (
        "`tf.keras.optimizers.RMSprop` up to TensorFlow 2.10; "
        "`tf.keras.optimizers.legacy.RMSprop`",
        "TensorFlow 2.10 及更早的 `tf.keras.optimizers.RMSprop`；"
        "`tf.keras.optimizers.legacy.RMSprop`",
    ),
    "timm": ('timm\'s `RMSpropTF` ("rmsproptf")', "timm 的 `RMSpropTF`（“rmsproptf”）"),
    "torch": "`torch.optim.RMSprop`",
}
# The frameworks' own names of the averages of g² and of g, and of the momentum.
SLOTS = {
    "bitsandbytes": ("`state1`", "none", "none"),
    "chainer": ("`ms`", "none", "none"),
    "dqn2015": ("`g2`", "`g`", "none"),
    "graves2013": ("`n`", "`g`", "`delta`, negative"),
    "jax_example_libraries": ("`avg_sq_grad`", "none", "`mom`"),
    "keras": ("`velocity`", "`average_gradient`", "`momentum`"),
    "mindspore": ("`mean_square`", "`mean_grad`", "`moment`"),
    "mlx": ("`v`", "none", "none"),
    "optax": ("`nu`", "`mu`", "`trace`, negative"),
    "optimisers_jl": ("`quad`", "`lin`", "none"),
    "paddle": ("`mean_square`", "`mean_grad`", "`momentum`"),
    "stable_baselines3": ("`square_avg`", "`grad_avg`", "`momentum_buffer`"),
    "tensorflow": ("`rms`", "`mg`", "`momentum`"),
    "tf_keras": ("`rms`", "`mg`", "`momentum`"),
    "timm": ("`square_avg`", "`grad_avg`", "`momentum_buffer`"),
    "torch": ("`square_avg`", "`grad_avg`", "`momentum_buffer`"),
}
# Ours, where the framework requires a learning rate.
LEARNING_RATES = {
    "jax_example_libraries": 1e-3,
    "mlx": 1e-2,
    "optax": 1e-2,
    "paddle": 1e-3,
    "tensorflow": 1e-3,
}
ARGUMENTS = {
    "decay": ("alpha", "rho", "gamma", "decay"),
    "eps": ("eps", "epsilon"),
    "momentum": ("momentum",),
}


class Words:
    """Cells and lists in one language."""

    def __init__(self, language):
        self.chinese = language == "zh"
        self.comma, self.colon = ("，", "：") if self.chinese else (", ", ": ")
        self.semicolon, self.stop = ("；", "。") if self.chinese else ("; ", ". ")

    def __call__(self, word):
        return ZH.get(word, word) if self.chinese else word

    def of(self, text):
        """The language's own, of a text or a pair of texts."""
        return text if isinstance(text, str) else text[self.chinese]

    def either(self, choices):
        """Choices such as `L2, decoupled or corrected`."""
        *first, last = map(self, choices)
        if not first:
            return last
        between = "" if self.chinese else " "
        listed = ("、" if self.chinese else ", ").join(first)
        return f"{listed}{between}{self('or')}{between}{last}"

    def listed(self, names):
        return ("、" if self.chinese else ", ").join(names)


def side_of_eps(settings):
    return "under" if settings["eps_in_sqrt"] else "outside"


def side_of_lr(settings):
    return "inside" if settings["lr_in_momentum"] else "outside"


def kind_of_decay(settings):
    return "decoupled" if settings["decoupled_weight_decay"] else "L2"


def option_of(name, options):
    """The dialect's argument among these names, or None."""
    return next((o for o in options if o in parameters(name)), None)


def flipped(name, option):
    return {option: not parameters(name)[option].default}


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
    """What each dialect does where frameworks differ."""
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
    """What tests compare the dialect with: a recorded run, a transcription, or both."""
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


FRAMEWORKS = {
    "torch": "torch",
    "timm": "timm",
    "bitsandbytes": "bitsandbytes",
    "keras": "Keras",
    "tensorflow": "TensorFlow 1",
    "paddle": "Paddle",
    "mindspore": "MindSpore",
    "mlx": "MLX",
    "chainer": "Chainer",
    "optimisers_jl": "Optimisers.jl",
    "stable_baselines3": "Stable-Baselines3",
    "optax": "optax",
}


def grouped(pairs, words):
    """A sentence for each key, which lists its values."""
    groups = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    parts = [f"{k}{words.colon}{words.listed(v)}" for k, v in groups.items()]
    text = words.stop.join(parts) + words.stop.rstrip()
    if words.chinese:
        return text
    lines = textwrap.fill(
        text,
        88,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return lines.lstrip()


def names_elsewhere(options):
    """How frameworks call an argument, with their defaults."""

    def make(language):
        words = Words(language)
        pairs = []
        for name, framework in FRAMEWORKS.items():
            argument = option_of(name, options)
            if argument is None:
                continue
            default = parameters(name)[argument].default
            required = default is parameters(name)[argument].empty
            value = words("no default") if required else number(default)
            pairs.append((f"`{argument}`{words.comma}{value}", framework))
        return grouped(pairs, words)

    return make


def sides_elsewhere(sides, option_names, setting, **case):
    """On which side of a switch frameworks stand, and which argument moves them."""

    def make(language):
        words = Words(language)
        pairs = []
        for name, framework in FRAMEWORKS.items():
            settings = given(name, **case)
            if settings is None:
                continue
            if option := option_of(name, option_names):
                (value,) = flipped(name, option).values()
                unless = f"（除非 `{option}={value}`）" if words.chinese else ""
                framework += unless or f" (unless `{option}={value}`)"
            pairs.append((bool(settings[setting]), framework))
        pairs.sort(key=lambda pair: pair[0])
        return grouped(((words.of(sides[on]), name) for on, name in pairs), words)

    return make


table("elsewhere-learning_rate")(names_elsewhere(("lr", "learning_rate", "step_size")))
table("elsewhere-decay")(names_elsewhere(ARGUMENTS["decay"]))
table("elsewhere-eps")(names_elsewhere(ARGUMENTS["eps"]))
table("elsewhere-eps_in_sqrt")(
    sides_elsewhere(
        (("Outside", "根号外"), ("Under", "根号内")),
        ("eps_in_sqrt", "eps_inside_sqrt"),
        "eps_in_sqrt",
    )
)
table("elsewhere-lr_in_momentum")(
    sides_elsewhere(
        (("Outside", "缓冲区外"), ("Inside", "缓冲区内")),
        ("lr_in_momentum",),
        "lr_in_momentum",
        momentum=0.9,
    )
)
table("elsewhere-initial_scale")(
    sides_elsewhere(
        (("From 0", "从 0 开始"), ("From 1", "从 1 开始")), (), "initial_scale"
    )
)
