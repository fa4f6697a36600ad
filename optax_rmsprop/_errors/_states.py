"""Checks of trees: parameters, gradients, and the states of our transformations."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import GetAttrKey, SequenceKey, tree_flatten_with_path

from optax_rmsprop._errors._arguments import (
    dtype_of,
    has_sign_and_zero,
    inexact,
)
from optax_rmsprop._errors._texts import at, kind_of, short, shown, some, trees


def params(tree: Any) -> None:
    """Check that every parameter is floating point or complex."""
    remedy = "leave such leaves out with optax.masked"
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if dtype_of(leaf) is None:
            remedy += ", or init with equinox.filter(model, equinox.is_inexact_array)"
        inexact("params", leaf, path, remedy=remedy, real=False)


def same_tree(name: str, given: Any, like: str, expected: Any) -> None:
    """Check that a tree has the structure and shapes of an expected tree.

    A given leaf may be real where a complex one is expected, but not the reverse. It
    may be None, and stands then for any leaf or tree. An example:

        given                          expected
        {"w": x, "b": None}            {"w": p, "b": {"scale": q, "shift": r}}

    passes if x and p have the same shape.
    """
    given_leaves, given_tree = _by_path(given)
    leaves, tree = _by_path(expected)
    found = {path: leaf for path, leaf in given_leaves.items() if leaf is not None}
    # The paths of None. The path () is left out: if the whole tree is None, the caller
    # forgot it.
    absent = given_leaves.keys() - found.keys() - {()}
    if absent:
        # Leaves that are expected at or below the path of a None need not be found.
        prefixes = {path: {path[:i] for i in range(len(path) + 1)} for path in leaves}
        leaves = {path: leaves[path] for path in leaves if not prefixes[path] & absent}
        absent -= set().union(*prefixes.values())
    problems = []
    for path, leaf in found.items():
        if path not in leaves:
            continue
        wanted = leaves[path]
        dtype = dtype_of(wanted)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            beside = kind_of(wanted) if dtype is None else dtype
            problems.append(f"{at(path)} is an array, expected None beside {beside}")
            continue
        real = not jnp.iscomplexobj(wanted)
        inexact(name, leaf, path, remedy=f"compare with {like}", real=real)
        if np.shape(leaf) != np.shape(wanted):
            problems.append(
                f"{at(path)} has shape {np.shape(leaf)}, expected {np.shape(wanted)}"
            )
    problems += other_paths(found, leaves)
    if not problems and not fits(given_tree, expected):
        unexpected = f"unexpected {some([at(path) for path in absent])}"
        problems.append(unexpected if absent else trees(given_tree, tree))
    if problems:
        raise ValueError(
            f"`{name}` must have the structure and shapes of {like}: "
            + some(problems, "; ", 460)
        )


def belong(updates: Any, params: Any, state: Any) -> None:
    """Check that gradients, parameters (unless None) and a state belong together."""
    fields = list(_fields(state))
    slots = [value for _, field, value in fields if field != "count"]
    _check_counts("state", fields)
    if not _plainly_belong(updates, params, slots):
        _check_dtypes("state", fields, params)
        for slot in slots:
            same_tree("updates", updates, "the parameters given to init", slot)
        if params is not None:
            same_tree("updates", updates, "`params`", params)
    for path, field, value in fields:
        if field in ("nu", "var"):
            not_negative("state", value, path, wait=False)


def checked_slots(name: str, state: Any) -> list[Any]:
    """Return the trees of averages and traces in a state.

    Their dtypes are checked, and the counts in the state.
    """
    fields = list(_fields(state))
    _check_counts(name, fields)
    _check_dtypes(name, fields, None)
    return [value for _, field, value in fields if field != "count"]


def _plainly_belong(updates: Any, params: Any, slots: list[Any]) -> bool:
    """Whether all trees have one structure, and arrays that belong together.

    True for the usual update, of JAX arrays alone. False may also mean that only the
    slow checks can tell.
    """
    if updates is None:  # all gradients forgotten, not an empty tree
        return False
    given = [updates, *slots] if params is None else [updates, *slots, params]
    columns, structures = zip(*map(jax.tree.flatten, given), strict=True)
    try:
        if any(structure != structures[0] for structure in structures):
            return False
    except ValueError:  # a node's metadata cannot be compared
        return False
    for row in zip(*columns, strict=True):
        if not all(isinstance(leaf, jax.Array) for leaf in row):
            return False
        if any(leaf.shape != row[0].shape for leaf in row):
            return False
        of_param = None if params is None else row[-1].dtype
        if not _plain_dtypes(tuple(leaf.dtype for leaf in row), len(slots), of_param):
            return False
    return True


@functools.cache
def _plain_dtypes(dtypes: tuple[Any, ...], n_slots: int, of_param: Any) -> bool:
    """Whether a gradient, `n_slots` slots and a parameter may have these dtypes."""
    return (
        all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)
        and all(map(has_sign_and_zero, dtypes))
        and all(_can_average(dtype, of_param) for dtype in dtypes[1 : 1 + n_slots])
        and len({jnp.issubdtype(d, jnp.complexfloating) for d in dtypes}) == 1
    )


def _check_counts(name: str, fields: list[tuple[Any, str, Any]]) -> None:
    for path, field, value in fields:
        if field == "count":
            count(name, value, at(path))


def _check_dtypes(name: str, fields: list[tuple[Any, str, Any]], params: Any) -> None:
    parameters = dict(tree_flatten_with_path(params)[0])
    for start, field, value in fields:
        leaves = [] if field == "count" else tree_flatten_with_path(value)[0]
        for path, leaf in leaves:
            dtype, of_param = dtype_of(leaf), dtype_of(parameters.get(path))
            if not _can_average(dtype, of_param):
                beside = (
                    "" if of_param is None else f" beside a parameter in {of_param}"
                )
                raise TypeError(
                    f"`{name}` must be in at least float32, and complex for complex "
                    f"parameters, got {kind_of(leaf) if dtype is None else dtype} at "
                    f"{at(start + path)}{beside}; leave it as init made it where you "
                    "cast parameters, or call init again"
                )


@functools.cache
def _can_average(dtype: Any, of_param: Any) -> bool:
    """Whether `averages` is true, and the dtype has at least 32 bits.

    A parameter that is no number, or of integers, does not restrict the dtype.
    """
    if of_param is None or not jnp.issubdtype(of_param, jnp.inexact):
        of_param = dtype
    return averages(dtype, of_param) and jnp.finfo(dtype).bits >= 32


def averages(dtype: Any, of_param: Any) -> bool:
    """Whether a slot may have a dtype beside a parameter in `of_param`.

    It must be floating point or complex, and complex if and only if `of_param` is.
    """
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return False
    kinds = {jnp.issubdtype(x, jnp.complexfloating) for x in (dtype, of_param)}
    return len(kinds) == 1


def _fields(state: Any, start: Any = ()) -> Iterator[tuple[Any, str, Any]]:
    """Yield path, name and value of each count and slot in a state, chains included."""
    names = getattr(state, "_fields", None)
    for i, value in enumerate(state if isinstance(state, tuple) else ()):
        path = (*start, GetAttrKey(names[i]) if names else SequenceKey(i))
        if names and names[i] in ("count", "nu", "mu", "var", "trace"):
            yield path, names[i], value
        else:
            yield from _fields(value, path)


def count(name: str, value: Any, where: str = ".count", most: float = math.inf) -> None:
    """Check a number of updates: one integer, from 0 to `most`.

    Its value is checked only if it is known: a traced value never is, and one that a
    device still computes is not waited for.
    """
    rule, dtype = f"`{name}` must count updates in one integer", dtype_of(value)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        got = kind_of(value) if dtype is None else dtype
        raise TypeError(f"{rule}, got {got} at {where}; {_ANOTHER_COUNT}")
    if np.shape(value) != ():
        raise ValueError(
            f"{rule}, got shape {np.shape(value)} at {where}; use jax.vmap for the "
            "states of many runs"
        )
    known = int(value) if _is_ready(value) else 0
    most = min(most, int(jnp.iinfo(dtype).max))
    if not 0 <= known <= most:
        end = "" if known < 0 else f" to {most}"
        raise ValueError(
            f"{rule} from 0{end}, got {shown(known)} at {where}; {_ANOTHER_COUNT}"
        )


_ANOTHER_COUNT = "call init again, or restore the state that the run had"


def not_negative(name: str, tree: Any, path: Any = (), *, wait: bool = True) -> None:
    """Check that averages of squares are not negative. They may contain NaN.

    Traced arrays are not checked, nor, unless `wait`, arrays that a device still
    computes.
    """
    if all(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        return
    for rest, leaf in tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tracer) or not (wait or _is_ready(leaf)):
            continue
        if isinstance(leaf, jax.Array) and _is_on_one_cpu(leaf):
            leaf = np.asarray(leaf)  # needs neither a copy nor a compiled program
        # A NumPy array may be too large for the device, so it stays in NumPy.
        is_numpy = isinstance(leaf, np.ndarray)
        negative = (_has_negative if is_numpy else _jitted_has_negative)(leaf)
        if not isinstance(negative, Tracer) and negative:
            raise ValueError(
                f"`{name}` must contain averages of squares, got a negative one at "
                f"{at(path + rest)}; restore the state that the run had"
            )


def _has_negative(x: Any) -> Any:
    is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return (x.real < 0).any() | (x.imag < 0).any() if is_complex else (x < 0).any()


_jitted_has_negative = jax.jit(_has_negative)


def _is_ready(value: Any) -> bool:
    """Whether a value is known without waiting for a device.

    A variable of Flax NNX may contain a traced value, so it counts as unknown.
    """
    if isinstance(value, jax.Array) and not isinstance(value, Tracer):
        return value.is_ready()  # type: ignore[attr-defined]
    return isinstance(value, int | np.generic | np.ndarray)


def _is_on_one_cpu(array: jax.Array) -> bool:
    devices = array.devices()
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


def same_state(state: Any, expected: Any) -> None:
    """Check that a state has the expected types, which `state_types` returned."""
    got = state_types(state)
    if got != expected:
        raise ValueError(
            f"`state` must come from this transform's own init: expected "
            f"{short(_names(expected))}, got {short(_names(got))}; call init again "
            "after changing an option; from_optax carries a state of optax's own "
            "RMSprop over"
        )


def state_types(state: Any) -> Any:
    """Return the type of a state; for a chain's state, a tuple of its parts' types."""
    return tuple(map(state_types, state)) if type(state) is tuple else type(state)


def _names(types: Any) -> str:
    """Show types with their package, because optax has states of the same names."""
    if isinstance(types, tuple):
        return f"({', '.join(map(_names, types))})"
    package = types.__module__.partition(".")[0]
    return types.__name__ if package == "builtins" else f"{package}.{types.__name__}"


def fits(structure: Any, tree: Any) -> bool:
    """Whether a structure is the structure of a tree, or a prefix of it."""
    try:
        structure.flatten_up_to(tree)
    except ValueError:
        return False
    return True


def other_paths(given: dict[Any, Any], expected: dict[Any, Any]) -> list[str]:
    """Describe which paths are missing, and which are unexpected."""
    missing = [at(path) for path in expected if path not in given]
    unexpected = [at(path) for path in given if path not in expected]
    found = {"missing": missing, "unexpected": unexpected}
    return [f"{what} {some(paths)}" for what, paths in found.items() if paths]


def _by_path(tree: Any) -> tuple[dict[Any, Any], Any]:
    leaves, structure = tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return dict(leaves), structure
