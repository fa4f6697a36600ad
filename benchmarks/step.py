"""Time one step of optax_rmsprop and of optax's, torch's and Keras' RMSprop.

A JAX step is one jitted update and apply with donated parameters and state; a torch
step is `optimizer.step()`, foreach, single-tensor and compiled; Keras' runs on JAX. On
a CPU with a C compiler there is a loop in C, which reads and writes everything once,
and on every device a copy: what the machine can do. All compute the same numbers, and
the run fails if they do not. Each round compiles the programs and allocates the buffers
anew, every other round in reverse: of two copies of one program, the one built first
may be 5 % faster, or slower. Then two or three competitors take turns in random order:
ours and optax; ours and a copy; ours and torch, whose threads would disturb the others.

With --single-pass, ours is in `single_pass`, and XLA's pass that joins loops is on.

A ratio is our time / theirs in the same turn, its median over the turns of a round. The
table has the geometric mean over rounds and, in brackets, the least and the greatest.
The last column is the bandwidth of our step as a fraction of that of a plain copy.
"""

import argparse
import ctypes
import datetime
import functools
import gc
import json
import os
import pathlib
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

import optax_rmsprop
from optax_rmsprop.wrappers import single_pass

try:
    import torch
except ImportError:
    torch = None
try:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
except ImportError:
    keras = None

LEAVES = {
    "1x32M": (1, 32_000_000),
    "160x150k": (160, 150_000),
    "1000x1000": (1000, 1000),
}
QUICK_LEAVES = {"1x1M": (1, 1_000_000), "16x15k": (16, 15_000), "100x100": (100, 100)}
OPTIONS = {
    "plain": {"centered": False, "momentum": 0.0},
    "momentum": {"centered": False, "momentum": 0.9},
    "centered+momentum": {"centered": True, "momentum": 0.9},
}
HYPERPARAMETERS = 1e-2, 0.99, 1e-8  # learning rate, decay, eps
# Ours takes turns with these. Each leaves its mark on the next: torch its threads,
# a copy the memory that it has swept out of the caches.
GROUPS = {
    "optax": ["optax"],
    "copy": ["copy"],
    "torch": ["torch foreach", "torch single"],
    "torch compile": ["torch compile"],
    "keras": ["keras"],
    "C loop": ["C loop"],
}
PEERS = [peer for peers in GROUPS.values() for peer in peers if peer != "copy"]
WARM_UP = 3
AGREEMENT = 1e-3  # between parameters of size 10; seen: 4e-5 after 280 steps
# The ratios that --check accepts; ADAM is in `single_pass` against itself.
LARGE = ("1x32M", "160x150k")
LIMITS = {
    "optax": dict.fromkeys(LEAVES, 1.05),
    "torch foreach": dict.fromkeys(LARGE, 0.75),
}
SINGLE_PASS_LIMITS = {
    "optax": dict.fromkeys(LARGE, 0.75) | {"1000x1000": 1.05},
    "C loop": dict.fromkeys(LARGE, 1.15),
    "torch compile": dict.fromkeys(LARGE, 1.0),
}
JOIN_LOOPS = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"
ADAM = "adam"
TABLE_HEAD = f"""\
leaves | options | ours, ms | {" | ".join(f"to {peer}" for peer in PEERS)} | \
build ours / optax, s | bandwidth
{"|".join(["---"] * (5 + len(PEERS)))}"""


