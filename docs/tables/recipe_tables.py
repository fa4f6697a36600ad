"""The tables of published recipes in choosing.md and dialects.md."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from generated import digits, number, rows_of, table
from settings import settings_in
from sources import SOURCES, linked

# The columns after the first, in the order of the table.
COLUMNS = "decay", "epsilon", "momentum", "learning rate", "clipping", "weight decay"
# The recipe, its call in a page's block, the images of a batch where the learning rate
# is per 256 images, and cells that the call cannot tell: where the source does not say,
# or clips something else than gradients.
RECIPES = {
    "Hinton, lecture 6e": (
        "hinton",
        None,
        {"epsilon": "-", "learning rate": "-"},
    ),
    "Graves 2013, handwriting": (
        "graves",
        None,
        {"clipping": "derivatives inside the network"},
    ),
    "char-rnn": ("char_rnn", None, {}),
    "DQN in Nature": ("dqn", None, {"clipping": "of the error"}),
    "A3C, Atari": ("a3c", None, {}),
    "A2C of Stable-Baselines3": ("a2c", None, {}),
    "IMPALA, DeepMind Lab": ("impala", None, {}),
    "QMIX in PyMARL": ("qmix", None, {}),
    "WGAN": ("wgan", None, {"clipping": "the critic's weights to ±0.01"}),
    "Inception-v3, paper": (
        "inception_v3_paper",
        None,
        {"epsilon": "1", "clipping": "threshold 2"},
    ),
    "Inception v3 on TPU": ("inception_v3", 1024, {}),
    "Inception v4 on TPU": ("inception_v4", 256, {}),
    "MobileNet v1 on TPU": ("mobilenet_v1", 1024, {}),
    "MobileNet v2, slim": ("mobilenet_v2", None, {}),
    "MobileNetV3, torchvision": ("mobilenet_v3", None, {}),
    "AmoebaNet": ("amoebanet", None, {}),
    "MnasNet": ("mnasnet", 1024, {}),
    "EfficientNet": ("efficientnet", 2048, {}),
    "DPO, released code": ("dpo", None, {}),
}
COUNTS = np.unique(np.geomspace(1, 2e7, 4000).astype(np.int32))
SHOWN = (0, 1000, 10_000, 100_000, 1_000_000)


@functools.cache
def published():
    return settings_in("dialects.md", "Published settings")


@functools.cache
def others():
    return settings_in("choosing.md", "What others use")


def rates_of(learning_rate, counts):
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        return np.asarray(jax.vmap(learning_rate)(jnp.asarray(counts, jnp.int32)))


def rate_cell(learning_rate, batch):
    """The peak, and whether there is a way up to it and down from it."""
    if not callable(learning_rate):
        return number(learning_rate)
    rates = rates_of(learning_rate, [0, *COUNTS])
    peak = rates.max()
    cell = digits(peak * 256 / batch if batch else peak, 3)
    cell += " per 256 images" if batch else ""
    cell += ", rising" if rates[0] < 0.99 * peak else ""
    if rates[-1] < 0.99 * peak:
        # An exponential decay, too, is 0 in float32 at last, after tiny numbers.
        to_0 = rates[-1] == 0 and rates[rates > 0].min() > 1e-6 * peak
        cell += ", falling to 0" if to_0 else ", falling"
    return cell


def clipping_cell(settings):
    if norm := settings.get("clip_by_global_norm"):
        return f"norm {number(norm)}"
    if limit := settings.get("clip"):
        return f"each number to ±{number(limit)}"
    return "-"


def row(name, call, batch, cells):
    settings = (published() | others())[call]
    side = "under" if settings["eps_in_sqrt"] else "outside"
    decay = settings.get("add_decayed_weights") or settings["weight_decay"]
    found = {
        "decay": number(settings["decay"]) + ", centered" * settings["centered"],
        "epsilon": f"{number(settings['eps'])} {side}",
        "momentum": number(settings["momentum"]) if settings["momentum"] else "-",
        "clipping": clipping_cell(settings),
        "weight decay": number(decay) if decay else "-",
    }
    if "learning rate" not in cells:
        found["learning rate"] = rate_cell(settings["learning_rate"], batch)
    found |= cells
    source, *_ = SOURCES[call]
    return [linked(name, source), *(found[column] for column in COLUMNS)]


@table("recipes")
def recipes(language):
    """The settings in the calls of published recipes."""
    rows = [row(name, *recipe) for name, recipe in RECIPES.items()]
    return rows_of(["recipe", *COLUMNS], rows)


@table("rates", tolerance=0.001)
def rates(language):
    """The learning rates of the published settings that have a schedule."""
    rows = []
    for name, settings in published().items():
        if callable(settings["learning_rate"]):
            found = rates_of(settings["learning_rate"], SHOWN)
            rows.append([f"`{name}`", *(digits(float(r), 4) for r in found)])
    first = "更新次数" if language == "zh" else "updates"
    return rows_of([first, *(f"{n:,}".replace(",", " ") for n in SHOWN)], rows)
