"""Errors that name the argument, the rule, the value and the remedy."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import ArrayLike

Function = TypeVar("Function", bound=Callable[..., Any])

# What frameworks call our arguments, and a dialect that takes that name.
FOREIGN = {
    "alpha": ("decay", "torch"),
    "epsilon": ("eps", "keras"),
    "eta": ("learning_rate", "optimisers_jl"),
    "gamma": ("decay", "jax_example_libraries"),
    "lr": ("learning_rate", "torch"),
    "rho": ("decay", "keras"),
    "step_size": ("learning_rate", "jax_example_libraries"),
    "wc": ("weight_decay", "dqn2015"),
}


def knows_foreign_names(function: Function) -> Function:
    """Let the error about another framework's argument say what it is called here."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() & FOREIGN.keys():
            ours, dialect = FOREIGN[name]
            own = ours in inspect.signature(function).parameters
            where = "" if own else " of rmsprop()"
            raise TypeError(
                f"{function.__name__}() takes no `{name}`, got {kwargs[name]!r}; here "
                f"it is `{ours}`{where}, and dialects.{dialect} takes `{name}`"
            )
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


# For dialects without maximize, see `dialects/_words.py`.
ASCEND = "; to ascend give maximize=True"


def number(
    name: str,
    value: Any,
    *,
    high: float = math.inf,
    zero: bool = True,
    hint: str = "",
    below_0: str = "",
) -> ArrayLike:
    """Check a scalar hyperparameter against [0, high), or (0, high) unless `zero`.

    Python and NumPy numbers come back as `float`, which promotes no dtype. JAX arrays
    come back as floating-point arrays; their value is checked unless it is traced.
    `hint` ends every error about it, `below_0` that about a negative number.
    """
    rule = f"`{name}` must be a number in {'[' if zero else '('}0, {high:g})"
    numeric = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    if not numeric or isinstance(value, bool) or np.iscomplexobj(value):
        if callable(value):
            hint = "; to schedule it use optax.inject_hyperparams"
        raise TypeError(f"{rule}, got {value!r}{hint}")
    if np.ndim(value) != 0:
        raise TypeError(
            f"{rule}, got an array of shape {np.shape(value)}; use jax.vmap to run "
            "many values at once"
        )
    # Within jax.jit, operations on an array make a tracer, also if it is none itself.
    known = None if isinstance(value, Tracer) else float(value)
    if isinstance(value, jax.Array):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(jnp.float32)
        if jnp.finfo(value.dtype).bits < 32:
            raise TypeError(
                f"{rule} in at least float32, got {value.dtype}, which rounds 0.999 to "
                "1; with optax.inject_hyperparams pass hyperparam_dtype=jnp.float32"
            )
    else:
        value = known
    if known is not None:
        within = 0 <= known < high if zero else 0 < known < high
        if not within:
            why = below_0 if known < 0 else ""
            raise ValueError(f"{rule}, got {known:g}{hint}{why}")
        if known > float(jnp.finfo(jnp.float32).max):
            raise ValueError(f"{rule}, got {known}, which is infinite in float32")
    return value


def is_off(value: ArrayLike) -> bool:
    """Whether an option is 0 for good, which only a Python number can promise."""
    return isinstance(value, float) and value == 0


def flags(**options: Any) -> None:
    """Check options that choose the program, which a traced value cannot do."""
    for name, value in options.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"`{name}` must be True or False, got {value!r}")


def integer(name: str, value: Any, *, high: float = math.inf) -> int:
    """Check a Python or NumPy integer against [0, high)."""
    rule = f"`{name}` must be an integer in [0, {high:g})"
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(
            f"{rule}, got {value!r}; it chooses the program: do not trace it"
        )
    if not 0 <= value < high:
        raise ValueError(f"{rule}, got {value}")
    return int(value)


