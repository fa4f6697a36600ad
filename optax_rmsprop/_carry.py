"""A run of another framework, and how it goes on in JAX: what all sources share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop import dialects
from optax_rmsprop._port import Correspondence, Port
from optax_rmsprop._texts import cut, listed, shown
from optax_rmsprop.transforms import ScaleByRmsState, ScaleByStddevState

FROZEN = "frozen"  # the label of what no group trains
# Our averages, and torch's; var is square_avg - grad_avg².
MOMENTS = {"nu": "square_avg", "mu": "grad_avg", "var": "", "trace": "momentum_buffer"}


class Group(NamedTuple):
    """Parameters with common options."""

    dialect: str
    lr: float
    options: dict[str, Any]  # the dialect's other arguments
    step: int  # updates made

    @property
    def slots(self) -> list[str]:
        """The slots of each of its parameters, by torch's names."""
        needed = {
            "square_avg": True,
            "grad_avg": self.options["centered"],
            "momentum_buffer": self.options["momentum"] > 0,
        }
        return [slot for slot, is_needed in needed.items() if is_needed]

    def transform(self, learning_rate: Any) -> optax.GradientTransformationExtraArgs:
        """The optimizer."""
        return getattr(dialects, self.dialect)(learning_rate, **self.options)


class Source(NamedTuple):
    """What of a run is carried, in NumPy."""

    arrays: Mapping[str, np.ndarray]  # parameters and buffers, tied ones once
    shapes: dict[str, tuple[int, ...]]  # of the arrays
    tied: dict[str, str]  # further names of tied parameters, to those in arrays
    groups: dict[str, Group]  # by label
    labels: dict[str, str]  # of each array, its group or FROZEN
    members: dict[str, str]  # of each parameter, its group, trained or not
    slots: dict[str, Mapping[str, np.ndarray]]  # of each parameter, by torch's names
    overlaps: Sequence[tuple[str, str]] = ()  # arrays that share a part of their memory

    def check(self) -> None:
        """Refuse slots that are not as their options want them; report NaN in them.

        Raises:
          ValueError: a slot is missing, or of another shape or kind than its
            parameter.
        """
        broken = []
        for name, slots in self.slots.items():
            group = self.groups[self.labels[name]]
            for slot in group.slots:
                if slot not in slots:
                    raise ValueError(
                        f"the optimizer's state of `{cut(name)}` must have {slot}, "
                        f"which its options need, got {listed(slots) or 'nothing'}; "
                        "give the options that it was trained with"
                    )
                what, array = f"{slot} of `{cut(name)}`", slots[slot]
                if array.shape != self.shapes[name]:
                    raise ValueError(
                        f"{what} must have its parameter's shape {self.shapes[name]}, "
                        f"got {array.shape}; model and optimizer must be of the same "
                        "run"
                    )
                wanted = self.arrays[name].dtype
                if not _fits(array.dtype, wanted):
                    raise ValueError(
                        f"{what} must be floating point as its parameter, {wanted}, "
                        f"got {array.dtype}; model and optimizer must be of the same "
                        "run"
                    )
                if not np.isfinite(array).all():
                    broken.append(what)
        report(broken)


def probe(source: Source, port: Port) -> Correspondence:
    """Where the port puts every element of the source.

    Raises:
      TypeError: the port is no function.
      ValueError: the port changes elements, or keeps two arrays that share some.
    """
    trained = [name for name, label in source.labels.items() if label != FROZEN]

    def with_tied(arrays: dict[str, np.ndarray]) -> Any:
        arrays.update({name: arrays[first] for name, first in source.tied.items()})
        return port(arrays)

    if not callable(port):
        raise TypeError(
            "`port` must be a function from a dict of arrays to a tree of them, got "
            f"{shown(port)}; `dict` keeps every name as it is"
        )
    places = Correspondence(with_tied, source.shapes, trained)
    used = {name for names in places.sources for name in names}
    for pair in source.overlaps:
        if used.issuperset(pair):
            a, b = (f"`{cut(name)}`" for name in pair)
            raise ValueError(
                f"{a} and {b} must be apart in memory, or the same elements of it, but "
                "share some; clone one of them in torch, or let the port leave it out"
            )
    return places


