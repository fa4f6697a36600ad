"""Where the state of an optimizer lies on a mesh of devices: as its parameters do.

JAX decides by itself in three ways. `tx.init(params)` keeps the parameters' shardings.
So does `jax.jit(tx.init)` on a mesh with explicit axes, inside `jax.set_mesh`. On a
mesh with automatic axes a compiled init does not: it makes zeros without a look at its
argument, on one device, or whole on each. And no way replicates the counters. So
the shardings are found here, from paths and shapes, to be passed to `jax.jit`.
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


def state_shardings(
    tx: optax.GradientTransformation, params: optax.Params, *, zero1: str | None = None
) -> optax.OptState:
    """Find the sharding of every array of the state of any optax transformation.

    An array that belongs to a parameter gets the parameter's sharding, all else is
    replicated. To a parameter belongs what has its shape, at a path that ends with the
    parameter's own: `.nu['dense']['kernel']` to `['dense']['kernel']`. That is so for
    codes of `compress_state` too, and inside of `optax.chain`, `optax.masked`,
    `optax.partition`, `optax.inject_hyperparams` and `optax.MultiSteps`.

    Nothing is computed, and no memory is taken: `params` may be shapes alone.

    Args:
      tx: any optax transformation.
      params: a tree of arrays, or of `jax.ShapeDtypeStruct` with a sharding, each with
        a `jax.sharding.NamedSharding`, all on one mesh.
      zero1: an axis of the mesh over which the arrays of the state are partitioned in
        addition, though the parameters are not (ZeRO, stage 1): in the first dimension
        that it divides and that no axis partitions. Where there is none, or where the
        parameter is partitioned over this axis already, an array stays as it is.

    Returns:
      A `NamedSharding` for each leaf of `tx.init(params)`, in its structure: for
      `out_shardings` of a compiled init, for both shardings of a compiled step, for
      `jax.device_put` and to restore checkpoints. With `jax.tree.map(lambda s: s.spec,
      shardings)` they are specs for `jax.shard_map`, but that `formats` of
      `compress_state` are a shard's own there.

    Raises:
      TypeError: a `tx` without init.
      ValueError: parameters without a NamedSharding, on more than one mesh, or none at
        all; an axis that the mesh does not have.

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
    of_parameters = {path: (p.shape, p.sharding) for path, p in leaves}
    replicated = NamedSharding(mesh, PartitionSpec())

    def of_leaf(path: Any, x: jax.ShapeDtypeStruct) -> NamedSharding:
        # The longest end of the path decides, also where the shape then differs, as
        # that of Adafactor's sums by row: a shorter end is another parameter.
        ends = (path[i:] for i in range(len(path) + 1))
        owner = next((end for end in ends if end in of_parameters), None)
        if owner is None:
            return replicated
        shape, sharding = of_parameters[owner]
        if shape != x.shape:
            return replicated
        return sharding if zero1 is None else _partitioned(sharding, shape, zero1)

    shapes = [jax.ShapeDtypeStruct(p.shape, p.dtype) for _, p in leaves]
    state = jax.eval_shape(init, jax.tree.unflatten(structure, shapes))
    return jax.tree_util.tree_map_with_path(of_leaf, state)


def check_state_shardings(state: optax.OptState, shardings: optax.OptState) -> None:
    """Check that a state lies where it should, before a step is compiled for it.

    A state in other places is no error for `jax.jit`: it compiles a second program,
    moves arrays at every step, or keeps on each device what should be in parts.

    Args:
      state: the state of an optax transformation, as arrays; not within `jax.jit`,
        where arrays are in no place yet.
      shardings: what `state_shardings` returned for it, or other shardings in the
        structure of the state.

    Returns:
      None. Shardings that put the same parts on the same devices are as good as each
      other, also where the names of axes differ, unless axes are explicit. The count
      after `tx.init(params)` is on one device, though JAX may still move it: that is
      not replicated.

    Raises:
      TypeError: a leaf of `shardings` that is no sharding, or has no devices.
      ValueError: a leaf that lies elsewhere or nowhere, as the first of them; a state
        with another structure.

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
                "one of a spec"
            )
        got = _sharding_of(leaf)
        if got is None or not _in_one_place(got, sharding, np.ndim(leaf)):
            remedy = "jax.device_put(state, shardings) moves it"
            if isinstance(leaf, Tracer):
                remedy = "call this outside of jax.jit"
            raise ValueError(
                "`state` must be sharded as in `shardings`, got "
                f"{_place(got) if got else kind_of(leaf)} at {at(path)}, expected "
                f"{_place(sharding)}; {remedy}"
            )


def _partitioned(
    sharding: NamedSharding, shape: tuple[int, ...], axis: str
) -> NamedSharding:
    """The sharding with one more dimension in parts, if one can be."""
    names = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    if any(axis in (x if isinstance(x, tuple) else (x,)) for x in names):
        return sharding
    parts = sharding.mesh.shape[axis]
    for i, size in enumerate(shape):
        if not names[i] and size and size % parts == 0:
            spec = PartitionSpec(*names[:i], axis, *names[i + 1 :])
            return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return sharding


def _mesh_of(params: Any) -> Mesh | AbstractMesh:
    """Check that every array is sharded by name over the same mesh, and return it."""
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
                f"`params` must be on one mesh, got {_mesh(first.mesh)} at "
                f"{at(leaves[0][0])} and {_mesh(sharding.mesh)} at {at(path)}; "
                "jax.device_put moves them"
            )
    return first.mesh


def _check_axis(zero1: Any, mesh: Mesh | AbstractMesh) -> None:
    """Check the name of an axis of a mesh."""
    names = [shown(axis) for axis in mesh.axis_names]
    if shown(zero1) not in names:  # an array would compare itself by elements
        axes = some(names, " or ") or "which has none"
        raise ValueError(
            f"`zero1` must be an axis of the mesh, {axes}, got {shown(zero1)}; name "
            "the one over which the batch is partitioned"
        )


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
