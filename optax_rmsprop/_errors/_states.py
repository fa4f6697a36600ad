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

from optax_rmsprop._errors._arguments import dtype_of, inexact
from optax_rmsprop._errors._texts import at, kind_of, short, shown, some, trees


def params(tree: Any) -> None:
    """Check that every parameter is floating point or complex."""
    remedy = "leave such leaves out with optax.masked"
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if dtype_of(leaf) is None:
            remedy += ", or init with equinox.filter(model, equinox.is_inexact_array)"
        inexact("params", leaf, path, remedy=remedy, real=False)


def same_tree(name: str, given: Any, like: str, expected: Any) -> None:
    """Check that two trees agree in structure, shapes and in what is real.

    A given leaf may be real where a complex one is expected, or None: then anything may
    be expected there, a whole tree too.
    """
    given_leaves, given_tree = _by_path(given)
    leaves, tree = _by_path(expected)
    found = {path: leaf for path, leaf in given_leaves.items() if leaf is not None}
    # None in place of the whole tree is no gradient left out, but all forgotten.
    absent = given_leaves.keys() - found.keys() - {()}
    if absent:
        prefixes = {path: {path[:i] for i in range(len(path) + 1)} for path in leaves}
        leaves = {path: leaves[path] for path in leaves if not prefixes[path] & absent}
        absent -= set().union(*prefixes.values())
    problems = []
    for path, leaf in found.items():
        if path not in leaves:
            continue
        of_leaf = leaves[path]
        dtype = dtype_of(of_leaf)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            beside = kind_of(of_leaf) if dtype is None else dtype
            problems.append(f"{at(path)} is an array, expected None beside {beside}")
            continue
        real = not jnp.iscomplexobj(of_leaf)
        inexact(name, leaf, path, remedy=f"compare with {like}", real=real)
        if np.shape(leaf) != np.shape(of_leaf):
            problems.append(
                f"{at(path)} has shape {np.shape(leaf)}, expected {np.shape(of_leaf)}"
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
    for slot in held("state", state, params):
        same_tree("updates", updates, "the parameters given to init", slot)
    if params is not None:
        same_tree("updates", updates, "`params`", params)


def held(name: str, state: Any, params: Any = None) -> list[Any]:
    """Check counts and dtypes in a state of ours; return its averages and traces."""
    of_params = dict(tree_flatten_with_path(params)[0])
    slots = []
    for start, field, value in _fields(state):
        if field == "count":
            count(name, value, at(start))
            continue
        slots.append(value)
        for path, leaf in tree_flatten_with_path(value)[0]:
            dtype, of_param = dtype_of(leaf), dtype_of(of_params.get(path))
            if not _keeps(dtype, of_param):
                beside = (
                    "" if of_param is None else f" beside a parameter in {of_param}"
                )
                raise TypeError(
                    f"`{name}` must be in at least float32, and complex for complex "
                    f"parameters, got {kind_of(leaf) if dtype is None else dtype} at "
                    f"{at(start + path)}{beside}; leave it as init made it where you "
                    "cast parameters, or call init again"
                )
    return slots


@functools.cache
def _keeps(dtype: Any, of_param: Any) -> bool:
    """Whether an average may have a dtype, beside a parameter of another."""
    if of_param is None or not jnp.issubdtype(of_param, jnp.inexact):
        of_param = dtype
    return averages(dtype, of_param) and jnp.finfo(dtype).bits >= 32


def averages(dtype: Any, of_param: Any) -> bool:
    """Whether a dtype is inexact, and complex if and only if a parameter's is."""
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return False
    kinds = {jnp.issubdtype(x, jnp.complexfloating) for x in (dtype, of_param)}
    return len(kinds) == 1


def _fields(state: Any, start: Any = ()) -> Iterator[tuple[Any, str, Any]]:
    """Path, name and value of each count and slot in a state of ours."""
    names = getattr(state, "_fields", None)
    for i, value in enumerate(state if isinstance(state, tuple) else ()):
        path = (*start, GetAttrKey(names[i]) if names else SequenceKey(i))
        if names and names[i] in ("count", "nu", "mu", "var", "trace"):
            yield path, names[i], value
        else:
            yield from _fields(value, path)


def count(name: str, value: Any, where: str = ".count", most: float = math.inf) -> None:
    """Check a number of updates: an integer, and from 0 to `most` where it is known.

    It is not known while it is traced or still computed: that is not waited for.
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
    """Check averages of squares unless they are traced. NaN may be in them.

    Those still computed are left out unless `wait`.
    """
    for rest, leaf in tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tracer) or not (wait or _is_ready(leaf)):
            continue
        if isinstance(leaf, jax.Array) and _is_on_one_cpu(leaf):
            leaf = np.asarray(leaf)  # needs neither a copy nor a program to compile
        is_numpy = isinstance(leaf, np.ndarray)  # may be too much for the device
        negative = (_has_negative if is_numpy else _jitted_has_negative)(leaf)
        if not isinstance(negative, Tracer) and negative:
            raise ValueError(
                f"`{name}` must hold averages of squares, got a negative one at "
                f"{at(path + rest)}; restore the state that the run had"
            )


def _has_negative(x: Any) -> Any:
    is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return (x.real < 0).any() | (x.imag < 0).any() if is_complex else (x < 0).any()


_jitted_has_negative = jax.jit(_has_negative)


def _is_ready(value: Any) -> bool:
    """Whether a value is known, and without waiting for a device.

    A variable of Flax NNX may hold a traced value: it is taken for unknown.
    """
    if isinstance(value, jax.Array) and not isinstance(value, Tracer):
        return value.is_ready()  # type: ignore[attr-defined]
    return isinstance(value, int | np.generic | np.ndarray)


def _is_on_one_cpu(array: jax.Array) -> bool:
    devices = array.devices()
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


def same_state(state: Any, expected: Any) -> None:
    """Check that a state is of the expected types, as from `state_types`."""
    got = state_types(state)
    if got != expected:
        raise ValueError(
            f"`state` must come from this transform's own init: expected "
            f"{short(_names(expected))}, got {short(_names(got))}; call init again "
            "after changing an option; from_optax carries a state of optax's own "
            "RMSprop over"
        )


def state_types(state: Any) -> Any:
    """The type of a state; of a chain's state, a tuple of those of its parts."""
    return tuple(map(state_types, state)) if type(state) is tuple else type(state)


def _names(types: Any) -> str:
    """Types by their package, since optax has states of the same names."""
    if isinstance(types, tuple):
        return f"({', '.join(map(_names, types))})"
    package = types.__module__.partition(".")[0]
    return types.__name__ if package == "builtins" else f"{package}.{types.__name__}"


def fits(structure: Any, tree: Any) -> bool:
    """Whether a structure is that of a tree, or a prefix of it."""
    try:
        structure.flatten_up_to(tree)
    except ValueError:
        return False
    return True


def other_paths(given: dict[Any, Any], expected: dict[Any, Any]) -> list[str]:
    """What is missing, and what is unexpected, of leaves by their paths."""
    missing = [at(path) for path in expected if path not in given]
    unexpected = [at(path) for path in given if path not in expected]
    found = {"missing": missing, "unexpected": unexpected}
    return [f"{what} {some(paths)}" for what, paths in found.items() if paths]


def _by_path(tree: Any) -> tuple[dict[Any, Any], Any]:
    leaves, structure = tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return dict(leaves), structure
