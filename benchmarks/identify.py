"""Identify recorded runs, and count those that are found.

    python benchmarks/identify.py

takes every run that was recorded of a framework (tests/peers), random settings of the
NumPy reference (tests/reference.py) in float32 and bfloat16, and runs of optimizers
that are no RMSprop. A run counts as found if its dialect, or its settings within 1 %
(in bfloat16 10 %), is among the answers. Writes results/identify.json: what was found,
and the seconds.

Of a framework, some steps were recorded; its dialect, which equals them there within
1e-4, makes those between.
"""

import argparse
import collections
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop import dialects, rmsprop
from optax_rmsprop.identify import identify

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from peers.record import KEPT, problem  # noqa: E402
from reference import rmsprop as reference  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "identify.json"
STEPS, WIDTH = 40, 48
RATES = np.float32(1e-2 * (1 + 0.5 * np.sin(np.arange(STEPS))))
OTHERS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "sgd": optax.sgd(1e-1, momentum=0.9),
    "lion": optax.lion(1e-3),
    "adagrad": optax.adagrad(1e-2),
    "adadelta": optax.adadelta(1e-1),
    "adabelief": optax.adabelief(1e-2),
    "yogi": optax.yogi(1e-2),
    "clipped by norm": optax.chain(optax.clip_by_global_norm(2.0), rmsprop(1e-2)),
    "clipped by value": optax.chain(optax.clip(0.3), rmsprop(1e-2)),
}


def gradients(rng):
    sizes = 10 ** rng.uniform(-3, 0, WIDTH)
    noise = rng.normal(size=(STEPS, WIDTH)) + rng.normal(size=WIDTH)
    return (sizes * noise).astype(np.float32)


def steps_of(tx, params, grads):
    history, state = [params], tx.init(jnp.asarray(params))
    for g in grads:
        updates, state = tx.update(jnp.asarray(g), state, jnp.asarray(history[-1]))
        history.append(history[-1] + np.asarray(updates))
    return np.stack(history)


def recorded_runs():
    params, grads, rates = problem()
    table = jnp.asarray(rates)
    for name in dialects.__all__:
        file = TESTS / "peers" / "recorded" / f"{name}.json"
        if not file.exists():  # dqn2015 and optimisers_jl were transcribed, not run
            continue
        for i, result in enumerate(json.loads(file.read_text())["results"]):
            tx = getattr(dialects, name)(lambda step: table[step], **result["case"])
            history = steps_of(tx, params, grads)
            kept = np.float32(result["params"])
            np.testing.assert_allclose(history[1:][KEPT], kept, rtol=1e-4)

            def is_found(found, name=name):
                return any(f.call.startswith(f"dialects.{name}(") for f in found)

            yield f"{name} {i}", (history, grads, rates), is_found


def random_runs(count, dtype, tolerance):
    rng = np.random.default_rng(0)
    for _ in range(count):
        choose = lambda *values: values[rng.integers(len(values))]  # noqa: E731
        options = {
            "decay": rng.uniform(0.8, 0.995),
            "eps": 10 ** rng.uniform(-4, -1),
            "momentum": choose(0.0, 0.5, 0.9, rng.uniform(0.3, 0.95)),
            "weight_decay": choose(0.0, 10 ** rng.uniform(-2, -0.5)),
            "initial_scale": choose(0.0, 1.0),
        }
        for switch in (
            *("centered", "nesterov", "decoupled_weight_decay", "eps_in_sqrt"),
            *("lr_in_momentum", "bias_correction", "maximize"),
        ):
            options[switch] = choose(False, True)
        if options["bias_correction"]:  # which forgets the start
            options["initial_scale"] = 0.0
        grads, start = gradients(rng), rng.normal(size=WIDTH)
        if dtype == jnp.bfloat16:  # so that a step is several times the last place
            start = start / 100
        rate = lambda step: float(RATES[step])  # noqa: E731
        run = reference(start, grads.astype(np.float64), rate, **options)
        history = np.stack([start, *(params for params, _ in run)]).astype(dtype)

        def is_found(found, options=options):
            return any(matches(f, options, tolerance) for f in found)

        yield f"{options}", (history, grads, RATES), is_found


def matches(finding, options, tolerance):
    numbers = {
        **finding.numbers,
        "weight_decay": finding.numbers["l2"] + finding.numbers["decoupled"],
        "initial_scale": finding.numbers["initial"],
    }
    if options["eps"] < 10 * finding.eps_up_to:  # a power of ten
        numbers["eps"] = options["eps"]
    names = ("decay", "eps", "momentum", "weight_decay", "initial_scale")
    return all(
        np.isclose(numbers[name], options[name], rtol=tolerance, atol=1e-6)
        for name in names
    )


def other_runs():
    rng = np.random.default_rng(1)
    for name, tx in OTHERS.items():
        grads = gradients(rng)
        start = rng.normal(size=WIDTH).astype(np.float32)
        run = steps_of(tx, start, grads), grads, 1e-2
        yield name, run, lambda found: not found


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--random", type=int, default=200, help="how many (200)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    kinds = {
        "recorded": recorded_runs(),
        "random, float32": random_runs(args.random, np.float32, 0.01),
        "random, bfloat16": random_runs(args.random // 4, jnp.bfloat16, 0.1),
        "other optimizers": other_runs(),
    }
    report = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "kinds": {},
    }
    for kind, runs in kinds.items():
        seconds, missed = [], collections.OrderedDict()
        for name, run, is_found in runs:
            start = time.perf_counter()
            found = identify(*run)
            seconds.append(time.perf_counter() - start)
            if not is_found(found):
                missed[name] = str(found)
        report["kinds"][kind] = {
            "runs": len(seconds),
            "found": len(seconds) - len(missed),
            "median_s": statistics.median(seconds),
            "most_s": max(seconds),
            "missed": missed,
        }
        row = report["kinds"][kind]
        print(
            f"{kind}: {row['found']} of {row['runs']}, {row['median_s']:.1f} s each, "
            f"at most {row['most_s']:.1f} s",
            flush=True,
        )
        for name, text in missed.items():
            print(f"  not found: {name}\n{text}")
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row["missed"] for row in report["kinds"].values()))


if __name__ == "__main__":
    sys.exit(main())