class JaxSteps:
    """Compiles an optax transform's update and apply, and runs it.

    With `loop`, one run is as many steps with the same gradients.
    """

    def __init__(self, transform, params, gradient_sets, loop=1):
        def step(params, state, grads):
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def steps(params, state, grads):
            body = lambda _, run: step(*run, grads)  # noqa: E731
            return jax.lax.fori_loop(0, loop, body, (params, state))

        self.params = jax.tree.map(jnp.copy, params)
        self.state = transform.init(self.params)
        self.gradient_sets = gradient_sets
        self.step = jax.jit(step if loop == 1 else steps, donate_argnums=(0, 1))
        start = time.perf_counter()
        lowered = self.step.lower(self.params, self.state, gradient_sets[0])
        middle = time.perf_counter()
        # Calls of `self.step` find this program, and are faster than calls of its own.
        lowered.compile()
        end = time.perf_counter()
        self.build_s = {"lower": middle - start, "compile": end - middle}

    def use(self, gradient_set):
        self.grads = self.gradient_sets[gradient_set]

    def run(self):
        self.params, self.state = self.step(self.params, self.state, self.grads)

    def wait(self):
        jax.block_until_ready((self.params, self.state))


class TorchSteps:
    """Runs torch's optimizer on the same numbers."""

    def __init__(self, foreach, compiled, options, params, gradient_sets, device):
        self.params = [torch.tensor(p, device=device) for p in params]
        self.gradient_sets = gradient_sets
        self.run = torch.optim.RMSprop(
            self.params, *HYPERPARAMETERS, foreach=foreach, **options
        ).step
        if compiled:
            torch.compiler.reset()
            self.run = torch.compile(self.run)
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def use(self, gradient_set):
        for p, g in zip(self.params, self.gradient_sets[gradient_set], strict=True):
            p.grad = g


def in_optax(options):
    options = dict(options, momentum=options["momentum"] or None, eps_in_sqrt=False)
    return optax.rmsprop(*HYPERPARAMETERS, **options)


def in_keras(options, params):
    """Keras' optimizer, as an optax transform; its state has a learning rate too."""
    variables = [keras.Variable(p) for p in params]
    rate, decay, eps = HYPERPARAMETERS
    # Its epsilon is added to the square.
    optimizer = keras.optimizers.RMSprop(rate, decay, epsilon=eps**2, **options)
    optimizer.build(variables)

    def init(params):
        return [jnp.array(v.value) for v in optimizer.variables]

    def update(grads, state, params):
        new, state = optimizer.stateless_apply(state, grads, params)
        return jax.tree.map(jnp.subtract, new, params), state

    return optax.GradientTransformation(init, update)


C_SOURCE = """
#include <math.h>
#include <stddef.h>
void step(size_t leaves, size_t size, float **p, float **g, float **s, float **m,
          float **b, float rate, float decay, float eps, float momentum) {
  float a = 1 - decay, c = a / decay;
  for (size_t i = 0; i < leaves; i++) {
    float *pi = p[i], *gi = g[i], *si = s[i], *mi = m ? m[i] : 0, *bi = b ? b[i] : 0;
    if (m) {
      #pragma omp parallel for simd if (size > 10000)
      for (size_t j = 0; j < size; j++) {
        mi[j] = decay * mi[j] + a * gi[j];
        float d = gi[j] - mi[j];
        si[j] = decay * si[j] + c * d * d;
        bi[j] = momentum * bi[j] + gi[j] / (sqrtf(si[j]) + eps);
        pi[j] -= rate * bi[j];
      }
    } else if (b) {
      #pragma omp parallel for simd if (size > 10000)
      for (size_t j = 0; j < size; j++) {
        si[j] = decay * si[j] + a * gi[j] * gi[j];
        bi[j] = momentum * bi[j] + gi[j] / (sqrtf(si[j]) + eps);
        pi[j] -= rate * bi[j];
      }
    } else {
      #pragma omp parallel for simd if (size > 10000)
      for (size_t j = 0; j < size; j++) {
        si[j] = decay * si[j] + a * gi[j] * gi[j];
        pi[j] -= rate * (gi[j] / (sqrtf(si[j]) + eps));
      }
    }
  }
}
"""


@functools.cache
def c_library():
    """The loop as the machine's compiler makes it, with all of its vectors."""
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
    command = ["cc", *flags, "step.c", "-o", "step.so", "-lm"]
    with tempfile.TemporaryDirectory() as folder:  # not needed once it is loaded
        pathlib.Path(folder, "step.c").write_text(C_SOURCE)
        subprocess.run(command, cwd=folder, check=True)
        return ctypes.CDLL(str(pathlib.Path(folder, "step.so")))


