"""Record what each framework's RMSprop does, to compare its dialect with.

    python tests/peers/record.py FRAMEWORK

needs numpy and the framework, in an environment of its own; not jax, nor this package.
It runs 60 steps with every option that changes numbers, a learning rate that changes
every step, gradients of sizes 1e-4 to 10, and an eps that shows where it stands, and
writes recorded/FRAMEWORK.json.

    pip install torch==2.13.0                   torch
    pip install torch==2.13.0 && pip install --no-deps timm stable_baselines3
                                                timm, stable_baselines3
    pip install torch==2.13.0 bitsandbytes      bitsandbytes
    pip install tensorflow-cpu keras tf_keras   tensorflow, tf_keras, keras
    pip install paddlepaddle setuptools         paddle
    pip install mindspore                       mindspore, mindspore_vectors
    pip install "mlx[cpu]" numpy                mlx
    pip install jax optax                       jax_example_libraries, optax
    pip install "numpy<1.24" "setuptools<60" wheel six filelock protobuf==3.20.3
    pip install --no-build-isolation --no-deps chainer==7.8.1   chainer, graves2013
"""

import argparse
import functools
import importlib
import inspect
import itertools
import json
import platform
import sys
import types
from importlib import metadata
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "recorded"
SEED = 0
STEPS = 60
KEPT = [0, 1, 2, 5, 10, 20, 40, 59]
EPS = 1e-2
MOMENTUM = 0.9
WEIGHT_DECAY = 0.1


def problem():
    rng = np.random.default_rng(SEED)
    params = np.array([1.0, -2.0, 0.5, 3.0, -0.7], np.float32)
    sizes = np.array([1e-4, 1e-3, 1e-2, 1.0, 10.0])
    gradients = (rng.normal(size=(STEPS, 5)) * sizes).astype(np.float32)
    learning_rates = 1e-2 * (1 + 0.5 * np.sin(np.arange(STEPS)))
    return params, gradients, learning_rates.astype(np.float32)


def options(**choices):
    """Every combination of the choices, as arguments of the dialect."""
    names, values = choices.keys(), itertools.product(*choices.values())
    return [dict(zip(names, combination, strict=True)) for combination in values]


def run_torch_optimizer(make, params, gradients, learning_rates):
    """The parameters of any optimizer with torch's interface."""
    import torch

    p = torch.nn.Parameter(torch.tensor(params))
    optimizer = make([p])
    for g, lr in zip(gradients, learning_rates, strict=True):
        optimizer.param_groups[0]["lr"] = float(lr)
        p.grad = torch.tensor(g)
        optimizer.step()
        yield p.detach().numpy().copy()


def torch(case, *run):
    return run_torch_optimizer(lambda p: original("torch")(p, **case), *run)


# Where each dialect's original is.
ORIGINALS = {
    "torch": "torch.optim:RMSprop",
    "timm": "timm.optim.rmsprop_tf:RMSpropTF",
    "stable_baselines3": (
        "stable_baselines3.common.sb2_compat.rmsprop_tf_like:RMSpropTFLike"
    ),
    "bitsandbytes": "bitsandbytes.optim:RMSprop",
    "tensorflow": "tensorflow.compat.v1.train:RMSPropOptimizer",
    "tf_keras": "tf_keras.optimizers.legacy:RMSprop",
    "keras": "keras.optimizers:RMSprop",
    "paddle": "paddle.optimizer:RMSProp",
    "mindspore": "mindspore.nn:RMSProp",
    "mindspore_vectors": "mindspore.nn:RMSProp",
    "mlx": "mlx.optimizers:RMSprop",
    "chainer": "chainer.optimizers:RMSprop",
    "graves2013": "chainer.optimizers:RMSpropGraves",
    "jax_example_libraries": "jax.example_libraries.optimizers:rmsprop_momentum",
    "optax": "optax:rmsprop",
}


def original(framework):
    module, _, name = ORIGINALS[framework].partition(":")
    if framework in ("timm", "stable_baselines3"):
        return getattr(without_its_package(module), name)
    if framework == "tensorflow":  # whose compat.v1.train is no module
        return importlib.import_module("tensorflow").compat.v1.train.RMSPropOptimizer
    return getattr(importlib.import_module(module), name)


def signature_of(framework):
    """The arguments that take a position, each with its default or "required"."""
    function = original(framework)
    if framework.startswith("mindspore"):  # a decorator hides its arguments
        (hidden,) = function.__init__.__closure__
        function = functools.partial(hidden.cell_contents, None)
    return [
        [p.name, "required" if p.default is p.empty else p.default]
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]


