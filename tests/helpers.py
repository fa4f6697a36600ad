"""Runs of the same problem in JAX, in torch and by the NumPy reference; tables.

Most tests make their updates without `jax.jit`: an operation is compiled once for each
shape and dtype, and then serves every test of the process. A compiled step serves one
test, and takes a hundred times as long to build as an update takes without.
"""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_rmsprop
import reference


def covering(cases, together=2):
    """A few of the cases, in which every two options have every pair of values.

    With `together=3`, further cases follow, so that every three options have every
    triple of values. Each case is the one with the most combinations that are in none
    before it.
    """

    def combinations(case):
        values = [(k, repr(v)) for k, v in case.items()]
        return {*values, *itertools.combinations(values, together)}

    chosen = covering(cases, together - 1) if together > 2 else []
    missing = set().union(*map(combinations, cases))
    missing.difference_update(*map(combinations, chosen))
    while missing:
        chosen.append(max(cases, key=lambda case: len(combinations(case) & missing)))
        missing -= combinations(chosen[-1])
    return chosen


def slow_but(quick, cases, name=str):
    """All the cases for `parametrize`; those that are not among the quick are slow."""
    quick, cases = list(quick), list(cases)
    assert all(case in cases for case in quick)
    return [
        pytest.param(
            case, id=name(case), marks=[pytest.mark.slow] * (case not in quick)
        )
        for case in cases
    ]


# Wrappers of optax, around a transformation that a function without arguments makes.
# The updates stay what they are alone.
WRAPPERS = {
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(1e9), make()),
    "nested": lambda make: optax.chain(optax.chain(make(), optax.scale(1.0))),
    "masked": lambda make: optax.masked(
        make(), lambda tree: jax.tree.map(lambda _: True, tree)
    ),
    "partition": lambda make: optax.partition(
        {"all": make()}, lambda tree: jax.tree.map(lambda _: "all", tree)
    ),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(), 3),
    "MultiSteps": lambda make: optax.MultiSteps(make(), 1).gradient_transformation(),
}
# These branch with `lax.cond`, which is compiled in every update without `jax.jit`.
BRANCHING = ("apply_if_finite", "MultiSteps")

ENTRIES = ("nu", "mu", "var", "trace")
# Wrappers of period 3 or 4 come round three or four times in so many steps, so that a
# state that is lost or advanced twice shows.
STEPS = 12
SHAPES = {"matrix": (16, 8), "scalar": (), "empty": (0, 2)}


def problem(steps, dtype=np.float64, shapes=SHAPES, seed=0):
    """Parameters near 1, gradients of sizes 0.01 to 10 and a step of zeros.

    Under weight decay, smaller gradients or longer steps let parameters oscillate about
    0 in a chaotic way, which amplifies the rounding of any two implementations.
    """
    rng = np.random.default_rng(seed)

    def normal(shape):
        x = rng.normal(size=shape)
        complex_ = np.issubdtype(dtype, np.complexfloating)
        return np.asarray(x + 1j * rng.normal(size=shape) if complex_ else x, dtype)

    sizes = {name: 10.0 ** rng.uniform(-2, 1, shape) for name, shape in shapes.items()}
    params = {name: normal(shape) for name, shape in shapes.items()}
    gradients = {
        name: np.stack([normal(shape) * sizes[name] for _ in range(steps)])
        for name, shape in shapes.items()
    }
    for leaf in gradients.values():
        leaf[steps // 3] = 0
    learning_rates = 1e-3 * (1 + 0.5 * np.sin(np.arange(steps)))
    return params, gradients, learning_rates


def random(*shape):
    """The same normal numbers at every call."""
    return np.random.default_rng(0).normal(size=shape)


def arrays(steps=STEPS):
    """Parameters and, along a leading axis of steps, their gradients."""
    params, gradients, _ = problem(steps)
    return jax.tree.map(jnp.asarray, (params, gradients))


def by_step(tree):
    """A list of trees, from one whose leaves have a leading axis of steps."""
    leaves, structure = jax.tree.flatten(tree)
    slices = zip(*map(np.asarray, leaves), strict=True)
    return [structure.unflatten(map(jnp.asarray, leaf)) for leaf in slices]


def stepper(tx):
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, gradients, step=None):
    """The parameters after every update, and the last state.

    The step may be compiled: MultiSteps, apply_if_finite and lookahead branch with
    `lax.cond`, which is compiled again in every update otherwise.
    """
    step = step or stepper(tx)
    state, history = tx.init(params), []
    for g in by_step(gradients):
        params, state = step(params, state, g)
        history.append(params)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *history), state