class CSteps:
    """Runs a loop in C that reads and writes everything once."""

    def __init__(self, options, params, gradient_sets):
        self.params = [p.copy() for p in params]
        slots = {"s": True, "m": options["centered"], "b": options["momentum"]}
        self.slots = [
            [np.zeros_like(p) for p in params] if used else None
            for used in slots.values()
        ]
        self.gradient_sets = [self.pointers(g) for g in gradient_sets]
        self.fixed = [self.pointers(x) for x in (self.params, *self.slots)]
        numbers = *HYPERPARAMETERS, options["momentum"]
        self.numbers = [ctypes.c_float(x) for x in numbers]
        self.sizes = [ctypes.c_size_t(n) for n in (len(params), params[0].size)]
        self.function = c_library().step

    @staticmethod
    def pointers(arrays):
        if arrays is None:
            return None
        return (ctypes.c_void_p * len(arrays))(*(x.ctypes.data for x in arrays))

    def use(self, gradient_set):
        self.grads = self.gradient_sets[gradient_set]

    def run(self):
        params, *slots = self.fixed
        self.function(*self.sizes, params, self.grads, *slots, *self.numbers)

    def wait(self):
        pass


def torch_device():
    """Where torch competes: on the device of JAX, or not at all (None)."""
    backend = jax.default_backend()
    if torch is None or backend == "cpu":
        return torch and "cpu"
    return "cuda" if backend == "gpu" and torch.cuda.is_available() else None


def random_numbers(count, shape):
    """Parameters, and three sets of gradients.

    With g and -g no element's variance collapses, which would end in NaN for torch and
    optax, and in the slow arithmetic of subnormal numbers.
    """
    rng = np.random.default_rng(0)
    params, g, h = (
        [rng.standard_normal(shape, np.float32) for _ in range(count)] for _ in range(3)
    )
    return params, [g, [-x for x in g], h]


def builders(count, size, options, wrap):
    """A function for each competitor that builds it anew, on the same numbers."""
    params, gradient_sets = random_numbers(count, size)
    in_jax = params, jax.tree.map(jnp.array, gradient_sets)
    is_adam = options == ADAM
    theirs = optax.adam(HYPERPARAMETERS[0]) if is_adam else in_optax(options)
    ours = theirs if is_adam else optax_rmsprop.rmsprop(*HYPERPARAMETERS, **options)
    ours = wrap(ours)
    # p + -2p reads and writes every element once, of one array of the same size.
    negation = optax.stateless(lambda g, p: [-2 * p[0]])
    whole = [np.ones(count * size, np.float32)], [()] * 3
    build = {
        "ours": lambda: JaxSteps(ours, *in_jax),
        "optax": lambda: JaxSteps(theirs, *in_jax),
        "copy": lambda: JaxSteps(negation, *whole),
    }
    if is_adam:
        return build
    if device := torch_device():
        move = functools.partial(torch.tensor, device=device)
        in_torch = options, params, jax.tree.map(move, gradient_sets), device
        build["torch foreach"] = lambda: TorchSteps(True, False, *in_torch)
        build["torch single"] = lambda: TorchSteps(False, False, *in_torch)
        if count < 1000:  # of which it makes one program, in many minutes
            build["torch compile"] = lambda: TorchSteps(True, True, *in_torch)
    if keras:
        build["keras"] = lambda: JaxSteps(in_keras(options, params), *in_jax)
    if jax.default_backend() == "cpu" and shutil.which("cc"):
        build["C loop"] = lambda: CSteps(options, params, gradient_sets)
    return build