def carry(source: Source, port: Port, learning_rate: Any) -> tuple[Any, Any, Any]:
    """Parameters, optimizer and its state, in JAX."""
    source.check()
    places = probe(source, port)
    # An empty leaf comes from nowhere, and may be in any group.
    labels = jax.tree.map(lambda label: label or "0", places.label(source.labels))
    params = _to_jax(places, source.arrays)
    rates = _learning_rates(learning_rate, source)
    transforms = {
        label: group.transform(rates[label]) for label, group in source.groups.items()
    }
    is_one = set(jax.tree.leaves(labels)) == {"0"}
    if is_one:
        tx = transforms["0"]
    else:
        tx = optax.partition(transforms | {FROZEN: optax.set_to_zero()}, labels)
    if all(group.step for group in source.groups.values()):
        state = jax.eval_shape(tx.init, params)  # all of it is filled
    else:
        state = tx.init(params)
    if is_one:
        return params, tx, _filled(state, places, source, "0")
    inner_states = {
        label: masked._replace(
            inner_state=_filled(masked.inner_state, places, source, label)
        )
        for label, masked in state.inner_states.items()
        if label != FROZEN
    }
    return params, tx, state._replace(inner_states=state.inner_states | inner_states)


class WayBack:
    """Parameters and an optimizer state, as what they are in the source.

    Everything is checked when it is made; then the arrays come one after another, so
    that never all of them are there twice.
    """

    def __init__(self, params: Any, opt_state: Any, source: Source, port: Port):
        """Check that parameters and state belong to the source and the port.

        Raises:
          TypeError, ValueError: they do not.
        """
        self._source, self._params = source, params
        self._places = places = probe(source, port)
        places.check_tree("params", params)
        for names, leaf in zip(places.sources, jax.tree.leaves(params), strict=True):
            array = _values("params", leaf)
            for name in names:
                wanted = source.arrays[name].dtype
                if array.dtype != wanted:
                    raise ValueError(
                        f"`params` must keep the dtype of `{cut(name)}`, {wanted}, got "
                        f"{array.dtype}; convert it back"
                    )
        self.written = places.whole  # the names of the arrays that come back
        self.unstepped: set[str] = set()  # parameters of groups without a step
        # Of each group's slots: name, steps made, tree, and whose it is.
        self._slots: list[tuple[str, int, Any, set[str]]] = []
        broken: list[str] = []
        for label, state in _states(opt_state, source).items():
            step, slots = _slots_in(state, source.groups[label], self._in_numpy)
            for slot, tree in slots.items():
                whole = _without_masks(tree, params)
                trained = self._names_in(label, tree)
                broken += self._unfit(slot, whole, trained)
                if step:
                    self._slots.append((slot, step, whole, trained))
                else:
                    self.unstepped |= trained
        report(broken)

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Parameters and buffers."""
        return self._places.bring_back(self._params)

    def slots(self) -> Iterator[tuple[str, int, str, np.ndarray]]:
        """Of each slot: its parameter, the steps made, its name and its value."""
        for slot, step, whole, trained in self._slots:
            for name, array in self._places.bring_back(whole):
                if name in trained:
                    yield name, step, slot, array

    def _in_numpy(self, tree: Any) -> Any:
        """An average's tree, in dtypes with which NumPy and torch calculate."""
        self._places.check_tree("opt_state", _without_masks(tree, self._params))

        def usual(leaf: Any) -> Any:
            return leaf if _is_masked(leaf) else _usual(_values("opt_state", leaf))

        return jax.tree.map(usual, tree, is_leaf=_is_masked)

    def _names_in(self, label: str, tree: Any) -> set[str]:
        """The parameters that a slot's tree has, which must be in the same group."""
        leaves = jax.tree.leaves(tree, is_leaf=_is_masked)
        names = {
            name
            for leaf, names in zip(leaves, self._places.sources, strict=True)
            if not _is_masked(leaf)
            for name in names
        }
        for name in sorted(names):
            group = self._source.members.get(name)
            if group != label:
                where = "no group" if group is None else f"group {group}"
                raise ValueError(
                    f"`optimizer` must have `{cut(name)}` in group {label}, as the run "
                    f"has, got it in {where}; make its groups like those of the run"
                )
        return names

    def _unfit(self, slot: str, whole: Any, names: set[str]) -> Iterator[str]:
        """Refuse a slot of another kind of number; name what is not finite."""
        for path, of_leaf, leaf in zip(
            self._places.paths,
            self._places.sources,
            jax.tree.leaves(whole),
            strict=True,
        ):
            for name in names.intersection(of_leaf):
                wanted = self._source.arrays[name].dtype
                if not _fits(leaf.dtype, wanted):
                    raise ValueError(
                        f"{cut(path)} of {slot} in `opt_state` must be floating point "
                        f"as `{cut(name)}`, {wanted}, got {leaf.dtype}; give the state "
                        "that goes with it"
                    )
                limit = min(float(jnp.finfo(d).max) for d in (leaf.dtype, wanted))
                if not (np.abs(leaf) <= limit).all():
                    yield f"{slot} of `{cut(name)}`"


