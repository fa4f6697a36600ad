"""Shardings for the state of an optimizer: those of its parameters.

Without them, the sharding of a new state depends on how init is called. `tx.init` keeps
the parameters' shardings. So does `jax.jit(tx.init)` on a mesh with explicit axes,
inside `jax.set_mesh`. On a mesh with automatic axes, the compiled init does not depend
on the parameters' values, only on their shapes: it makes zeros on one device, or a
whole copy on each. The counters are replicated in none of these cases. So
`state_shardings` finds the shardings from paths and shapes, to be passed to `jax.jit`.

An example: the parameter at `['dense']['kernel']` has shape (64, 48) and the sharding
P('data', None). The state of `rmsprop(momentum=0.9)` has three kinds of leaves:

    path                                shape      sharding
    [0].count                           ()         replicated: no parameter's path
    [0].nu['dense']['kernel']           (64, 48)   P('data', None), as the parameter
    [1].trace['dense']['kernel']        (64, 48)   P('data', None), likewise

In a state of `compress_state`, the formats of rows have one axis of size 1 or more:

    .formats.next.lowest[0].nu['dense']['kernel']  (64, 1)    P('data', None)
"""

from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
)
from jax.tree_util import tree_flatten_with_path

from optax_rmsprop._errors import at, kind_of, other_paths, short, shown, some, trees
from optax_rmsprop.wrappers._transformation import name_of, owner_of


def state_shardings(
    tx: optax.GradientTransformation, params: optax.Params, *, zero1: str | None = None
) -> optax.OptState:
    """Find the sharding of every array of the state of any optax transformation.

    An array that belongs to a parameter gets the parameter's sharding, and every other
    array is replicated. An array belongs to a parameter if it has the parameter's shape
    and its path ends with the parameter's: `.nu['dense']['kernel']` belongs to
    `['dense']['kernel']`. Axes of size 1 where the parameter's are longer are not
    partitioned. This covers the codes and formats of `compress_state`, and states
    inside `optax.chain`, `optax.masked`, `optax.partition`, `optax.inject_hyperparams`
    and `optax.MultiSteps`.

    Nothing is computed and no memory is allocated: `params` may be shapes alone.

    Args:
      tx: any optax transformation.
      params: a tree of arrays, or of `jax.ShapeDtypeStruct` with a sharding, each with
        a `jax.sharding.NamedSharding`, all on one mesh.
      zero1: an axis of the mesh over which the state is partitioned too, although the
        parameters are not (ZeRO, stage 1). It partitions the first dimension of an
        array that no other axis partitions and whose size it divides. Arrays without
        such a dimension, and those that it partitions already, stay as they are.

    Returns:
      A `NamedSharding` for each leaf of `tx.init(params)`, in its structure. Use them
      as `out_shardings` of a compiled init, as both shardings of a compiled step, in
      `jax.device_put` and to restore checkpoints. `jax.tree.map(lambda s:
      s.with_memory_kind("pinned_host"), shardings)` puts the state into host memory
      instead (docs/scale.md says how to step with it). `jax.tree.map(lambda s: s.spec,
      shardings)` gives specs for `jax.shard_map`, if no axis within a row of
      `compress_state` is partitioned: there, every shard has its own `formats`.

    Raises:
      TypeError: a `tx` without init.
      ValueError: parameters without a NamedSharding, or on more than one mesh; no
        parameters at all; an axis that the mesh does not have.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_rmsprop import rmsprop, wrappers
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> by_rows = NamedSharding(mesh, PartitionSpec("data"))
      >>> params = jax.device_put(jnp.zeros((8, 4)), by_rows)
      >>> shardings = wrappers.state_shardings(rmsprop(), params)
      >>> shardings[0].nu == by_rows, shardings[0].count.is_fully_replicated
      (True, True)

    References:
      Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter
      Models, arXiv:1910.02054, section 5.1: zero1.
      Xu et al., Automatic Cross-Replica Sharding of Weight Update in Data-Parallel
      Training, arXiv:2004.13336: the same, by a compiler.
    """
    init = getattr(tx, "init", None)
    if not callable(init):
        raise TypeError(
            "`tx` must be an optax.GradientTransformation, got "
            f"{shown(tx)}; give the transformation, not its init"
        )
    leaves, structure = tree_flatten_with_path(params)
    mesh = _mesh_of(params)
    if zero1 is not None:
        _check_axis(zero1, mesh)
    parameters = {name_of(path): (p.shape, p.sharding) for path, p in leaves}
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding_of(path: Any, x: jax.ShapeDtypeStruct) -> NamedSharding:
        owner = owner_of(path, parameters)
        if owner is None:
            return replicated
        shape, sharding = parameters[owner]
        if zero1 is not None:
            sharding = _partitioned(sharding, shape, zero1)
        return sharding if shape == x.shape else _of_rows(sharding, shape, x.shape)

    shapes = [jax.ShapeDtypeStruct(p.shape, p.dtype) for _, p in leaves]
    state = jax.eval_shape(init, jax.tree.unflatten(structure, shapes))
    return jax.tree_util.tree_map_with_path(sharding_of, state)


