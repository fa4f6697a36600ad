"""Errors that name the argument, the rule, the value and the remedy."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.tree_util import GetAttrKey, SequenceKey, tree_flatten_with_path
from jax.typing import ArrayLike
from optax import ScalarOrSchedule

from optax_rmsprop._texts import at, kind_of, short, shown, some, trees

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
                f"{function.__name__}() takes no `{name}`, got {shown(kwargs[name])}; "
                f"here it is `{ours}`{where}, and dialects.{dialect} takes `{name}`"
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
    if not is_real(value):
        if callable(value) and not isinstance(value, type):
            hint = "; to schedule it use optax.inject_hyperparams"
        elif hint != _SCHEDULED and isinstance(value, jax.Array):
            hint = _HYPERPARAM_DTYPE if jnp.iscomplexobj(value) else hint
        raise TypeError(f"{rule}, got {shown(value)}{hint}")
    if np.ndim(value) != 0:
        raise TypeError(
            f"{rule}, got an array of shape {np.shape(value)}{hint}; use jax.vmap to "
            "run many values at once"
        )
    # Within jax.jit, operations on an array make a tracer, also if it is none itself.
    known = None if isinstance(value, Tracer) else _float(value)
    got = shown(value) if known is None or math.isinf(known) else f"{known:g}"
    if isinstance(value, jax.Array):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(jnp.float32)
        if jnp.finfo(value.dtype).bits < 32:
            raise TypeError(
                f"{rule} in at least float32, got {value.dtype}, which rounds 0.999 to "
                f"1{_HYPERPARAM_DTYPE}"
            )
    else:
        value = known
    if known is not None:
        within = 0 <= known < high if zero else 0 < known < high
        if not within:
            why = below_0 if known < 0 else ""
            raise ValueError(f"{rule}, got {got}{hint}{why}")
        if known > float(jnp.finfo(jnp.float32).max):
            raise ValueError(f"{rule}, got {known}, which is infinite in float32")
    return value


_SCHEDULED = " from its schedule"

# optax.inject_hyperparams makes all numbers arrays in the dtype of the parameters.
_HYPERPARAM_DTYPE = "; with optax.inject_hyperparams pass hyperparam_dtype=jnp.float32"


def is_real(value: Any) -> bool:
    """Whether a value is a real number or an array of real numbers."""
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
        return False
    if isinstance(value, int):
        return not isinstance(value, bool)
    dtype = dtype_of(value)
    kinds = jnp.integer, jnp.floating
    return dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf


def schedule(name: str, value: Any, **rules: Any) -> ScalarOrSchedule:
    """Check a number as `number` does; a schedule comes back with a check of its own.

    That check is of each number that the schedule returns. The values of JAX arrays are
    left out of it: under `jax.jit` they are not known.
    """
    if isinstance(value, type) or not callable(value):
        return number(name, value, **rules)

    def checked(count: Any) -> Any:
        result = value(count)
        is_array = isinstance(result, jax.Array) and result.ndim == 0
        if not (is_array and is_real(result)):
            number(name, result, **{**rules, "hint": _SCHEDULED})
        return result

    return checked


def is_off(value: ArrayLike) -> bool:
    """Whether an option is 0 for good, which only a Python number can promise."""
    return isinstance(value, float) and value == 0


def flags(**options: Any) -> None:
    """Check options that choose the program, which a traced value cannot do."""
    for name, value in options.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"`{name}` must be True or False, got {shown(value)}")


def integer(name: str, value: Any, *, high: float = math.inf) -> int:
    """Check a Python or NumPy integer against [0, high)."""
    rule = f"`{name}` must be an integer in [0, {high:g})"
    if not isinstance(value, int | np.integer) or not is_real(value):
        raise TypeError(
            f"{rule}, got {shown(value)}; it chooses the program: do not trace it"
        )
    if not 0 <= value < high:
        raise ValueError(f"{rule}, got {shown(value)}")
    return int(value)


def prng_key(name: str, value: Any) -> None:
    """Check that a value is one of JAX's keys, old or new."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        is_key = np.shape(value) == ()
    else:
        raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        is_key = dtype == raw.dtype and np.shape(value) == raw.shape
    if not is_key:
        raise TypeError(
            f"`{name}` must be one PRNG key, got {shown(value)}; jax.random.key(0) "
            "makes one"
        )


# optax.inject_hyperparams takes functions and dtypes for schedules, and calls them.
_INJECTED = "; with optax.inject_hyperparams name `{}` in its static_args"


def real_dtype(name: str, dtype: Any) -> None:
    """Check the dtype of an accumulator: None, float32, or float64 in 64-bit mode."""
    if isinstance(dtype, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"`{name}` must be a dtype, got {shown(dtype)}" + _INJECTED.format(name)
        )
    if dtype is None:
        return
    allowed = sorted({"float32", jax.dtypes.canonicalize_dtype(jnp.float64).name})
    known = _dtype(dtype)
    given = shown(dtype) if known is None else known.name
    if given not in allowed:
        why = "an average in fewer bits stops moving"
        if given == "float64":
            why = "jax.config.update('jax_enable_x64', True) allows it"
        raise ValueError(
            f"`{name}` must be None or {' or '.join(allowed)}, got {given}; {why}"
        )


