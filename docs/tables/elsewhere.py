"""The lists "Elsewhere" of parameters.md: an argument in other frameworks."""

import textwrap

from generated import number, table
from settings import ARGUMENTS, flipped, given, option_of, parameters
from words import Words

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