def check_state_shardings(state: optax.OptState, shardings: optax.OptState) -> None:
    """Check that a state has the expected shardings, before a step is compiled for it.

    `jax.jit` accepts a state with other shardings without an error. It then compiles a
    second program, moves arrays at every step, or keeps whole arrays on each device
    where shards were meant.

    Args:
      state: the state of an optax transformation, as arrays. Traced arrays have no
        sharding yet, so call this outside of `jax.jit`.
      shardings: what `state_shardings` returned for it, or other shardings in the
        structure of the state.

    Returns:
      None. Shardings are equal if they put the same shards on the same devices, in the
      same kind of memory (such as "device" or "pinned_host"), even if the names of axes
      differ, unless axes are explicit. The count after `tx.init(params)` is on one
      device, and therefore not replicated, although JAX may still move it.

    Raises:
      TypeError: a leaf of `shardings` that is not a sharding, or has no devices.
      ValueError: a state with another structure; a leaf with another sharding or with
        none. The error names the first such leaf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_rmsprop import rmsprop, wrappers
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec()))
      >>> tx = rmsprop()
      >>> shardings = wrappers.state_shardings(tx, params, zero1="data")
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> wrappers.check_state_shardings(state, shardings)

    References:
      `state_shardings`.
    """
    structure: Any
    leaves, structure = tree_flatten_with_path(state)
    expected, expected_structure = tree_flatten_with_path(shardings)
    if structure != expected_structure:
        problems = other_paths(dict(leaves), dict(expected))
        raise ValueError(
            "`state` must have the structure of `shardings`: "
            + "; ".join(problems or [trees(structure, expected_structure)])
            + "; make both with the same transformation and parameters"
        )
    for (path, leaf), (_, sharding) in zip(leaves, expected, strict=True):
        if not isinstance(sharding, Sharding) or _is_abstract(sharding):
            raise TypeError(
                "`shardings` must be jax.sharding.Sharding on devices, got "
                f"{shown(sharding)} at {at(path)}; NamedSharding(mesh, spec) makes "
                "one from a spec"
            )
        got = _sharding_of(leaf)
        if got is None or not _are_equivalent(got, sharding, np.ndim(leaf)):
            remedy = "jax.device_put(state, shardings) moves it"
            if isinstance(leaf, Tracer):
                remedy = "call this outside of jax.jit"
            found = _text_of(got, sharding) if got else kind_of(leaf)
            raise ValueError(
                f"`state` must be sharded as in `shardings`, got {found} at "
                f"{at(path)}, expected {_text_of(sharding, got)}; {remedy}"
            )


def _partitioned(
    sharding: NamedSharding, shape: tuple[int, ...], axis: str
) -> NamedSharding:
    """Partition one more dimension over an axis, if there is one that it divides.

    With 4 devices on the axis 'data', a shape of (6, 8) and P() give P(None, 'data').
    """
    names = _names(sharding, shape)
    if any(axis in (x if isinstance(x, tuple) else (x,)) for x in names):
        return sharding
    devices = sharding.mesh.shape[axis]
    for i, size in enumerate(shape):
        if not names[i] and size and size % devices == 0:
            spec = PartitionSpec(*names[:i], axis, *names[i + 1 :])
            return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return sharding


def _names(sharding: NamedSharding, shape: tuple[int, ...]) -> list[Any]:
    """Return what partitions each dimension; a spec may leave out the last ones."""
    return [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]


