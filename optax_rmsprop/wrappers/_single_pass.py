"""One loop a step on CPUs, in which each array is read once and written once.

XLA's CPU backend makes a loop for each array that a program writes. A step of RMSprop
is two loops, and the second waits for the first:

    nu <- decay * nu + (1 - decay) * g²         reads nu, g           writes nu
    p  <- p - rate * g / (√nu + eps)            reads nu, g, p        writes p

XLA has a pass that joins loops which read the same arrays, if neither needs what the
other writes. So the second loop must compute the new nu itself. `single_pass` achieves
this for transformations that work element by element, ours or others: it makes the
update once for each slot, and once for the parameters. With momentum, nu is taken from
the first of three updates, the buffer from the second, and what is added to the
parameters from the third. In the joined loop, the compiler finds that they are the
same, and computes them once.

Each update after the first reads its arrays through a mask of its own (`_repeated.py`),
which comes through `jax.lax.optimization_barrier`. (Barriers around the arrays would
hide that all updates read the same arrays. With a product with 1 in place of the mask,
sums of products may be rounded differently.)
"""

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_flatten_with_path

from optax_rmsprop.wrappers._repeated import (
    has_large,
    is_compiled,
    repeated,
    slots_of,
)
from optax_rmsprop.wrappers._transformation import checked, name_of


def single_pass(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Give a step a form in which XLA reads and writes each array once, on CPUs.

    XLA makes a loop for each array that a step writes, and reads the gradient again in
    each. It has a pass that joins loops, which is off by default. This environment
    variable switches it on, if it is set before JAX's first program:

        XLA_FLAGS=--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true

    `single_pass` gives a compiled step a form whose loops the pass can join.
    `joins_loops()` says whether the pass is on.

    Args:
      tx: an optax transformation that works element by element, as RMSprop and Adam do.
        Wrap a whole chain. Where a wrapper branches, as `optax.MultiSteps` and
        `optax.apply_if_finite` do, wrap what is inside.

    Returns:
      A transformation with the state and the arguments of `tx`. Its updates are those
      of `tx`, to the bit where XLA contracts the same products and sums, else within
      rounding. It is `tx` itself where update is not compiled, where no array has 2¹⁴
      elements, where JAX's default device is not a CPU, and where the pass is off. The
      latter gives a warning, once.

      Loops are joined if they have less than 20 operands and write the same dtype. So
      very long chains keep several loops, and parameters in 16 bits have a loop of
      their own beside that of their averages in float32. Where the state is in uint8
      (`compress_state`), the loops are those of `tx`. Sums over arrays have loops of
      their own: with some in the middle of `tx`, as in `optax.lamb` and
      `optax.contrib.prodigy`, several loops remain, sometimes more than those of `tx`.

    Raises:
      TypeError: a `tx` that is not an optax transformation.

    Example:
      >>> import optax
      >>> from optax_rmsprop import rmsprop, wrappers
      >>> clipped = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(1e-3))
      >>> tx = wrappers.single_pass(clipped)

    References:
      xla/service/cpu/cpu_multi_output_fusion.cc, in the XLA of jaxlib 0.10.2.
    """
    tx = checked(tx)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        arguments = updates, state, params, extra_args
        if not has_large(arguments) or not _has_pass() or not is_compiled():
            return tx.update(updates, state, params, **extra_args)

        def update(updates: Any, state: Any, params: Any, extra_args: Any) -> Any:
            return tx.update(updates, state, params, **extra_args)

        sources_of = functools.partial(_sources, params)
        return repeated(update, arguments, sources_of, _masks())

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def joins_loops() -> bool:
    """Say whether XLA joins the loops of `single_pass` in this process.

    It compiles a tiny program and looks at it, because the flags that are set now may
    not be those with which JAX started.

    Returns:
      True on a CPU if XLA's pass is on, else False. It is found out once.

    Example:
      >>> from optax_rmsprop import wrappers
      >>> wrappers.joins_loops()
      False

    References:
      `single_pass`.
    """
    return jax.default_backend() == "cpu" and _joins_two_loops()


def _has_pass() -> bool:
    """Whether loops are joined; on a CPU where they are not, warn once."""
    if jax.default_backend() == "cpu" and not _joins_two_loops():
        _warn()
    return joins_loops()


@functools.cache
def _joins_two_loops() -> bool:
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    program = jax.jit(lambda x: (x + 1, x * 2)).lower(x).compile()
    return str(program.as_text()).count(" fusion(") == 1


@functools.cache
def _warn() -> None:
    warnings.warn(
        "single_pass changes nothing, because XLA's pass that joins loops is off; set "
        "XLA_FLAGS=--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true "
        "before JAX's first program",
        stacklevel=4,
    )


def _masks() -> Iterator[jax.Array]:
    mask = jnp.array(True)
    while True:
        mask = jax.lax.optimization_barrier(mask)
        yield mask


def _sources(
    params: optax.Params | None, updates: optax.Updates, state: optax.OptState
) -> list[int]:
    """The number of the update from which each leaf of the results is taken.

    The slots of a parameter come from the updates 1, 2, 3, and what is added to the
    parameter from the one after them. XLA joins loops only if they write the same
    dtype. Where the parameter has another one than its slots, its loop follows theirs,
    and comes from the same update as the last slot. Update 0 is the usual one. What is
    small comes from it, and all of a parameter whose slots have several dtypes, or are
    codes: the extremes of codes are not computed element by element, and would come
    from other codes than those stored.
    """
    names, slots = slots_of(updates, state)
    given = tree_flatten_with_path(params)[0]
    dtypes = {name_of(path): getattr(p, "dtype", None) for path, p in given}
    leaves, states = jax.tree.leaves(updates), jax.tree.leaves(state)
    of_updates, of_state = [0] * len(leaves), [0] * len(states)
    for i, (name, u) in enumerate(zip(names, leaves, strict=True)):
        numbers = slots.get(name, [])
        written = {states[number].dtype for number in numbers}
        dtype = getattr(u, "dtype", None)
        same = written == {dtype, dtypes.get(name, dtype)}
        loops = len(numbers) + same
        is_inexact = all(jnp.issubdtype(dtype, jnp.inexact) for dtype in written)
        if len(written) == 1 and is_inexact and loops > 1:
            for source, number in enumerate(numbers, start=1):
                of_state[number] = source
            of_updates[i] = loops
    return [*of_updates, *of_state]