def storage_dtype(name: str, dtype: Any) -> np.dtype:
    """Check the dtype in which to keep a state: bfloat16 or uint8."""
    given = _dtype(dtype)
    if given is None:
        raise ValueError(
            f"`{name}` must be bfloat16 or uint8, got {shown(dtype)}; pass jnp.uint8"
        )
    if given not in (jnp.bfloat16, jnp.uint8):
        why = "it saves nothing: leave compress_state out"
        if given.itemsize == 1:
            why = "uint8 has a scale and more range in the same byte"
        elif given.itemsize == 2:
            why = "bfloat16 has the range of float32 in the same bytes"
        raise ValueError(
            f"`{name}` must be bfloat16 or uint8, got {short(str(given))}; {why}"
        )
    return given


def _dtype(value: Any) -> np.dtype | None:
    """What a value says as a dtype; None if it is none."""
    if value is None or isinstance(value, jax.Array | np.ndarray | np.generic):
        return None
    try:
        return jnp.dtype(value)
    except Exception:  # for texts NumPy has more than one kind of error
        return None


def stored_as(name: str, leaf: Any, dtype: np.dtype, path: Any) -> None:
    """Check the dtype in which an array of a state has been kept."""
    given = dtype_of(leaf)
    if given != dtype:
        raise ValueError(
            f"`{name}` must be compressed to {dtype}, got {given or kind_of(leaf)} at "
            f"{at(path)}; use the dtype with which it was made, or call init again"
        )


def mask(name: str, value: Any) -> Callable[[Any], Any] | None:
    """Check a mask: None, a function, or a tree of booleans, but not one alone.

    It comes back as a plain function, or None. optax would call a tree of booleans in
    the form of an Equinox model, which is callable, and would take a
    `jax.tree_util.Partial`, which is a tree without leaves, for a tree.
    """
    if value is None:
        return None
    leaves = tree_flatten_with_path(value)[0]
    is_function = callable(value) and all(path == () for path, _ in leaves)
    is_function &= not isinstance(value, type)
    if not is_function:
        _booleans(name, value, alone=False, remedy=_INJECTED.format(name))

    def checked(params: Any) -> Any:
        tree = value(params) if is_function else value
        _booleans(name, tree)
        structure = jax.tree.structure(tree)
        if not fits(structure, params):
            given, expected = (
                dict(tree_flatten_with_path(t)[0]) for t in (tree, params)
            )
            # What is True or False for a whole tree stands for all that is in it.
            starts = ([path[:i] for i in range(len(path) + 1)] for path in expected)
            of_each = [next(filter(given.__contains__, s), s[-1]) for s in starts]
            problems = other_paths(given, dict.fromkeys(of_each))
            raise ValueError(
                f"`{name}` must have the structure of the parameters or a prefix of "
                "it: "
                + "; ".join(problems or [trees(structure, jax.tree.structure(params))])
            )
        return tree

    return checked


def _booleans(name: str, tree: Any, *, alone: bool = True, remedy: str = "") -> None:
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if (
            dtype_of(leaf) != np.bool_
            or np.shape(leaf) != ()
            or isinstance(leaf, Tracer)
            or (path == () and not alone)
        ):
            raise TypeError(
                f"`{name}` must be a tree of True and False or a function that returns "
                f"one, got {shown(leaf)} at {at(path)}{remedy}"
            )


def inexact(name: str, leaf: Any, path: Any, *, remedy: str, real: bool) -> None:
    """Check that a leaf is floating point or, unless `real`, complex."""
    dtype, kind = dtype_of(leaf), jnp.floating if real else jnp.inexact
    if dtype is not None and jnp.issubdtype(dtype, kind):
        if _has_sign_and_zero(dtype):
            return
        dtype = f"{dtype}, which has neither sign nor 0,"
    elif dtype == jax.dtypes.float0:
        dtype = "float0"
        remedy = "the gradient of an integer: give None in its place"
    raise TypeError(
        f"`{name}` must be floating point{'' if real else ' or complex'}, got "
        f"{kind_of(leaf) if dtype is None else dtype} at {at(path)}; {remedy}"
    )


@functools.cache
def _has_sign_and_zero(dtype: Any) -> bool:
    """False for float8_e8m0fnu, which is made for scales."""
    return np.array_equal(np.array([-1, 0], dtype).astype(complex), [-1, 0])