def without_its_package(name):
    """Import a module, but not the packages around it, which need half the world."""
    if name in sys.modules:
        return sys.modules[name]
    packages = name.split(".")[:-1]
    folder = metadata.distribution(packages[0]).locate_file("")
    for depth in range(1, len(packages) + 1):
        package = types.ModuleType(".".join(packages[:depth]))
        package.__path__ = [str(Path(folder, *packages[:depth]))]
        sys.modules[package.__name__] = package
    return importlib.import_module(name)


def timm(case, *run):
    case = dict(case)
    lr = case.pop("max_lr", 1.0)
    return run_torch_optimizer(lambda p: original("timm")(p, lr, **case), *run)


def stable_baselines3(case, *run):
    optimizer = original("stable_baselines3")
    return run_torch_optimizer(lambda p: optimizer(p, **case), *run)


def bitsandbytes(case, *run):
    return run_torch_optimizer(lambda p: original("bitsandbytes")(p, **case), *run)


def run_keras_optimizer(optimizer, params, gradients, learning_rates):
    import tensorflow as tf

    p = tf.Variable(params)
    for g, lr in zip(gradients, learning_rates, strict=True):
        optimizer.learning_rate = float(lr)
        optimizer.apply_gradients([(tf.constant(g), p)])
        yield p.numpy()


def keras(case, *run):
    return run_keras_optimizer(original("keras")(**case), *run)


def tf_keras(case, *run):
    return run_keras_optimizer(original("tf_keras")(**case), *run)


def tensorflow(case, params, gradients, learning_rates):
    import tensorflow as tf

    p = tf.Variable(params)
    now = iter(learning_rates)
    optimizer = original("tensorflow")(lambda: float(next(now)), **case)
    for g in gradients:
        optimizer.apply_gradients([(tf.constant(g), p)])
        yield p.numpy()


def paddle(case, params, gradients, learning_rates):
    import paddle

    p = paddle.create_parameter(params.shape, "float32")
    p.set_value(params)
    optimizer = original("paddle")(0.1, parameters=[p], **case)
    for g, lr in zip(gradients, learning_rates, strict=True):
        optimizer.set_lr(float(lr))
        (p * paddle.to_tensor(g)).sum().backward()
        optimizer.step()
        optimizer.clear_grad()
        yield p.numpy().copy()


def mindspore(case, params, gradients, learning_rates):
    import mindspore as ms

    p = ms.Parameter(ms.Tensor(params), name="weight")
    schedule = [float(lr) for lr in learning_rates]
    optimizer = original("mindspore")([p], schedule, **case)
    for g in gradients:
        optimizer((ms.Tensor(g),))
        yield p.asnumpy().copy()


def mindspore_vectors(case, params, gradients, learning_rates):
    """Another kernel: of MindSpore's CPU, not centered, for 8 elements and more."""
    run = np.tile(params, 8), np.tile(gradients, (1, 8)), learning_rates
    for p in mindspore(case, *run):
        yield p[: len(params)]


def mlx(case, params, gradients, learning_rates):
    import mlx.core as mx

    table = mx.array(learning_rates)
    optimizer = original("mlx")(lambda step: table[step], **case)
    p = {"p": mx.array(params)}
    for g in gradients:
        p = optimizer.apply_gradients({"p": mx.array(g)}, p)
        yield np.array(p["p"])


def run_chainer(optimizer, params, gradients, learning_rates):
    import chainer

    link = chainer.Link()
    with link.init_scope():
        link.p = chainer.Parameter(params.copy())
    optimizer.setup(link)
    for g, lr in zip(gradients, learning_rates, strict=True):
        optimizer.lr = lr
        link.p.grad = g
        optimizer.update()
        yield link.p.array.copy()


def chainer(case, *run):
    return run_chainer(original("chainer")(**case), *run)


def graves2013(case, *run):
    return run_chainer(original("graves2013")(**case), *run)


def jax_example_libraries(case, params, gradients, learning_rates):
    import jax.numpy as jnp
    from jax.example_libraries import optimizers

    table = jnp.asarray(learning_rates)
    name = "rmsprop_momentum" if "momentum" in case else "rmsprop"
    init, update, get_params = getattr(optimizers, name)(lambda i: table[i], **case)
    state = init(params)
    for i, g in enumerate(gradients):
        state = update(i, g, state)
        yield np.asarray(get_params(state))


def optax(case, params, gradients, learning_rates):
    import jax.numpy as jnp
    import optax

    table = jnp.asarray(learning_rates)
    tx = optax.rmsprop(lambda count: table[count], **case)
    p = jnp.asarray(params)
    state = tx.init(p)
    for g in gradients:
        updates, state = tx.update(jnp.asarray(g), state, p)
        p = optax.apply_updates(p, updates)
        yield np.asarray(p)


