"""Parameters and a state in JAX as the source of the run has them: the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey, tree_map_with_path

from optax_rmsprop import _errors
from optax_rmsprop._errors import at, bare, kind_of, shown, some
from optax_rmsprop.carry._port import Port, flattened
from optax_rmsprop.carry._run import FROZEN, Group, Source, is_masked, probe, report
from optax_rmsprop.optimizer import ScaledTraceState
from optax_rmsprop.transforms import ScaleByRmsState, ScaleByStddevState

AS_UPDATED = "give what the updates made of the run"
MOST_STEPS = 2**31 - 1  # what from_torch takes, whose count is an int32


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
                        f"`params` must keep the dtype of `{bare(name)}`, {wanted}, "
                        f"got {array.dtype}; convert it back"
                    )
        self.written = places.whole  # the names of the arrays that come back
        self.unstepped: set[str] = set()  # parameters of groups without a step
        # Of each group's slots: name, steps made, tree, and whose it is.
        self._slots: list[tuple[str, int, Any, set[str]]] = []
        broken: list[str] = []
        for label, (start, state) in _states(opt_state, source).items():
            group = source.groups[label]
            step, slots = _slots_in(start, state, group, self._in_numpy)
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

    def _in_numpy(self, tree: Any, start: Any) -> Any:
        """An average's tree, in dtypes with which NumPy and torch calculate.

        `start` is its path in the state.
        """
        flattened("opt_state", tree)
        self._places.check_tree("opt_state", _without_masks(tree, self._params))

        def usual(path: Any, leaf: Any) -> Any:
            if is_masked(leaf):
                return leaf
            array, remedy = _usual(_values("opt_state", leaf)), AS_UPDATED
            path = start + path
            _errors.inexact("opt_state", array, path, remedy=remedy, real=False)
            return array

        return tree_map_with_path(usual, tree, is_leaf=is_masked)

    def _names_in(self, label: str, tree: Any) -> set[str]:
        """The parameters that a slot's tree has, which must be in the same group."""
        leaves = jax.tree.leaves(tree, is_leaf=is_masked)
        names = {
            name
            for leaf, names in zip(leaves, self._places.sources, strict=True)
            if not is_masked(leaf)
            for name in names
        }
        for name in sorted(names):
            group = self._source.members.get(name)
            if group != label:
                where = "no group" if group is None else f"group {group}"
                raise ValueError(
                    f"`optimizer` must have `{bare(name)}` in group {label}, as the "
                    f"run has, got it in {where}; make its groups like those of the run"
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
                if not _errors.averages(leaf.dtype, wanted):
                    raise ValueError(
                        f"{at(path)} of {slot} in `opt_state` must be floating point "
                        f"as `{bare(name)}`, {wanted}, got {leaf.dtype}; give the "
                        "state that goes with it"
                    )
                limit = min(float(jnp.finfo(d).max) for d in (leaf.dtype, wanted))
                if not (np.abs(leaf) <= limit).all():
                    yield f"{slot} of `{bare(name)}`"


def _states(opt_state: Any, source: Source) -> dict[str, tuple[Any, Any]]:
    """The path and the state of each group's transform."""
    if not isinstance(opt_state, optax.transforms.PartitionState):
        return {"0": ((), opt_state)}
    inner = opt_state.inner_states
    labels = inner.keys() - {FROZEN} if isinstance(inner, Mapping) else set()
    if labels != source.groups.keys():
        raise ValueError(
            f"`opt_state` must have the optimizer's groups {some(source.groups)}, "
            f"got {some(sorted(map(str, labels))) or 'none'}; make its groups like "
            "those of the run"
        )
    states: dict[str, tuple[Any, Any]] = {}
    for label in source.groups:
        path, state = (GetAttrKey("inner_states"), DictKey(label)), inner[label]
        states[label] = path, state
        if hasattr(state, "inner_state"):
            states[label] = (*path, GetAttrKey("inner_state")), state.inner_state
    return states


def _values(name: str, leaf: Any) -> np.ndarray:
    """A leaf in NumPy. JAX raises, if it has been deleted."""
    try:
        return np.asarray(leaf)
    except TypeError as error:  # of a PRNG key
        raise TypeError(
            f"`{name}` must have arrays of numbers, got {shown(leaf)}; {AS_UPDATED}"
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


def _slots_in(
    start: Any, state: Any, group: Group, in_numpy: Callable[[Any, Any], Any]
) -> tuple[int, dict[str, Any]]:
    """The steps made and torch's slots, as trees, from one group's state.

    `start` is the path of that state.
    """
    centered = group.options["centered"]
    has_momentum = "momentum_buffer" in group.slots
    wanted = {ScaleByStddevState if centered else ScaleByRmsState}
    if has_momentum:
        wanted.add(optax.TraceState)
    if not isinstance(state, tuple):
        raise ValueError(
            "`opt_state` must be the state of the run's optimizer, got "
            f"{kind_of(state)}; give what its update returned"
        )
    kinds: list[Any] = [
        optax.TraceState if isinstance(part, optax.TraceState) else type(part)
        for part in state
    ]
    known = {ScaleByRmsState, ScaleByStddevState, optax.TraceState}
    averages = sorted(kind.__name__ for kind in kinds if kind in known)
    if averages != sorted(kind.__name__ for kind in wanted):
        raise ValueError(
            "`opt_state` must have the averages of torch's options, "
            f"{some(sorted(kind.__name__ for kind in wanted))}, got "
            f"{some(averages) or 'none'}; give the state that goes with this "
            "optimizer"
        )
    parts = dict(zip(kinds, state, strict=True))
    part = parts[ScaleByStddevState if centered else ScaleByRmsState]
    path = *start, SequenceKey(kinds.index(type(part)))
    of_count = at((*path, GetAttrKey("count")))
    known = jax.block_until_ready(part.count)
    _errors.count("opt_state", known, of_count, MOST_STEPS)
    step = int(_values("opt_state", part.count))

    def squares(field: str) -> Any:
        """Averages of squares."""
        of_field = *path, GetAttrKey(field)
        tree = in_numpy(getattr(part, field), of_field)
        _errors.not_negative("opt_state", tree, of_field)
        return tree

    trees = {}
    if centered:
        trees["grad_avg"] = mu = in_numpy(part.mu, (*path, GetAttrKey("mu")))
        trees["square_avg"] = jax.tree.map(
            lambda var, mu: var if is_masked(var) else _square(var, mu),
            squares("var"),
            mu,
            is_leaf=is_masked,
        )
    else:
        trees["square_avg"] = squares("nu")
    if has_momentum:
        inside = isinstance(parts[optax.TraceState], ScaledTraceState)
        wants_inside = group.options.get("lr_in_momentum", False)
        if inside != wants_inside:
            where = {True: "inside", False: "outside"}
            raise ValueError(
                "`opt_state` must have the learning rate where the optimizer has it, "
                f"{where[wants_inside]} the momentum buffer, got it {where[inside]}; "
                "learning rates of the past cannot be taken out of a buffer, nor put "
                "into it: carry it back to the optimizer it came from"
            )
        of_trace = SequenceKey(kinds.index(optax.TraceState)), GetAttrKey("trace")
        trace = parts[optax.TraceState].trace
        trees["momentum_buffer"] = in_numpy(trace, (*start, *of_trace))
    return step, trees


def _square(var: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """torch's square_avg from variance and mean, each part of a number by itself."""
    square = np.empty(var.shape, np.result_type(var, mean))
    with np.errstate(over="ignore"):
        square.real = var.real + mean.real**2
        if np.iscomplexobj(square):
            square.imag = var.imag + mean.imag**2
    return square


def _without_masks(tree: Any, params: Any) -> Any:
    """A slot's tree with 0 for what another group has."""
    structure: Any = jax.tree.structure(params)
    if structure != jax.tree.structure(tree, is_leaf=is_masked):
        return tree
    return jax.tree.map(
        lambda leaf, p: (
            np.broadcast_to(np.float32(0), np.shape(p)) if is_masked(leaf) else leaf
        ),
        tree,
        params,
        is_leaf=is_masked,
    )
