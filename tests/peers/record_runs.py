"""Record runs that are to be carried into JAX, half way and at their end.

    pip install torch==2.13.0 && pip install --no-deps timm
    python tests/peers/record_runs.py timm

    pip install keras jax . && KERAS_BACKEND=jax python tests/peers/record_runs.py keras

A network of two parameters (and one that is frozen) makes ten steps, with a learning
rate that changes every step; its state is kept, and its parameters after ten more.
recorded/runs_FRAMEWORK.json has it all.

Keras' runs are also carried on the spot, by `from_keras` from the model and optimizer
themselves, and go on beside Keras. What they differ by at the end is recorded; too much
is an error.
"""

import argparse
import itertools
import json
from importlib import metadata

import numpy as np
from record import FOLDER, original

HALF = 10
LEARNING_RATES = [0.01 * (1 + 0.5 * np.sin(i)) for i in range(2 * HALF)]
SHAPES = {"weight": (2, 3), "bias": (2,)}
OPTIONS = [
    {"momentum": momentum, "centered": centered}
    for momentum, centered in itertools.product((0.0, 0.9), (False, True))
]


def gradients(name):
    rng = np.random.default_rng(sorted(SHAPES).index(name))
    return rng.normal(size=(2 * HALF, *SHAPES[name])).astype(np.float32)


def timm(options):
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = original("timm")(model.parameters(), lr=1.0, eps=1e-2, **options)
    for step, lr in enumerate(LEARNING_RATES):
        if step == HALF:
            yield {
                "model": {k: t.tolist() for k, t in model.state_dict().items()},
                "optimizer": {
                    "param_groups": optimizer.state_dict()["param_groups"],
                    "state": {
                        place: {k: t.tolist() for k, t in state.items()}
                        for place, state in optimizer.state_dict()["state"].items()
                    },
                },
            }
        optimizer.param_groups[0]["lr"] = lr
        for name, parameter in model.named_parameters():
            parameter.grad = torch.tensor(gradients(name)[step])
        optimizer.step()
    yield {k: t.tolist() for k, t in model.state_dict().items()}


def keras(options):
    import jax.numpy as jnp
    import keras
    from carried_keras import TOLERANCE, difference, go_on, port

    from optax_rmsprop import from_keras

    rates = jnp.asarray(LEARNING_RATES)
    keras.utils.set_random_seed(0)
    frozen = keras.layers.Dense(3, name="frozen", trainable=False)
    dense = keras.layers.Dense(2, name="dense")
    model = keras.Sequential([keras.Input((3,)), frozen, dense], name="net")
    excluded = options.pop("exclude", None)
    optimizer = keras.optimizers.RMSprop(1.0, epsilon=1e-2, **options)
    if excluded:
        optimizer.exclude_from_weight_decay(var_names=excluded)
    optimizer.build(model.trainable_variables)

    def listed(variables):
        return [[v.path, np.asarray(v).tolist()] for v in variables]

    for step, lr in enumerate(LEARNING_RATES):
        if step == HALF:
            carried = from_keras(model, optimizer, port, rates.__getitem__)
            yield {
                "config": optimizer.get_config(),
                "iterations": int(optimizer.iterations),
                "variables": listed(optimizer.variables),
                "weights": listed(model.weights),
                "trainable": [v.path for v in model.trainable_variables],
                "excluded": excluded or [],
            }
        optimizer.learning_rate = lr
        of_path = {"net/dense/kernel": gradients("weight")[step].T}
        of_path["net/dense/bias"] = gradients("bias")[step]
        variables = model.trainable_variables
        optimizer.apply([of_path[v.path] for v in variables], variables)
    end = dict(listed(model.weights))
    yield end
    all_gradients = {name: gradients(name) for name in SHAPES}
    params = go_on(carried, all_gradients, range(HALF, 2 * HALF))
    apart = difference(params, end)
    if not apart <= TOLERANCE:
        raise SystemExit(f"carried, a run with {options} ends {apart:.1e} from Keras'")
    yield apart


CASES = {
    "timm": [
        {**options, **more}
        for options in OPTIONS
        for more in (
            {},
            {"lr_in_momentum": False, "weight_decay": 0.1},
            {
                "weight_decay": 0.1,
                "decoupled_decay": True,
                "corrected_weight_decay": True,
            },
        )
    ],
    "keras": [
        {**options, **more}
        for options in OPTIONS
        for more in ({}, {"weight_decay": 0.1, "exclude": ["bias"]})
    ],
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("framework", choices=CASES)
    framework = parser.parse_args().framework
    runs = []
    for options in CASES[framework]:
        # For Keras, also record how far the carried run ends from it.
        names = ("half", "end", "carried")
        run = dict(zip(names, globals()[framework](dict(options)), strict=False))
        runs.append({"options": options, **run})
    record = {
        "versions": {framework: metadata.version(framework)},
        "half": HALF,
        "learning_rates": LEARNING_RATES,
        "gradients": {name: gradients(name).tolist() for name in SHAPES},
        "runs": runs,
    }
    path = FOLDER / f"runs_{framework}.json"
    path.write_text(json.dumps(record) + "\n")
    print(f"{len(runs)} runs in {path}")


if __name__ == "__main__":
    main()