BOTH = (False, True)
MOMENTA = (0.0, MOMENTUM)
DECAYS = (0.0, WEIGHT_DECAY)
PEAK = float(problem()[2].max())
IN_TIMM = options(eps=[EPS], momentum=MOMENTA, centered=BOTH, lr_in_momentum=BOTH)
DECAYS_IN_TIMM = [
    {},
    {"weight_decay": WEIGHT_DECAY},
    {"weight_decay": WEIGHT_DECAY, "decoupled_decay": True},
    {
        "weight_decay": WEIGHT_DECAY,
        "decoupled_decay": True,
        "corrected_weight_decay": True,
        "max_lr": PEAK,
    },
]
LIKE_TORCH = options(eps=[EPS], momentum=MOMENTA, centered=BOTH, weight_decay=DECAYS)
LIKE_TENSORFLOW = options(epsilon=[EPS], momentum=MOMENTA, centered=BOTH)
LIKE_PADDLE = options(
    epsilon=[EPS], momentum=MOMENTA, centered=BOTH, weight_decay=DECAYS
)
# By the dialect's name: what runs the framework, its packages, the dialect's arguments.
FRAMEWORKS = {
    "torch": (
        torch,
        ["torch"],
        LIKE_TORCH + options(eps=[EPS], alpha=[0.9], maximize=[True], centered=BOTH),
    ),
    "timm": (
        timm,
        ["timm", "torch"],
        [{**case, **decay} for case in IN_TIMM for decay in DECAYS_IN_TIMM],
    ),
    "stable_baselines3": (
        stable_baselines3,
        ["stable_baselines3", "torch"],
        LIKE_TORCH,
    ),
    "bitsandbytes": (
        bitsandbytes,
        ["bitsandbytes", "torch"],
        options(eps=[EPS], alpha=[0.99, 0.9], weight_decay=DECAYS),
    ),
    "tensorflow": (
        tensorflow,
        ["tensorflow"],
        options(epsilon=[EPS], decay=[0.9, 0.99], momentum=MOMENTA, centered=BOTH),
    ),
    "tf_keras": (tf_keras, ["tf_keras", "tensorflow"], LIKE_TENSORFLOW),
    "keras": (keras, ["keras", "tensorflow"], LIKE_PADDLE),
    "paddle": (paddle, ["paddlepaddle"], LIKE_PADDLE),
    "mindspore": (mindspore, ["mindspore"], LIKE_PADDLE),
    "mindspore_vectors": (
        mindspore_vectors,
        ["mindspore"],
        [case for case in LIKE_PADDLE if not case["centered"]],
    ),
    "mlx": (mlx, ["mlx"], options(eps=[EPS], alpha=[0.99, 0.9])),
    "chainer": (
        chainer,
        ["chainer"],
        options(eps=[EPS], alpha=[0.99, 0.9], eps_inside_sqrt=BOTH),
    ),
    "graves2013": (
        graves2013,
        ["chainer"],
        options(eps=[EPS, 1e-4], alpha=[0.95, 0.9], momentum=MOMENTA),
    ),
    "jax_example_libraries": (
        jax_example_libraries,
        ["jax"],
        [{"eps": EPS}, {"eps": EPS, "momentum": MOMENTUM}],
    ),
    "optax": (
        optax,
        ["optax", "jax"],
        [
            {**case, **momentum, **start}
            for case in options(eps=[EPS], eps_in_sqrt=BOTH, centered=BOTH)
            for momentum in (
                {},
                {"momentum": MOMENTUM},
                {"momentum": MOMENTUM, "nesterov": True},
            )
            for start in ({}, {"initial_scale": 1.0}, {"bias_correction": True})
            # Both: the first update divides by the root of a rounding error, or NaN.
            if not (case["centered"] and "bias_correction" in start)
        ],
    ),
}


def record(framework):
    run, packages, cases = FRAMEWORKS[framework]
    results = []
    for case in cases:
        history = list(run(case, *problem()))
        results.append({"case": case, "params": [history[i].tolist() for i in KEPT]})
    params, gradients, learning_rates = problem()
    return {
        "versions": {name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "signature": signature_of(framework),
        "seed": SEED,
        "kept": KEPT,
        "params": params.tolist(),
        "gradients": gradients.tolist(),
        "learning_rates": learning_rates.tolist(),
        "results": results,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("framework", choices=FRAMEWORKS)
    framework = parser.parse_args().framework
    recorded = record(framework)
    path = FOLDER / f"{framework}.json"
    path.write_text(json.dumps(recorded) + "\n")
    versions = " ".join(f"{k} {v}" for k, v in recorded["versions"].items())
    print(f"{path.name}: {len(recorded['results'])} cases from {versions}")


if __name__ == "__main__":
    main()