def _states(opt_state: Any, source: Source) -> dict[str, Any]:
    """The state of each group's transform."""
    if not isinstance(opt_state, optax.transforms.PartitionState):
        return {"0": opt_state}
    inner = opt_state.inner_states
    labels = inner.keys() - {FROZEN} if isinstance(inner, Mapping) else set()
    if labels != source.groups.keys():
        raise ValueError(
            f"`opt_state` must have the optimizer's groups {listed(source.groups)}, "
            f"got {listed(sorted(map(str, labels))) or 'none'}; make its groups like "
            "those of the run"
        )
    return {
        label: getattr(inner[label], "inner_state", inner[label])
        for label in source.groups
    }


def _values(name: str, leaf: Any) -> np.ndarray:
    """A leaf in NumPy. JAX raises, if it has been deleted."""
    try:
        return np.asarray(leaf)
    except TypeError as error:  # of a PRNG key
        raise TypeError(
            f"`{name}` must have arrays of numbers, got {shown(leaf)}; give what the "
            "updates made of the run"
        ) from error


def _usual(array: np.ndarray) -> np.ndarray:
    """An array in 32 or 64 bits, if it is floating point or complex."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return array
    dtype: Any = np.float32 if array.itemsize <= 4 else np.float64
    if np.iscomplexobj(array):
        dtype = np.complex64 if array.itemsize <= 8 else np.complex128
    with np.errstate(over="ignore"):  # a longdouble may be infinite in float64
        return array.astype(dtype, copy=False)


def _fits(dtype: np.dtype, wanted: np.dtype) -> bool:
    """Whether a slot may have this dtype beside a parameter's: complex if it is."""
    kinds = [jnp.issubdtype(d, jnp.complexfloating) for d in (dtype, wanted)]
    return jnp.issubdtype(dtype, jnp.inexact) and kinds[0] == kinds[1]


def _to_jax(places: Correspondence, arrays: Mapping[str, np.ndarray]) -> Any:
    """The port's tree in JAX arrays of the source's dtypes."""
    carried = []
    for number, path in enumerate(places.paths):
        array = jnp.array(places.gather(number, arrays.__getitem__))
        for name in places.sources[number]:
            if array.dtype != arrays[name].dtype:
                raise ValueError(
                    f"{cut(path)} must keep the dtype of `{cut(name)}`, "
                    f"{arrays[name].dtype}, got {array.dtype}; 64 bits need "
                    "jax.config.update('jax_enable_x64', True); leave out a buffer"
                )
        carried.append(array)
    return places.unflatten(carried)


def _learning_rates(learning_rate: Any, source: Source) -> dict[str, Any]:
    if learning_rate is None:
        return {label: group.lr for label, group in source.groups.items()}
    if not isinstance(learning_rate, list | tuple):
        return dict.fromkeys(source.groups, learning_rate)
    if len(learning_rate) != len(source.groups):
        raise ValueError(
            f"`learning_rate` must have one for each of {len(source.groups)} groups, "
            f"got {len(learning_rate)}; give as many, or one for all"
        )
    return dict(zip(source.groups, learning_rate, strict=True))


def _filled(state: Any, places: Correspondence, source: Source, label: str) -> Any:
    """The state of one group's transform, with the source's numbers."""
    if not source.groups[label].step:
        return state

    def slot(field: str, like: Any) -> Any:
        def array_of(name: str) -> np.ndarray:
            return _moment(field, source.slots[name])

        leaves = jax.tree.leaves(like, is_leaf=_is_masked)
        for number, old in enumerate(leaves):
            if not _is_masked(old):
                leaves[number] = jnp.array(places.gather(number, array_of), old.dtype)
        return places.unflatten(leaves)

    parts = []
    for part in state:
        carried = {
            field: slot(field, getattr(part, field))
            for field in part._fields
            if field in MOMENTS
        }
        if "count" in part._fields:
            step = source.groups[label].step
            carried["count"] = jnp.asarray(step, part.count.dtype)
        parts.append(part._replace(**carried))
    return tuple(parts)


