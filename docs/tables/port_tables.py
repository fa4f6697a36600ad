"""The table in choosing.md of JAX programs whose RMSprop is not their original's.

The block under "Recipes found in the wild" has a pair for each program: its own
optimizer, and one with the original's numbers. Both minimize one noisy quadratic for
1000 steps,

    loss = Σ sᵢ uᵢ² / 2        uᵢ = pᵢ / (1000 * learning_rate), which starts at 1
    gᵢ = sᵢ (uᵢ + noise)       noise normal with deviation 1, the same for both

where the scales sᵢ of 61 parameters go from 1e-6 to 1 in equal ratios, as gradients
differ between layers. gᵢ is the gradient up to a constant factor. Lengths are counted
in learning rates, so the learning rate cancels out. The difference is the distance
between the two at the end, as a share of the way that the original has gone. Another
seed of the noise changes it by up to an eighth of itself, rounding in the sixth digit.
"""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from generated import digits, number, rows_of, table
from optax_rmsprop import dialects
from settings import DOCS, recorded
from sources import linked

STEPS = 1000
SCALES = np.geomspace(1e-6, 1, 61)
NOISE = np.random.default_rng(0).normal(size=(STEPS, SCALES.size))

# The file of a program, and that of its original.
SOURCES = {
    "a2c": (
        "A2C, unstable-baselines",
        "mmcaulif/unstable-baselines/Algorithms/A2C.py",
        "Stable-Baselines3",
        "DLR-RM/stable-baselines3/stable_baselines3/a2c/a2c.py",
    ),
    "dqn": (
        "DQN, HELX",
        "epignatelli/helx/examples/dqn_bsuite_catch.py",
        "DQN in Nature",
        "kuz/DeepMind-Atari-Deep-Q-Learner/dqn/NeuralQLearner.lua",
    ),
    "impala": (
        "IMPALA, minimal-rl-nnx",
        "jinPrelude/minimal-rl-nnx/impala.py",
        "TorchBeast",
        "facebookresearch/torchbeast/torchbeast/monobeast.py",
    ),
    "wgan": (
        "WGAN, wgan_in_jax",
        "arthurPignet/wgan_in_jax/src/wgan.py",
        "WassersteinGAN",
        "martinarjovsky/WassersteinGAN/main.py",
    ),
    "efficientnet": (
        "EfficientNet-Lite, HeterogeneousQuantization",
        "https://github.com/Intelligent-Microsystems-Lab/HeterogeneousQuantization/blob/"
        "df7b98b0a232bcd3b2737d02f14a264e1953424e/examples/train_utils.py",
        "EfficientNet",
        "tensorflow/tpu/models/official/efficientnet/utils.py",
    ),
}


def pairs():
    """By name, the two optimizers of a program, and the settings of each."""
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    section = page.split("\n## Recipes found in the wild\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    original, scope = optax.rmsprop, {}

    def noted(*args, **kwargs):
        dialects.optax(*args, **kwargs)  # its settings are recorded
        return original(*args, **kwargs)

    with recorded() as seen, mock.patch.object(optax, "rmsprop", noted):
        exec(compile(code, "choosing.md", "exec"), scope)
    names = [name for name in scope if name in SOURCES]
    found = zip(names, seen[::2], seen[1::2], strict=True)
    return {name: (*scope[name], theirs, its) for name, theirs, its in found}


def end(tx, learning_rate):
    """The parameters after all steps, in 1000 learning rates."""
    length = STEPS * learning_rate
    scales = jnp.asarray(SCALES, jnp.float32)

    def step(carry, noise):
        p, state = carry
        updates, state = tx.update(scales * (p / length + noise), state, p)
        return (optax.apply_updates(p, updates), state), None

    start = jnp.full(SCALES.size, length, jnp.float32)
    noise = jnp.asarray(NOISE, jnp.float32)
    (p, _), _ = jax.lax.scan(step, (start, tx.init(start)), noise)
    return np.asarray(p, np.float64) / length


def parts(settings):
    side = "under" if settings["eps_in_sqrt"] else "outside"
    momentum = settings["momentum"]
    return (
        f"decay {number(settings['decay'])}",
        f"epsilon {digits(settings['eps'], 3)} {side}",
        f"momentum {number(momentum)}" if momentum else "no momentum",
        f"start {number(settings['initial_scale'])}",
        "centered" if settings["centered"] else "not centered",
    )


@table("ports", tolerance=0.05)
def ports(language):
    """What differs in each pair, and how far apart it ends."""
    rows = []
    for name, (tx, original, theirs, its) in pairs().items():
        program, file, source, source_file = SOURCES[name]
        p, q = (end(t, its["learning_rate"]) for t in (tx, original))
        apart = np.linalg.norm(p - q) / np.linalg.norm(1 - q)
        both = zip(parts(theirs), parts(its), strict=True)
        differing = zip(*((a, b) for a, b in both if a != b), strict=True)
        as_it_is, in_original = map(", ".join, differing)
        links = linked(program, file), linked(source, source_file)
        numbers = as_it_is, in_original, f"{digits(100 * apart)} %"
        rows.append([*links, *numbers])
    header = "program", "its original", "as it is", "the original's", "difference"
    return rows_of(header, rows)