def _of_rows(
    sharding: NamedSharding, shape: tuple[int, ...], rows: tuple[int, ...]
) -> NamedSharding:
    """Return the sharding of an array with one number for each row of another.

    It is replicated if it is no such array: its shape has an axis which is neither as
    long as the other's nor of size 1.
    """
    spec = PartitionSpec()
    if len(rows) == len(shape) and all(
        n in (1, size) for n, size in zip(rows, shape, strict=True)
    ):
        pairs = zip(_names(sharding, shape), rows, shape, strict=True)
        spec = PartitionSpec(*(x if n == size else None for x, n, size in pairs))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _mesh_of(params: Any) -> Mesh | AbstractMesh:
    """Return the mesh of the parameters, after a check that it is one for all."""
    leaves = tree_flatten_with_path(params)[0]
    if not leaves:
        raise ValueError(
            f"`params` must have an array, whose mesh is used, got {shown(params)}; a "
            "state without parameters needs no shardings"
        )
    for path, leaf in leaves:
        sharding, first = _sharding_of(leaf), _sharding_of(leaves[0][1])
        if not isinstance(sharding, NamedSharding):
            remedy = (
                "jax.device_put(params, NamedSharding(mesh, PartitionSpec())) "
                "replicates them"
            )
            if isinstance(leaf, Tracer):
                remedy = "call this outside of jax.jit"
            elif isinstance(leaf, jax.ShapeDtypeStruct):
                remedy = "give it one as sharding="
            raise ValueError(
                "`params` must have a NamedSharding each, got "
                f"{short(str(sharding or kind_of(leaf)))} at {at(path)}; {remedy}"
            )
        if sharding.mesh != first.mesh:
            raise ValueError(
                f"`params` must be on one mesh, got {_text_of_mesh(first.mesh)} at "
                f"{at(leaves[0][0])} and {_text_of_mesh(sharding.mesh)} at "
                f"{at(path)}; jax.device_put moves them"
            )
    return first.mesh


def _check_axis(zero1: Any, mesh: Mesh | AbstractMesh) -> None:
    """Check that `zero1` is the name of an axis of the mesh."""
    names = [shown(axis) for axis in mesh.axis_names]
    if shown(zero1) not in names:  # texts, because == of an array gives an array
        axes = some(names, " or ") or "which has none"
        raise ValueError(
            f"`zero1` must be an axis of the mesh, {axes}, got {shown(zero1)}; name "
            "the one over which the batch is partitioned"
        )


def _is_abstract(sharding: Any) -> bool:
    return isinstance(getattr(sharding, "mesh", None), AbstractMesh)


def _are_equivalent(got: Any, expected: Any, ndim: int) -> bool:
    """Whether two shardings put the same shards of an array on the same devices."""
    rank = len(expected.spec) if isinstance(expected, NamedSharding) else 0
    if _is_abstract(got) or rank > ndim or not got.is_equivalent_to(expected, ndim):
        return False
    # With explicit axes the mesh is part of an array's type, and names matter.
    meshes = [s.mesh for s in (got, expected) if isinstance(s, NamedSharding)]
    explicit = any(AxisType.Explicit in mesh.axis_types for mesh in meshes)
    return not explicit or meshes[0] == meshes[-1]


def _sharding_of(leaf: Any) -> Any:
    """Return the sharding of an array, or None if it is traced or not an array."""
    return None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)


def _text_of(sharding: Any, other: Any) -> str:
    """Show a sharding, with its kind of memory if the other has another kind."""
    if not isinstance(sharding, NamedSharding):
        return short(str(sharding), 140)
    memory = sharding.memory_kind
    differs = memory != getattr(other, "memory_kind", memory)
    within = f" in {memory}" if differs else ""
    return short(f"{sharding.spec} on {_text_of_mesh(sharding.mesh)}{within}", 140)


def _text_of_mesh(mesh: Any) -> str:
    """Show a mesh with its axes, their types and its devices.

    The mesh's own text leaves the devices out.
    """
    text = ", ".join(f"{name!r}: {size}" for name, size in mesh.shape.items())
    text += f"; {'/'.join(sorted({kind.name for kind in mesh.axis_types}))}"
    if isinstance(mesh, Mesh):
        ids = [str(device.id) for device in mesh.devices.flat]
        text += f"; devices {' '.join(ids[:8])}{' ...' * (len(ids) > 8)}"
    return f"Mesh({short(text, 84)})"