def _moment(field: str, slots: Mapping[str, np.ndarray]) -> np.ndarray:
    """One of our averages from torch's."""
    if field != "var":
        return slots[MOMENTS[field]]
    square = slots["square_avg"]
    mean = slots["grad_avg"].astype(np.result_type(square, np.float32))
    # torch's difference can round below 0, where it gives NaN.
    if np.iscomplexobj(square):
        real = np.maximum(square.real - mean.real**2, 0)
        return real + 1j * np.maximum(square.imag - mean.imag**2, 0)
    return np.maximum(square - mean * mean, 0)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _slots_in(
    state: Any, group: Group, in_numpy: Callable[[Any], Any]
) -> tuple[int, dict[str, Any]]:
    """The steps made and torch's slots, as trees, from one group's state."""
    centered = group.options["centered"]
    has_momentum = "momentum_buffer" in group.slots
    wanted = {ScaleByStddevState if centered else ScaleByRmsState}
    if has_momentum:
        wanted.add(optax.TraceState)
    if not isinstance(state, tuple):
        raise ValueError(
            "`opt_state` must be the state of the run's optimizer, got "
            f"{type(state).__name__}; give what its update returned"
        )
    kinds = [type(part) for part in state]
    known = {ScaleByRmsState, ScaleByStddevState, optax.TraceState}
    averages = sorted(kind.__name__ for kind in kinds if kind in known)
    if averages != sorted(kind.__name__ for kind in wanted):
        raise ValueError(
            "`opt_state` must have the averages of torch's options, "
            f"{listed(sorted(kind.__name__ for kind in wanted))}, got "
            f"{listed(averages) or 'none'}; give the state that goes with this "
            "optimizer"
        )
    parts = dict(zip(kinds, state, strict=True))
    trees = {}
    if centered:
        part = parts[ScaleByStddevState]
        trees["grad_avg"] = mu = in_numpy(part.mu)
        trees["square_avg"] = jax.tree.map(
            lambda var, mu: var if _is_masked(var) else _square(var, mu),
            in_numpy(part.var),
            mu,
            is_leaf=_is_masked,
        )
    else:
        part = parts[ScaleByRmsState]
        trees["square_avg"] = in_numpy(part.nu)
    if has_momentum:
        # The learning rate, where it is inside the buffer, stands before it.
        inside = kinds.index(optax.TraceState) > kinds.index(type(part)) + 1
        wants_inside = group.options.get("lr_in_momentum", False)
        if inside != wants_inside:
            where = {True: "inside", False: "outside"}
            raise ValueError(
                "`opt_state` must have the learning rate where the optimizer has it, "
                f"{where[wants_inside]} the momentum buffer, got it {where[inside]}; "
                "learning rates of the past cannot be taken out of a buffer, nor put "
                "into it: carry it back to the optimizer it came from"
            )
        trees["momentum_buffer"] = in_numpy(parts[optax.TraceState].trace)
    return _count(part.count), trees


def _square(var: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """torch's square_avg, the reverse of `_moment`."""
    if np.iscomplexobj(mean):
        return var + mean.real**2 + 1j * mean.imag**2
    return var + mean * mean


def _count(value: Any) -> int:
    """The steps made, from a state."""
    count = _values("opt_state", value)
    if count.shape or count.dtype.kind not in "iu" or not 0 <= count < 2**31:
        raise ValueError(
            "`count` of `opt_state` must be an integer in [0, 2³¹), got "
            f"{shown(value)}; give the state as the updates made it"
        )
    return int(count)


def _without_masks(tree: Any, params: Any) -> Any:
    """A slot's tree with 0 for what another group has."""
    structure: Any = jax.tree.structure(params)
    if structure != jax.tree.structure(tree, is_leaf=_is_masked):
        return tree
    return jax.tree.map(
        lambda leaf, p: (
            np.broadcast_to(np.float32(0), np.shape(p)) if _is_masked(leaf) else leaf
        ),
        tree,
        params,
        is_leaf=_is_masked,
    )


def report(broken: list[str]) -> None:
    """Warn of slots that are not finite, at the line outside of this package."""
    if not broken:
        return
    package, level, frame = __name__.partition(".")[0], 1, sys._getframe()
    # Within exec, a frame may have no name.
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"carried as it is, with NaN or infinity: {listed(broken, 8)}; those "
        "parameters will not train any more",
        RuntimeWarning,
        stacklevel=level,
    )