def take_turns(competitors, reps, steps):
    """Seconds a step of every competitor in each of `reps` turns, after a warm-up."""
    seconds = {name: [] for name in competitors}
    # A competitor leaves its mark on the next in turn (caches, threads that still
    # spin). In random order it is not always the same one that suffers.
    shuffle = random.Random(0).shuffle
    turn = list(competitors)
    gc.collect()
    gc.disable()
    for rep in range(-WARM_UP, reps):
        shuffle(turn)
        for name in turn:
            competitor = competitors[name]
            competitor.use(rep % 3)
            competitor.wait()
            start = time.perf_counter()
            for _ in range(steps):
                competitor.run()
            competitor.wait()
            if rep >= 0:
                seconds[name].append((time.perf_counter() - start) / steps)
    gc.enable()
    return seconds


def check_agreement(competitors):
    ours = np.asarray(competitors["ours"].params[0])
    for name in competitors.keys() - {"ours", "copy"}:
        theirs = competitors[name].params[0]
        theirs = np.asarray(theirs.cpu() if name.startswith("torch") else theirs)
        # Keras' epsilon differs where a gradient is as small: in a few elements.
        worst = (np.mean if name == "keras" else np.max)(np.abs(theirs - ours))
        if not worst < AGREEMENT:  # so that NaN fails too
            raise RuntimeError(f"{name} and ours differ by {worst}, over {AGREEMENT}")


def measure(build, rounds, reps, steps):
    """The raw times of one row of the table, by round and group."""
    results = []
    for r in range(rounds):
        results.append({})
        for group, peers in GROUPS.items():
            if not build.keys() >= set(peers):
                continue
            jax.clear_caches()  # so that tracing starts from nothing
            order = ["ours", *peers][:: -1 if r % 2 else 1]
            competitors = {name: build[name]() for name in order}
            in_jax = [n for n in order if isinstance(competitors[n], JaxSteps)]
            results[-1][group] = {
                "build_s": {name: competitors[name].build_s for name in in_jax},
                "step_s": take_turns(competitors, reps, steps),
            }
            check_agreement(competitors)
            del competitors  # before the next are allocated
    return results


def spread(values):
    return {
        "mean": statistics.geometric_mean(values),
        "min": min(values),
        "max": max(values),
    }


def summarize(rounds):
    """Geometric mean, least and greatest over rounds of the median of their turns."""
    summary = {"step_s": {}, "ratio_to": {}, "build_s": {}}
    for group in rounds[0]:
        times = [r[group]["step_s"] for r in rounds]
        for name in times[0]:
            ratios = [np.median(np.divide(t["ours"], t[name])) for t in times]
            summary["ratio_to"][name] = spread(ratios)
            # Ours is in every group; what counts is its time beside optax.
            medians = [statistics.median(t[name]) for t in times]
            summary["step_s"].setdefault(name, spread(medians))
        for name in rounds[0][group]["build_s"]:
            sums = [sum(r[group]["build_s"][name].values()) for r in rounds]
            summary["build_s"].setdefault(name, spread(sums))
    return summary


def environment():
    """The versions and the machine on which the times depend."""
    packages = jax, jaxlib, optax, optax_rmsprop, np, torch, keras
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {p.__name__: str(p.__version__) for p in packages if p},
        "device": jax.devices()[0].device_kind,
        "torch_device": torch_device(),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch and torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
    }


def table_line(name, row):
    summary = row["summary"]
    ratios, build = summary["ratio_to"], summary["build_s"]
    cells = [*name.split(), f"{1e3 * summary['step_s']['ours']['mean']:.2f}"]
    for peer in PEERS:
        form = "{mean:.2f} [{min:.2f}, {max:.2f}]" if peer in ratios else "-"
        cells.append(form.format(**ratios.get(peer, {})))
    cells.append(" / ".join(f"{build[n]['mean']:.1f}" for n in ("ours", "optax")))
    copies = row["bytes_per_parameter"] / 8  # a copy moves 8 bytes
    return " | ".join([*cells, f"{copies / ratios['copy']['mean']:.2f}"])