def dtype_of(leaf: Any) -> Any:
    """The dtype of a number or an array, in JAX; None for anything else.

    `jnp.result_type` alone takes the string "float32", the class `float` and None for
    dtypes, and does not know float0.
    """
    if getattr(leaf, "dtype", None) == jax.dtypes.float0:
        return jax.dtypes.float0
    if leaf is None or isinstance(leaf, str | type | np.dtype):
        return None
    if isinstance(leaf, jax.Array):  # the quick way
        return leaf.dtype
    try:
        return jnp.result_type(leaf)
    except (TypeError, ValueError, OverflowError):
        return None


def compressible(name: str, leaf: Any, path: Any) -> None:
    """Check that a large array of a state has numbers in the range of float32."""
    dtype = jnp.result_type(leaf)
    why = ""
    if jnp.issubdtype(dtype, jnp.integer):
        why = "leave integer parameters out with optax.masked"
    elif dtype == jnp.float64:
        why = (
            "what is kept has the range of float32: keep averages in float32, in "
            "rmsprop by accumulator_dtype=jnp.float32"
        )
    if why:
        raise ValueError(
            f"`{name}` must keep floating-point numbers of at most 32 bits in a "
            f"parameter's shape, got {dtype} at {at(path)}; {why}"
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
            f"`{name}` must have an array, whose mesh is used, got {shown(tree)}; a "
            "state without parameters needs no shardings"
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
                f"{short(str(sharding or kind_of(leaf)))} at {at(path)}; {remedy}"
            )
        if sharding.mesh != first.mesh:
            raise ValueError(
                f"`{name}` must be on one mesh, got {_mesh(first.mesh)} at "
                f"{at(leaves[0][0])} and {_mesh(sharding.mesh)} at {at(path)}; "
                "jax.device_put moves them"
            )
    return first.mesh


def axis_of(name: str, value: Any, mesh: Mesh | AbstractMesh) -> None:
    """Check the name of an axis of a mesh."""
    names = [shown(axis) for axis in mesh.axis_names]
    if shown(value) not in names:  # an array would compare itself by elements
        axes = some(names, " or ") or "which has none"
        raise ValueError(
            f"`{name}` must be an axis of the mesh, {axes}, got {shown(value)}; name "
            "the one over which the batch is partitioned"
        )


def sharded_as(name: str, tree: Any, like: str, shardings: Any) -> None:
    """Check that arrays lie where a tree of shardings puts them."""
    structure: Any
    leaves, structure = tree_flatten_with_path(tree)
    expected, expected_structure = tree_flatten_with_path(shardings)
    if structure != expected_structure:
        problems = other_paths(dict(leaves), dict(expected))
        raise ValueError(
            f"`{name}` must have the structure of `{like}`: "
            + "; ".join(problems or [trees(structure, expected_structure)])
            + "; make both with the same transformation and parameters"
        )
    for (path, leaf), (_, sharding) in zip(leaves, expected, strict=True):
        if not isinstance(sharding, Sharding) or _is_abstract(sharding):
            raise TypeError(
                f"`{like}` must be jax.sharding.Sharding on devices, got "
                f"{shown(sharding)} at {at(path)}; NamedSharding(mesh, spec) makes "
                "one of a spec"
            )
        got = _sharding_of(leaf)
        if got is None or not _in_one_place(got, sharding, np.ndim(leaf)):
            remedy = f"jax.device_put({name}, {like}) moves it"
            if isinstance(leaf, Tracer):
                remedy = "call this outside of jax.jit"
            raise ValueError(
                f"`{name}` must be sharded as in `{like}`, got "
                f"{_place(got) if got else kind_of(leaf)} at {at(path)}, expected "
                f"{_place(sharding)}; {remedy}"
            )


def other_paths(given: dict[Any, Any], expected: dict[Any, Any]) -> list[str]:
    """What is missing, and what is unexpected, of leaves by their paths."""
    missing = [at(path) for path in expected if path not in given]
    unexpected = [at(path) for path in given if path not in expected]
    found = {"missing": missing, "unexpected": unexpected}
    return [f"{what} {some(paths)}" for what, paths in found.items() if paths]


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


def _place(sharding: Any) -> str:
    if not isinstance(sharding, NamedSharding):
        return short(str(sharding), 140)
    memory = sharding.memory_kind
    within = f" in {memory}" if memory not in (None, "device", "unpinned_host") else ""
    return short(f"{sharding.spec} on {_mesh(sharding.mesh)}{within}", 140)


def _mesh(mesh: Any) -> str:
    """Axes, their kinds and, which the mesh's own text leaves out, its devices."""
    text = ", ".join(f"{name!r}: {size}" for name, size in mesh.shape.items())
    text += f"; {'/'.join(sorted({kind.name for kind in mesh.axis_types}))}"
    if isinstance(mesh, Mesh):
        ids = [str(device.id) for device in mesh.devices.flat]
        text += f"; devices {' '.join(ids[:8])}{' ...' * (len(ids) > 8)}"
    return f"Mesh({short(text, 84)})"


def _by_path(tree: Any) -> tuple[dict[Any, Any], Any]:
    leaves, structure = tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return dict(leaves), structure


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
