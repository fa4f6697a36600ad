"""docs/choosing.md: what its table says of recipes, their calls do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from test_dialects_page import DEFAULTS, DOCS, PUBLISHED, settings_in

PAGE = (DOCS / "choosing.md").read_text()
OTHERS = settings_in(PAGE.split("\n## What others use\n")[1].split("\n## ")[0])
HEAD = "recipe | decay | epsilon | momentum | learning rate | clipping | weight decay"
TABLE = PAGE.split(HEAD)[1].split("\n\n")[0].splitlines()[2:]
ROWS = {row.split(" | ")[0]: row.split(" | ")[1:] for row in TABLE}
# The calls of each row, and their images in a batch.
CALLS = {
    "Hinton, lecture 6e": {"hinton": 0},
    "Graves 2013, handwriting": {"graves": 0},
    "char-rnn": {"char_rnn": 0},
    "DQN in Nature": {"dqn": 0},
    "A3C, Atari": {"a3c": 0},
    "A2C of Stable-Baselines3": {"a2c": 0},
    "IMPALA, DeepMind Lab": {"impala": 0},
    "QMIX in PyMARL": {"qmix": 0},
    "WGAN": {"wgan": 0},
    "Inception-v3, paper": {"inception_v3_paper": 1600},
    "Inception v3 on TPU": {"inception_v3": 1024},
    "Inception v4 on TPU": {"inception_v4": 256},
    "MobileNet v1 on TPU": {"mobilenet_v1": 1024},
    "MobileNet v2, slim": {"mobilenet_v2": 96},
    "MobileNetV3, torchvision": {"mobilenet_v3": 1024},
    "AmoebaNet": {"amoebanet": 32},
    "MnasNet, EfficientNet": {"mnasnet": 1024, "efficientnet": 2048},
    "DPO, released code": {"dpo": 0},
}
COUNTS = np.unique(np.geomspace(1, 2e7, 4000).astype(np.int32))


def first_number(cell):
    """Where the cell is a dash, 0."""
    return 0 if cell == "-" else float(re.search(r"[\d.]+(e-?\d+)?", cell)[0])


def test_every_recipe_has_a_call():
    assert ROWS.keys() == CALLS.keys()
    assert OTHERS.keys() <= {name for calls in CALLS.values() for name in calls}


@pytest.mark.parametrize("recipe", CALLS)
def test_the_table_says_what_the_calls_do(recipe):
    decay, epsilon, momentum, rate, clipping, weight_decay = ROWS[recipe]
    for name, batch in CALLS[recipe].items():
        settings = (OTHERS | PUBLISHED)[name][1]
        front = settings.keys() - DEFAULTS.keys()
        assert settings["decay"] == first_number(decay)
        assert settings["centered"] == ("centered" in decay)
        if epsilon != "-":
            assert settings["eps"] == first_number(epsilon)
            assert settings["eps_in_sqrt"] == ("outside" not in epsilon)
        assert (settings["momentum"] or 0) == first_number(momentum)
        for limit, pattern in (
            ("clip_by_global_norm", r"norm (\S+)|threshold (\S+)"),
            ("clip", r"each number to ±(\S+)"),
        ):
            said = re.match(pattern, clipping)
            assert (limit in front) == bool(said)
            if said:
                assert settings[limit] == first_number(clipping)
        factor = settings.get("add_decayed_weights") or settings["weight_decay"] or 0
        assert factor == first_number(weight_decay)
        if rate != "-":
            check_rate(rate, settings["learning_rate"], batch)


def check_rate(cell, rate, batch):
    if not callable(rate):
        assert rate == first_number(cell)
        assert "ing" not in cell
        return
    with jax.numpy_dtype_promotion("standard"):
        rates = np.array([rate(jnp.int32(0)), *jax.vmap(rate)(jnp.asarray(COUNTS))])
    images = batch / 256 if "per 256 images" in cell else 1
    assert rates.max() == pytest.approx(first_number(cell) * images, rel=4e-3)
    assert (rates[0] < 0.99 * rates.max()) == ("rising" in cell)
    assert (rates[-1] < 0.99 * rates.max()) == ("falling" in cell)
    assert rates[-1] == 0 or "to 0" not in cell