def train_compiled(tx, params, gradients):
    """The same in one compiled loop."""

    def scanned(carry, g):
        carry = stepper(tx)(*carry, g)
        return carry, carry[0]

    scan = jax.jit(functools.partial(jax.lax.scan, scanned))
    (_, state), history = scan((params, tx.init(params)), gradients)
    return history, state


def by_reference(params, gradients, **options):
    """The same from the NumPy reference, and its last averages by name."""
    runs = {
        name: list(reference.rmsprop(leaf, np.asarray(gradients[name]), **options))
        for name, leaf in params.items()
    }
    history = {name: np.stack([p for p, _ in run]) for name, run in runs.items()}
    last = {name: run[-1][1] for name, run in runs.items()}
    return history, {slot: {k: v[slot] for k, v in last.items()} for slot in ENTRIES}


def make_mesh(sizes, **options):
    """A mesh over the eight devices that conftest makes of a CPU."""
    if math.prod(sizes.values()) > jax.device_count():
        pytest.skip("needs 8 devices, and JAX has a GPU or TPU with fewer")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), **options)


def skip_without_pinned_host():
    if "pinned_host" not in [m.kind for m in jax.devices()[0].addressable_memories()]:
        pytest.skip("CPUs have pinned_host memory in newer versions of JAX")


def falling(count):
    return 1e-2 / jnp.asarray(count + 1, float)


def run_optax(tx, params, gradients, dtype):
    """Train with any transformation; {"params": ..., "nu": ...} stacked over steps."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        slots = {name: optax.tree.get(state, name) for name in ENTRIES}
        kept = {name: slot for name, slot in slots.items() if slot is not None}
        return (params, state), {"params": params, **kept}

    params, gradients = (
        {name: jnp.asarray(leaf, dtype) for name, leaf in tree.items()}
        for tree in (params, gradients)
    )
    scan = jax.jit(lambda *carry: jax.lax.scan(step, carry, gradients)[1])
    return jax.tree.map(np.asarray, scan(params, tx.init(params)))


def run_ours(params, gradients, learning_rates, dtype, **options):
    """Train with our rmsprop under a table of learning rates."""
    table = jnp.asarray(learning_rates)
    tx = optax_rmsprop.rmsprop(lambda count: table[count], **options)
    return run_optax(tx, params, gradients, dtype)


def run_torch(params, gradients, learning_rates, dtype, **options):
    """Train with torch.optim.RMSprop; options and slots by our names, `var` derived."""
    import torch

    dtype = getattr(torch, np.dtype(dtype).name)
    leaves = {
        name: torch.tensor(leaf, dtype=dtype, requires_grad=True)
        for name, leaf in params.items()
    }
    alpha = options.pop("decay")
    optimizer = torch.optim.RMSprop(leaves.values(), alpha=alpha, **options)
    history = []
    for step, lr in enumerate(learning_rates):
        optimizer.param_groups[0]["lr"] = float(lr)
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(gradients[name][step], dtype=dtype)
        optimizer.step()
        kept = {name: leaf.detach().numpy().copy() for name, leaf in leaves.items()}
        history.append({"params": kept, **_torch_slots(optimizer, leaves)})
    return jax.tree.map(lambda *steps: np.stack(steps), *history)


def update_in_torch(model, optimizer, gradient, steps=1):
    """Update a live model with a gradient made from each parameter."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = gradient(parameter)
        optimizer.step()


def _torch_slots(optimizer, leaves):
    slots = {}
    for name, leaf in leaves.items():
        state = {k: v.numpy().copy() for k, v in optimizer.state[leaf].items()}
        entry = {"nu": state["square_avg"]}
        if "grad_avg" in state:
            mu = state["grad_avg"]
            entry = {"mu": mu, "var": entry["nu"] - _square_by_parts(mu)}
        if "momentum_buffer" in state:
            entry["trace"] = state["momentum_buffer"]
        for slot, value in entry.items():
            slots.setdefault(slot, {})[name] = value
    return slots


def _square_by_parts(x):
    return x.real**2 + 1j * x.imag**2 if np.iscomplexobj(x) else x**2


def share_that_differs(one, other):
    """The share of the numbers of two like trees that differ by more than rounding."""
    chex.assert_trees_all_equal_shapes_and_dtypes(one, other)
    numbers = (
        np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])
        for tree in (one, other)
    )
    return np.mean(~np.isclose(*numbers, rtol=1e-5, atol=1e-6))


def relative_difference(actual, expected):
    """The largest difference of a leaf at any step, over its largest value then."""
    assert actual.keys() == expected.keys()
    worst = 0.0
    for entry in expected:
        for name, leaf in expected[entry].items():
            if leaf.size:
                axes = tuple(range(1, leaf.ndim))
                error = np.abs(actual[entry][name] - leaf).max(axis=axes)
                worst = max(worst, np.max(error / np.abs(leaf).max(axis=axes)))
    return worst