def over_limits(name, row, limits_of):
    for peer, limits in limits_of.items():
        ratio = row["summary"]["ratio_to"].get(peer, {"mean": 0})["mean"]
        limit = limits.get(name.split()[0])
        if limit and ratio > limit:
            yield f"{name}: {ratio:.3f} of {peer}, over {limit}"


def parse_arguments(backend, joins_loops):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small leaves, 2 rounds of 3: to try it")
    add("--rounds", type=int, help="rounds a row, even to favour no order (10)")
    add("--reps", type=int, help="turns a round (15)")
    names = f"{', '.join(LEAVES)} and {', '.join(OPTIONS)}"
    help_ = f"only rows with one of these in their name, which is made of {names}"
    add("--rows", nargs="+", default=[""], metavar="PART", help=help_)
    add("--single-pass", action="store_true", help="join loops, on a CPU only")
    kind = "single_pass" if joins_loops else backend
    path = pathlib.Path(__file__).parent / "results" / f"step-{kind}.json"
    help_ = "JSON file for every time (results/step-KIND.json beside this script)"
    add("--output", type=pathlib.Path, default=path, help=help_)
    limits = SINGLE_PASS_LIMITS if joins_loops else LIMITS
    help_ = f"exit 1 if, on CPU, a ratio is over its limit: {limits}"
    add("--check", action="store_true", help=help_)
    args = parser.parse_args()
    if args.check and (args.quick or torch is None or backend != "cpu"):
        parser.error("--check needs full sizes, torch, and JAX on the CPU")
    if args.single_pass and backend != "cpu":
        parser.error("--single-pass needs JAX on the CPU")
    args.rounds = args.rounds or (2 if args.quick else 10)
    args.reps = args.reps or (3 if args.quick else 15)
    leaves = QUICK_LEAVES if args.quick else LEAVES
    options = OPTIONS | ({ADAM: ADAM} if joins_loops else {})
    rows = {
        f"{s} {kind}": (*leaves[s], options[kind]) for s in leaves for kind in options
    }
    args.rows = {n: row for n, row in rows.items() if any(x in n for x in args.rows)}
    if not args.rows:
        parser.error(f"--rows must be in one of these names: {', '.join(rows)}")
    return args


def main():
    joins_loops = "--single-pass" in sys.argv
    if joins_loops:  # before JAX's first program
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {JOIN_LOOPS}"
    backend = jax.default_backend()
    args = parse_arguments(backend, joins_loops)
    wrap, limits = (
        (single_pass, SINGLE_PASS_LIMITS) if joins_loops else (lambda tx: tx, LIMITS)
    )
    # Programs are compiled, not found on disk, so that the compile times are true.
    jax.config.update("jax_enable_compilation_cache", False)
    # A training loop does not wait for each step; on a GPU the wait would be timed.
    steps = 1 if backend == "cpu" else 10
    settings = {"rounds": args.rounds, "reps": args.reps, "steps_per_turn": steps}
    report = {**environment(), **settings, "rows": {}}
    if torch_device() is None:
        print("torch is left out: it is missing, or not on the device of JAX")
    if report["load_average_at_start"] > 1:
        print("the machine is busy (load average above 1), which torch suffers most")
    print(TABLE_HEAD)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for name, (count, size, options) in args.rows.items():
        build = builders(count, size, options, wrap)
        rounds = measure(build, args.rounds, args.reps, steps)
        slots = 2
        if options != ADAM:
            slots = 1 + options["centered"] + bool(options["momentum"])
        row = report["rows"][name] = {
            "bytes_per_parameter": 4 * (2 * (1 + slots) + 1),  # g is only read
            "summary": summarize(rounds),
            "rounds": rounds,
        }
        print(table_line(name, row), flush=True)
        failures += over_limits(name, row, limits) if args.check else []
        # After every row, so that a run cut short leaves its rows.
        args.output.write_text(json.dumps(report) + "\n")
    print(f"All times are in {args.output}", *failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