def prng_key(name: str, value: Any) -> None:
    """Check that a value is one of JAX's keys, old or new."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        is_key = np.shape(value) == ()
    else:
        raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        is_key = (np.shape(value), dtype) == (raw.shape, raw.dtype)
    if not is_key:
        raise TypeError(
            f"`{name}` must be one PRNG key, got {value!r}; jax.random.key(0) makes one"
        )


# optax.inject_hyperparams takes functions and dtypes for schedules, and calls them.
_INJECTED = "; with optax.inject_hyperparams name `{}` in its static_args"


def real_dtype(name: str, dtype: Any) -> None:
    """Check the dtype of an accumulator: None, float32, or float64 in 64-bit mode."""
    if isinstance(dtype, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"`{name}` must be a dtype, got {dtype}" + _INJECTED.format(name)
        )
    if dtype is None:
        return
    allowed = sorted({"float32", jax.dtypes.canonicalize_dtype(jnp.float64).name})
    try:
        given = jnp.dtype(dtype).name
    except TypeError:
        given = repr(dtype)
    if given not in allowed:
        why = "an average in fewer bits stops moving"
        if given == "float64":
            why = "jax.config.update('jax_enable_x64', True) allows it"
        raise ValueError(
            f"`{name}` must be None or {' or '.join(allowed)}, got {given}; {why}"
        )


def storage_dtype(name: str, dtype: Any) -> np.dtype:
    """Check the dtype in which to keep a state: bfloat16 or uint8."""
    try:
        given = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(
            f"`{name}` must be bfloat16 or uint8, got {dtype!r}; pass jnp.uint8"
        ) from None
    if given not in (jnp.bfloat16, jnp.uint8):
        why = "it saves nothing: leave compress_state out"
        if given.itemsize == 1:
            why = "uint8 has a scale and more range in the same byte"
        elif given.itemsize == 2:
            why = "bfloat16 has the range of float32 in the same bytes"
        raise ValueError(f"`{name}` must be bfloat16 or uint8, got {given}; {why}")
    return given


def stored_as(name: str, leaf: Any, dtype: np.dtype, path: Any) -> None:
    """Check the dtype in which an array of a state has been kept."""
    if leaf.dtype != dtype:
        raise ValueError(
            f"`{name}` must be compressed to {dtype}, got {leaf.dtype} at {_at(path)}; "
            "use the dtype with which it was made, or call init again"
        )


def mask(name: str, value: Any) -> Callable[[Any], Any] | None:
    """Check a mask: None, a function, or a tree of booleans, but not one alone.

    It comes back as a plain function, or None. optax would call a tree of booleans in
    the form of an Equinox model, which is callable, and would take a
    `jax.tree_util.Partial`, which is a tree without leaves, for a tree.
    """
    leaves = tree_flatten_with_path(value)[0]
    if callable(value) and all(path == () for path, _ in leaves):
        return lambda params: value(params)
    for path, leaf in leaves:
        if path == () or not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"`{name}` must be a function or a tree of True and False, got {leaf} "
                f"at {_at(path)}" + _INJECTED.format(name)
            )
    return None if value is None else lambda params: value


def inexact(name: str, leaf: Any, path: Any, *, remedy: str, real: bool) -> None:
    """Check that a leaf is floating point or, unless `real`, complex."""
    dtype, kind = dtype_of(leaf), jnp.floating if real else jnp.inexact
    if dtype is not None and jnp.issubdtype(dtype, kind):
        return
    if dtype == jax.dtypes.float0:
        dtype = "float0"
        remedy = "the gradient of an integer: give None in its place"
    raise TypeError(
        f"`{name}` must be floating point{'' if real else ' or complex'}, got "
        f"{_kind(leaf) if dtype is None else dtype} at {_at(path)}; {remedy}"
    )


def dtype_of(leaf: Any) -> Any:
    """The dtype of a number or an array, in JAX; None for anything else.

    `jnp.result_type` alone takes the string "float32", the class `float` and None for
    dtypes, and does not know float0.
    """
    if getattr(leaf, "dtype", None) == jax.dtypes.float0:
        return jax.dtypes.float0
    if leaf is None or isinstance(leaf, str | type | np.dtype):
        return None
    try:
        return jnp.result_type(leaf)
    except TypeError:
        return None


def not_integer(name: str, leaf: Any, path: Any) -> None:
    """Check that a large array of a state is no array of integers."""
    if jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
        raise ValueError(
            f"`{name}` must keep floating-point numbers in a parameter's shape, got "
            f"{jnp.result_type(leaf)} at {_at(path)}; leave integer parameters out "
            "with optax.masked"
        )


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
            beside = _kind(of_leaf) if dtype is None else dtype
            problems.append(f"{_at(path)} is an array, expected None beside {beside}")
            continue
        real = not jnp.iscomplexobj(of_leaf)
        inexact(name, leaf, path, remedy=f"compare with {like}", real=real)
        if np.shape(leaf) != np.shape(of_leaf):
            problems.append(
                f"{_at(path)} has shape {np.shape(leaf)}, expected {np.shape(of_leaf)}"
            )
    problems += _other_paths(found, leaves)
    if not problems and not fits(given_tree, expected):
        unexpected = f"unexpected {', '.join(map(_at, absent))}"
        problems.append(unexpected if absent else f"got {given_tree}, expected {tree}")
    if problems:
        raise ValueError(
            f"`{name}` must have the structure and shapes of {like}: "
            + "; ".join(problems)
        )


def belong(updates: Any, params: Any, *slots: Any) -> None:
    """Check that gradients, parameters (unless None) and slots belong together."""
    for slot in slots:
        same_tree("updates", updates, "the parameters given to init", slot)
    if params is not None:
        same_tree("updates", updates, "`params`", params)


def fits(structure: Any, tree: Any) -> bool:
    """Whether a structure is that of a tree, or a prefix of it."""
    try:
        structure.flatten_up_to(tree)
    except ValueError:
        return False
    return True


def on_one_mesh(name: str, tree: Any) -> Mesh | AbstractMesh:
    """Check that every array is sharded by name over the same mesh, and return it."""
    leaves = tree_flatten_with_path(tree)[0]
    if not leaves:
        raise ValueError(
            f"`{name}` must have an array, whose mesh is used, got {tree!r}; a state "
            "without parameters needs no shardings"
        )
    for path, leaf in leaves:
        sharding, first = _sharding_of(leaf), _sharding_of(leaves[0][1])
        if not isinstance(sharding, NamedSharding):
            remedy = (
                f"jax.device_put({name}, NamedSharding(mesh, PartitionSpec())) "
                "replicates them"
            )
            if isinstance(leaf, Tracer):
                remedy = "call this outside of jax.jit"
            elif isinstance(leaf, jax.ShapeDtypeStruct):
                remedy = "give it one as sharding="
            raise ValueError(
                f"`{name}` must have a NamedSharding each, got "
                f"{sharding or _kind(leaf)} at {_at(path)}; {remedy}"
            )
        if sharding.mesh != first.mesh:
            raise ValueError(
                f"`{name}` must be on one mesh, got {_mesh(first.mesh)} at "
                f"{_at(leaves[0][0])} and {_mesh(sharding.mesh)} at {_at(path)}; "
                "jax.device_put moves them"
            )
    return first.mesh


def axis_of(name: str, value: Any, mesh: Mesh | AbstractMesh) -> None:
    """Check the name of an axis of a mesh."""
    if value not in mesh.axis_names:
        axes = " or ".join(map(repr, mesh.axis_names)) or "which has none"
        raise ValueError(
            f"`{name}` must be an axis of the mesh, {axes}, got {value!r}; name the "
            "one over which the batch is partitioned"
        )


def sharded_as(name: str, tree: Any, like: str, shardings: Any) -> None:
    """Check that arrays lie where a tree of shardings puts them."""
    structure: Any
    leaves, structure = tree_flatten_with_path(tree)
    expected, expected_structure = tree_flatten_with_path(shardings)
    if structure != expected_structure:
        problems = _other_paths(dict(leaves), dict(expected))
        raise ValueError(
            f"`{name}` must have the structure of `{like}`: "
            + ("; ".join(problems) or f"got {structure}, expected {expected_structure}")
            + "; make both with the same transformation and parameters"
        )
    for (path, leaf), (_, sharding) in zip(leaves, expected, strict=True):
        if not isinstance(sharding, Sharding) or _is_abstract(sharding):
            raise TypeError(
                f"`{like}` must be jax.sharding.Sharding on devices, got {sharding!r} "
                f"at {_at(path)}; NamedSharding(mesh, spec) makes one of a spec"
            )
        got = _sharding_of(leaf)
        if got is None or not _in_one_place(got, sharding, np.ndim(leaf)):
            remedy = f"jax.device_put({name}, {like}) moves it"
            if isinstance(leaf, Tracer):
                remedy = "call this outside of jax.jit"
            raise ValueError(
                f"`{name}` must be sharded as in `{like}`, got "
                f"{_place(got) if got else _kind(leaf)} at {_at(path)}, expected "
                f"{_place(sharding)}; {remedy}"
            )


def _other_paths(given: dict[Any, Any], expected: dict[Any, Any]) -> list[str]:
    """What is missing, and what is unexpected, of leaves by their paths."""
    missing = [_at(path) for path in expected if path not in given]
    unexpected = [_at(path) for path in given if path not in expected]
    found = {"missing": missing, "unexpected": unexpected}
    return [f"{what} {', '.join(paths)}" for what, paths in found.items() if paths]


def _is_abstract(sharding: Any) -> bool:
    return isinstance(getattr(sharding, "mesh", None), AbstractMesh)


def _in_one_place(got: Any, expected: Any, ndim: int) -> bool:
    rank = len(expected.spec) if isinstance(expected, NamedSharding) else 0
    if _is_abstract(got) or rank > ndim or not got.is_equivalent_to(expected, ndim):
        return False
    # With explicit axes the mesh is part of an array's type, and names matter.
    meshes = [s.mesh for s in (got, expected) if isinstance(s, NamedSharding)]
    explicit = any(AxisType.Explicit in mesh.axis_types for mesh in meshes)
    return not explicit or meshes[0] == meshes[-1]


def _sharding_of(leaf: Any) -> Any:
    """None for what is no array, and within `jax.jit`, where it is not known."""
    return None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)


def _kind(leaf: Any) -> str:
    if leaf is None:
        return "None"
    kind = "traced array" if isinstance(leaf, Tracer) else type(leaf).__name__
    return f"a{'n' * (kind[0] in 'aeiouAEIOU')} {kind}"


def _place(sharding: Any) -> str:
    if not isinstance(sharding, NamedSharding):
        return str(sharding)
    memory = sharding.memory_kind
    at = f" in {memory}" if memory not in (None, "device", "unpinned_host") else ""
    return f"{sharding.spec} on {_mesh(sharding.mesh)}{at}"


def _mesh(mesh: Any) -> str:
    """Axes, their kinds and, which the mesh's own text leaves out, its devices."""
    text = ", ".join(f"{name!r}: {size}" for name, size in mesh.shape.items())
    text += f"; {'/'.join(sorted({kind.name for kind in mesh.axis_types}))}"
    if isinstance(mesh, Mesh):
        ids = [str(device.id) for device in mesh.devices.flat]
        text += f"; devices {' '.join(ids[:8])}{' ...' * (len(ids) > 8)}"
    return f"Mesh({text})"


def _at(path: Any) -> str:
    return keystr(path) or "the root"


def _by_path(tree: Any) -> tuple[dict[Any, Any], Any]:
    leaves, structure = tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return dict(leaves), structure


def same_state(state: Any, expected: Any) -> None:
    """Check that a state is of the expected types, as from `state_types`."""
    got = state_types(state)
    if got != expected:
        raise ValueError(
            f"`state` must come from this transform's own init: expected "
            f"{_names(expected)}, got {_names(got)}; call init again after changing an "
            "option; from_optax carries a state of optax's own RMSprop over"
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
