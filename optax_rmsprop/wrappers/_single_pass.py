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

XLA would merge them earlier, and nothing would be joined. So each update reads its
arrays through a mask of its own, which is True everywhere. XLA cannot know that,
because it comes through `jax.lax.optimization_barrier`. (Barriers around the arrays
would hide that all updates read the same arrays. With a product with 1 in place of the
mask, sums of products may be rounded differently.)

Only what is computed element by element is repeated. All else, such as the norm of the
gradients, is computed once, from the arrays themselves.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun
from jax.tree_util import tree_flatten_with_path

from optax_rmsprop.wrappers._transformation import checked, name_of, owner_of

# In a smaller array, the repeated arithmetic costs more than the memory.
MIN_SIZE = 2**14
# Operations of JAX that cost less than to store their result. The others, such as sums
# over an array, products of matrices and random bits, are not repeated.
ELEMENTWISE = """
    abs add and bitcast_convert_type broadcast_in_dim clamp complex conj
    convert_element_type copy div eq exp expm1 floor ge gt imag integer_pow is_finite le
    log log1p lt max min mul ne neg not or pow pvary real reshape round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sqrt square squeeze sub
    tanh xor
"""
CALLS = "jit", "pjit", "custom_jvp_call"


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
        leaves, structure = jax.tree.flatten(arguments)
        large = [i for i, leaf in enumerate(leaves) if _is_traced(leaf)]
        if not large or not _has_pass() or not _is_compiled():
            return tx.update(updates, state, params, **extra_args)
        others = dict[int, Any]()  # leaves of the results that are no arrays
        form: Any = None

        def update(arrays: list[jax.Array]) -> list[jax.Array]:
            nonlocal form
            new = list(leaves)
            for i, array in zip(large, arrays, strict=True):
                new[i] = array
            updates, state, params, extra_args = jax.tree.unflatten(structure, new)
            results, form = jax.tree.flatten(
                tx.update(updates, state, params, **extra_args)
            )
            others.update((i, x) for i, x in enumerate(results) if not _is_array(x))
            return [x for x in results if _is_array(x)]

        arrays = [leaves[i] for i in large]
        program = jax.make_jaxpr(update)(arrays)
        once, again = _in_two(program)
        outputs, values = once(arrays)

        size = form.num_leaves

        def result(arrays: list[Any]) -> Any:
            rest = iter(arrays)
            every = (others[i] if i in others else next(rest) for i in range(size))
            return form.unflatten(every)

        sources = _sources(params, result(program.out_avals))
        made = [outputs]
        true = jnp.array(True)
        for _ in range(max(sources, default=0)):
            true = jax.lax.optimization_barrier(true)
            own = [_where(true, array) for array in arrays]
            made.append(again(own, values))
        of_arrays = [n for i, n in enumerate(sources) if i not in others]
        return result([made[source][i] for i, source in enumerate(of_arrays)])

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


def _where(true: jax.Array, array: jax.Array) -> jax.Array:
    mask = jax.lax.full_like(array, true, jnp.bool)
    return jax.lax.select(mask, array, jax.lax.full_like(array, 0))


def _is_compiled() -> bool:
    """Whether a program is traced now: derivatives alone do not make one."""
    return isinstance(jax.lax.iota(jnp.int32, 1), Tracer)


def _is_traced(leaf: Any) -> bool:
    """Whether a leaf is a large traced array, and no PRNG keys."""
    return (
        isinstance(leaf, Tracer)
        and _is_large(leaf)
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _is_large(leaf: Any) -> bool:
    return getattr(leaf, "size", 0) >= MIN_SIZE


def _sources(params: optax.Params | None, results: Any) -> list[int]:
    """The number of the update from which each leaf of the results is taken.

    The slots of a parameter, which end with its path and have its shape, come from the
    updates 1, 2, 3, and what is added to the parameter from the one after them. XLA
    joins loops only if they write the same dtype. Where the parameter has another one
    than its slots, its loop follows theirs, and comes from the same update as the last
    slot. Update 0 is the usual one. What is small comes from it, and all of a parameter
    whose slots have several dtypes, or are codes: the extremes of codes are not
    computed element by element, and would come from other codes than those stored.
    """
    new_updates, state = results
    leaves, states, given = (
        tree_flatten_with_path(tree)[0] for tree in (new_updates, state, params)
    )
    shapes = {name_of(path): u.shape for path, u in leaves if _is_large(u)}
    dtypes = {name_of(path): getattr(p, "dtype", None) for path, p in given}
    slots: dict[Any, list[int]] = {name: [] for name in shapes}
    for number, (path, leaf) in enumerate(states):
        if not _is_large(leaf):
            continue
        owner = owner_of(path, shapes)
        if owner is not None and shapes[owner] == leaf.shape:
            slots[owner].append(number)
    of_updates, of_state = [0] * len(leaves), [0] * len(states)
    for i, (path, u) in enumerate(leaves):
        name = name_of(path)
        numbers = slots.get(name, [])
        written = {states[number][1].dtype for number in numbers}
        dtype = getattr(u, "dtype", None)
        same = written == {dtype, dtypes.get(name, dtype)}
        loops = len(numbers) + same
        is_inexact = all(jnp.issubdtype(dtype, jnp.inexact) for dtype in written)
        if len(written) == 1 and is_inexact and loops > 1:
            for source, number in enumerate(numbers, start=1):
                of_state[number] = source
            of_updates[i] = loops
    return [*of_updates, *of_state]


def _in_two(program: ClosedJaxpr) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A function that runs a program, and one that makes its large results again.

    The first takes arrays, and returns the results and the values that the second needs
    from it: all that is not made element by element. The second takes arrays and these
    values, and returns the results.
    """
    jaxpr = program.jaxpr
    repeated = [equation for equation in jaxpr.eqns if _is_repeated(equation)]
    made = {variable for equation in repeated for variable in equation.outvars}
    known = made.union(jaxpr.invars, jaxpr.constvars)
    read = [x for equation in repeated for x in equation.invars] + jaxpr.outvars
    needed = [*dict.fromkeys(x for x in read if isinstance(x, Var) and x not in known)]
    whole = jaxpr.replace(outvars=[*jaxpr.outvars, *needed])
    part = jaxpr.replace(
        invars=[*jaxpr.invars, *needed], eqns=repeated, effects=frozenset()
    )
    run, run_again = (
        jaxpr_as_fun(ClosedJaxpr(jaxpr, program.consts)) for jaxpr in (whole, part)
    )

    def once(arrays: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        values = run(*arrays)
        return values[: len(jaxpr.outvars)], values[len(jaxpr.outvars) :]

    def again(arrays: list[jax.Array], values: list[jax.Array]) -> list[jax.Array]:
        return list(run_again(*arrays, *values))

    return once, again


def _is_repeated(equation: Any) -> bool:
    """Whether an equation makes a large array, element by element."""
    makes_large = any(_is_large(variable.aval) for variable in equation.outvars)
    return makes_large and _is_elementwise(equation)


def _is_elementwise(equation: Any) -> bool:
    params = equation.params
    if equation.primitive.name in CALLS:
        inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
        return all(map(_is_elementwise, inner.jaxpr.eqns))
    return equation.primitive.name in ELEMENTWISE.split()
