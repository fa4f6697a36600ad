"""Parts of an update computed a second time, where XLA then makes fewer loops.

XLA stores what two loops read, unless each computes it. If a step writes a slot and a
parameter, and both come from an array that is costly to compute, a loop writes this
array, and another reads it. If each has a computation of its own, XLA can join their
loops, and find in the joined loop that both computations are the same.

XLA would merge them earlier, and nothing would be joined. So a repetition reads its
arrays through a mask, which is True everywhere. XLA must not know that.

Only what is computed element by element is repeated. All else, such as the norm of the
gradients, is computed once, from the arrays themselves.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun
from jax.tree_util import tree_flatten_with_path

from optax_rmsprop.wrappers._transformation import Name, name_of, owner_of

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


def is_compiled() -> bool:
    """Whether a program is traced now: derivatives alone do not make one.

    It adds an operation to the program, which XLA removes.
    """
    return isinstance(jax.lax.iota(jnp.int32, 1), Tracer)


def is_large(leaf: Any) -> bool:
    return getattr(leaf, "size", 0) >= MIN_SIZE


def has_large(arguments: Any) -> bool:
    return any(map(_is_traced, jax.tree.leaves(arguments)))


def _is_traced(leaf: Any) -> bool:
    """Whether a leaf is a large traced array, and no PRNG keys."""
    return (
        isinstance(leaf, Tracer)
        and is_large(leaf)
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    )


def slots_of(updates: Any, state: Any) -> tuple[list[Name], dict[Name, list[int]]]:
    """The names of all updates, and the large slots of each, by number of the leaf.

    A slot ends with the path of its parameter, and has its shape.
    """
    leaves, states = (tree_flatten_with_path(tree)[0] for tree in (updates, state))
    shapes = {name_of(path): u.shape for path, u in leaves if is_large(u)}
    slots: dict[Name, list[int]] = {name: [] for name in shapes}
    for number, (path, leaf) in enumerate(states):
        owner = owner_of(path, shapes) if is_large(leaf) else None
        if owner is not None and shapes[owner] == leaf.shape:
            slots[owner].append(number)
    return [name_of(path) for path, _ in leaves], slots


def repeated(
    update: Callable[..., Any],
    arguments: tuple[Any, ...],
    sources_of: Callable[[Any, Any], list[int]],
    masks: Iterable[jax.Array],
) -> Any:
    """Call an update, and take each leaf of its results from one of its repetitions.

    `sources_of` takes the new updates and state, and gives the number of the repetition
    for each of their leaves; 0 is the first computation. `masks` are scalars that are
    True, one for each repetition.
    """
    results, again = _once_and_again(update, arguments)
    sources = sources_of(*results)
    made = map(again, itertools.islice(masks, max(sources, default=0)))
    leaves = [jax.tree.leaves(x) for x in (results, *made)]
    structure: Any = jax.tree.structure(results)
    return structure.unflatten(leaves[n][i] for i, n in enumerate(sources))


def _once_and_again(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Any, Callable[[jax.Array], Any]]:
    """Call a function, and return its results and a function that makes them again.

    The latter takes a mask, and computes what is large and computed element by element
    from masked arrays. All else it returns as it is.
    """
    leaves, structure = jax.tree.flatten(arguments)
    large = [i for i, leaf in enumerate(leaves) if _is_traced(leaf)]
    others = dict[int, Any]()  # leaves of the results that are no arrays
    form: Any = None

    def of_arrays(arrays: list[jax.Array]) -> list[jax.Array]:
        nonlocal form
        new = list(leaves)
        for i, array in zip(large, arrays, strict=True):
            new[i] = array
        results, form = jax.tree.flatten(function(*jax.tree.unflatten(structure, new)))
        others.update((i, x) for i, x in enumerate(results) if not _is_array(x))
        return [x for x in results if _is_array(x)]

    def in_form(arrays: list[jax.Array]) -> Any:
        rest = iter(arrays)
        every = range(form.num_leaves)
        return form.unflatten(others[i] if i in others else next(rest) for i in every)

    arrays = [leaves[i] for i in large]
    once, again = _in_two(jax.make_jaxpr(of_arrays)(arrays))
    results, values = once(arrays)

    def masked(true: jax.Array) -> Any:
        return in_form(again([_where(true, array) for array in arrays], values))

    return in_form(results), masked


def _where(true: jax.Array, array: jax.Array) -> jax.Array:
    mask = jax.lax.full_like(array, true, jnp.bool)
    return jax.lax.select(mask, array, jax.lax.full_like(array, 0))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


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
    makes_large = any(is_large(variable.aval) for variable in equation.outvars)
    return makes_large and _is_elementwise(equation)


def _is_elementwise(equation: Any) -> bool:
    params = equation.params
    if equation.primitive.name in CALLS:
        inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
        return all(map(_is_elementwise, inner.jaxpr.eqns))
    return equation.primitive.name in ELEMENTWISE.split()
