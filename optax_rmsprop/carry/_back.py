"""The way back: convert parameters and a state of JAX into the source's arrays.

`_run.py` makes leaves from arrays by the port's indices, and fields of our states from
torch's slots. Here both are reversed. From the parameters and the state of the example
there

    {"kernel": [[5], [6]]}
    (ScaleByStddevState(count=3, mu={"kernel": [[1], [2]]}, var={"kernel": [[2], [0]]}),
     TraceState(trace={"kernel": [[7], [8]]}), ...)

`SourceArrays.arrays` yields ("weight", [[5, 6]]), and `SourceArrays.slots` yields

    ("weight", 3, "grad_avg", [[1, 2]])
    ("weight", 3, "square_avg", [[3, 4]])           var + mu²
    ("weight", 3, "momentum_buffer", [[7, 8]])

If there are several groups, the state of each has the port's whole tree, with an
`optax.MaskedNode` for each leaf that another group trains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey, tree_map_with_path

from optax_rmsprop import _errors
from optax_rmsprop._errors import at, bare, kind_of, shown, some
from optax_rmsprop.carry._groups import Group
from optax_rmsprop.carry._port import Port, flattened
from optax_rmsprop.carry._run import (
    FROZEN,
    InjectedState,
    Source,
    is_masked,
    probe,
    warn_of_nan,
)
from optax_rmsprop.carry._slots import (
    GRAD_AVG,
    MOMENTUM_BUFFER,
    SQUARE_AVG,
    square_average,
)
from optax_rmsprop.optimizer import ScaledTraceState
from optax_rmsprop.transforms import ScaleByRmsState, ScaleByStddevState

AS_UPDATED = "give what the updates made of the run"
MOST_STEPS = 2**31 - 1  # from_torch takes no more, because its count is an int32


class SourceArrays:
    """The arrays that a source gets from parameters and an optimizer state of JAX.

    They are checked at once, and made one after another, so that memory never has all
    of them twice.

    Attributes:
      names: the parameters and buffers that `arrays` yields.
      without_state: the parameters whose state is that before the first update. torch
        has none then.
    """

    def __init__(self, params: Any, opt_state: Any, source: Source, port: Port):
        """Check that parameters and state belong to the source and the port.

        Raises:
          TypeError, ValueError: they do not.
        """
        self._source, self._params = source, params
        self._probed = probe(source, port)
        self._probed.check_tree("params", params)
        leaves = jax.tree.leaves(params)
        for names, leaf in zip(self._probed.sources, leaves, strict=True):
            array = _values("params", leaf)
            for name in names:
                wanted = source.weights[name].array().dtype
                if array.dtype != wanted:
                    raise ValueError(
                        f"`params` must keep the dtype of `{bare(name)}`, {wanted}, "
                        f"got {array.dtype}; convert it back"
                    )
        self.names = self._probed.complete
        self.without_state: set[str] = set()
        # For each slot of each group: its name, the updates made, the slot in the
        # port's tree, and the names of the group's parameters.
        self._slots: list[tuple[str, int, Any, set[str]]] = []
        broken: list[str] = []
        found: set[str] = set()
        states = _group_states(opt_state, source)
        for label, (path, state) in states.items():
            group = source.groups[label]
            step, slots = _slots_of(state, path, group, self._in_numpy)
            is_fresh = not step and all(
                (leaf == group.initial(slot)).all()
                for slot, tree in slots.items()
                for leaf in jax.tree.leaves(tree)
            )
            trees = {slot: _with_zeros(tree, params) for slot, tree in slots.items()}
            trained = set[str]()
            for slot, tree in trees.items():
                trained |= self._names_in(label, slots[slot])
                broken += self._not_finite(slot, tree, trained)
            found |= trained
            without = trained if is_fresh else self._as_at_first(trained, trees, group)
            self.without_state |= without
            self._slots += [
                (slot, step, tree, trained - without) for slot, tree in trees.items()
            ]
        warn_of_nan(broken)
        for name, weight in source.weights.items():
            if weight.trained and name not in found and weight.group not in states:
                raise _other_groups(source, states)
        self._check_elsewhere()

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the values of each parameter and buffer."""
        return self._probed.disassemble(self._params)

    def slots(self) -> Iterator[tuple[str, int, str, np.ndarray]]:
        """Yield each slot: its parameter, the updates made, its name and its values."""
        for slot, step, tree, names in self._slots:
            for name, array in self._probed.disassemble(tree):
                if name in names:
                    yield name, step, slot, array

    def _as_at_first(
        self, names: set[str], trees: Mapping[str, Any], group: Group
    ) -> set[str]:
        """Parameters of which the source has no state, and whose slots are initial."""
        found = {name for name in names if self._source.weights[name].slots is None}
        for slot, tree in trees.items():
            for sources, leaf in zip(
                self._probed.sources, jax.tree.leaves(tree), strict=True
            ):
                if found.intersection(sources) and (leaf != group.initial(slot)).any():
                    found.difference_update(sources)
        return found

    def _check_elsewhere(self) -> None:
        """Refuse to write a parameter that another optimizer trains in the source."""
        named = set(self.names) & set(self._source.elsewhere)
        for name, array in self.arrays() if named else ():
            if name not in named:
                continue
            if not np.array_equal(array, self._source.weights[name].array()):
                raise ValueError(
                    f"`params` must have `{bare(name)}`, which `optimizer` does not "
                    "train, as the model has it now, got other values, which would be "
                    "lost or written over those of another optimizer; let the port "
                    "leave it out, and write it with the optimizer that trains it"
                )

    def _in_numpy(self, tree: Any, path: Any) -> Any:
        """A field of the state, in dtypes with which NumPy and torch calculate.

        `path` is its path in the state.
        """
        flattened("opt_state", tree)
        self._probed.check_tree("opt_state", _with_zeros(tree, self._params))

        def converted(path_in_tree: Any, leaf: Any) -> Any:
            if is_masked(leaf):
                return leaf
            array = _widened(_values("opt_state", leaf))
            _errors.inexact(
                "opt_state", array, path + path_in_tree, remedy=AS_UPDATED, real=False
            )
            return array

        return tree_map_with_path(converted, tree, is_leaf=is_masked)

    def _names_in(self, label: str, tree: Any) -> set[str]:
        """The parameters in a slot's tree, which must be in the source's group too."""
        leaves = jax.tree.leaves(tree, is_leaf=is_masked)
        found = {
            name
            for leaf, names in zip(leaves, self._probed.sources, strict=True)
            if not is_masked(leaf)
            for name in names
        }
        wanted = self._source.groups[label]
        for name in sorted(found):
            group = self._source.weights[name].group
            # `carry` joins groups of equal options, rates and steps.
            own = self._source.groups.get(group) if group else None
            if own is None or (own.dialect, own.options) != (
                wanted.dialect,
                wanted.options,
            ):
                where = "no group" if own is None else f"group {group}"
                if own and group != label:
                    where += ", whose options differ"
                raise ValueError(
                    f"`optimizer` must have `{bare(name)}` in group {label}, as the "
                    f"run has, got it in {where}; make its groups like those of the run"
                )
        return found

    def _not_finite(self, slot: str, tree: Any, names: set[str]) -> Iterator[str]:
        """Yield the slots with NaN or infinity; refuse another kind of number.

        A value that overflows in the parameter's dtype is infinite in torch.
        """
        for path, sources, leaf in zip(
            self._probed.paths,
            self._probed.sources,
            jax.tree.leaves(tree),
            strict=True,
        ):
            for name in names.intersection(sources):
                wanted = self._source.weights[name].array().dtype
                if not _errors.averages(leaf.dtype, wanted):
                    raise ValueError(
                        f"{at(path)} of {slot} in `opt_state` must be floating point "
                        f"as `{bare(name)}`, {wanted}, got {leaf.dtype}; give the "
                        "state that goes with it"
                    )
                limit = min(float(jnp.finfo(d).max) for d in (leaf.dtype, wanted))
                if not (np.abs(leaf) <= limit).all():
                    yield f"{slot} of `{bare(name)}`"


def _group_states(opt_state: Any, source: Source) -> dict[str, tuple[Any, Any]]:
    """For each group's label, the path and the state of its transform."""
    if not isinstance(opt_state, optax.transforms.PartitionState):
        return {"0": _within_injected((), opt_state)}
    inner = opt_state.inner_states
    labels = inner.keys() - {FROZEN} if isinstance(inner, Mapping) else set()
    if not labels or not labels <= source.groups.keys():
        raise _other_groups(source, labels)
    states: dict[str, tuple[Any, Any]] = {}
    for label in sorted(labels):
        path: Any = (GetAttrKey("inner_states"), DictKey(label))
        state = inner[label]
        if hasattr(state, "inner_state"):
            path, state = (*path, GetAttrKey("inner_state")), state.inner_state
        states[label] = _within_injected(path, state)
    return states


def _other_groups(source: Source, labels: Collection[Any]) -> ValueError:
    return ValueError(
        f"`opt_state` must have the optimizer's groups {some(source.groups)}, got "
        f"{some(sorted(map(str, labels))) or 'none'}; make its groups like those of "
        "the run"
    )


def _within_injected(path: Any, state: Any) -> tuple[Any, Any]:
    """The path and the state of the chain, if a schedule of the momentum is around."""
    if isinstance(state, InjectedState):
        return (*path, GetAttrKey("inner_state")), state.inner_state
    return path, state


def _slots_of(
    state: Any, path: Any, group: Group, in_numpy: Callable[[Any, Any], Any]
) -> tuple[int, dict[str, Any]]:
    """The updates made, and the slots by torch's names, from the state of one group.

    `path` is the path of that state.
    """
    average, trace = _parts(state, group)
    part = state[average]
    path_of_part = *path, SequenceKey(average)
    path_of_count = at((*path_of_part, GetAttrKey("count")))
    count = jax.block_until_ready(part.count)
    _errors.count("opt_state", count, path_of_count, MOST_STEPS)
    step = int(_values("opt_state", count))

    def average_of(field: str) -> Any:
        return in_numpy(getattr(part, field), (*path_of_part, GetAttrKey(field)))

    def average_of_squares(field: str) -> Any:
        tree = average_of(field)
        _errors.not_negative("opt_state", tree, (*path_of_part, GetAttrKey(field)))
        return tree

    slots = {}
    if group.options["centered"]:
        slots[GRAD_AVG] = mu = average_of("mu")
        slots[SQUARE_AVG] = jax.tree.map(
            lambda var, mu: var if is_masked(var) else square_average(var, mu),
            average_of_squares("var"),
            mu,
            is_leaf=is_masked,
        )
    else:
        slots[SQUARE_AVG] = average_of_squares("nu")
    if trace is not None:
        _check_learning_rate(state, average, trace, path, group)
        path_of_trace = *path, SequenceKey(trace), GetAttrKey("trace")
        slots[MOMENTUM_BUFFER] = in_numpy(state[trace].trace, path_of_trace)
    return step, slots


def _parts(state: Any, group: Group) -> tuple[int, int | None]:
    """The positions of the averages and the trace (or None) in the state of a chain."""
    centered = group.options["centered"]
    wanted = [ScaleByStddevState if centered else ScaleByRmsState]
    if MOMENTUM_BUFFER in group.slots:
        wanted.append(optax.TraceState)
    if not isinstance(state, tuple):
        raise ValueError(
            "`opt_state` must be the state of the run's optimizer, got "
            f"{kind_of(state)}; give what its update returned"
        )
    known = ScaleByRmsState, ScaleByStddevState, optax.TraceState
    found = [
        (kind, i)
        for i, part in enumerate(state)
        for kind in known
        if isinstance(part, kind)
    ]
    kinds = sorted(kind.__name__ for kind, _ in found)
    if kinds != sorted(kind.__name__ for kind in wanted):
        raise ValueError(
            "`opt_state` must have the averages of torch's options, "
            f"{some(sorted(kind.__name__ for kind in wanted))}, got "
            f"{some(kinds) or 'none'}; give the state that goes with this "
            "optimizer"
        )
    indices = dict(found)
    return indices[wanted[0]], indices.get(optax.TraceState)


def _check_learning_rate(
    state: Any, average: int, trace: int, path: Any, group: Group
) -> None:
    """Refuse a buffer that has the learning rate where the optimizer does not.

    The type ScaledTraceState says that it is inside; `rmsprop(lr_in_momentum=True)` has
    it. A plain TraceState that directly follows the averages has no learning rate
    inside. With another part between them it may have: in a user's own chain, or in a
    state pickled by a version without ScaledTraceState.
    """
    inside = isinstance(state[trace], ScaledTraceState)
    if not inside and trace != average + 1:
        raise ValueError(
            "`opt_state` must tell whether its momentum buffer has the learning rate "
            f"inside, got a TraceState at {at((*path, SequenceKey(trace)))} that does "
            "not directly follow the averages; update with the `tx` of from_torch, or, "
            "if the learning rate is inside, convert that TraceState into an "
            "optax_rmsprop.optimizer.ScaledTraceState"
        )
    wants_inside = group.options.get("lr_in_momentum", False)
    if inside != wants_inside:
        where = {True: "inside", False: "outside"}
        raise ValueError(
            "`opt_state` must have the learning rate where the optimizer has it, "
            f"{where[wants_inside]} the momentum buffer, got it {where[inside]}; "
            "learning rates of the past cannot be taken out of a buffer, nor put "
            "into it: carry it back to the optimizer it came from"
        )


def _values(name: str, leaf: Any) -> np.ndarray:
    """A leaf in NumPy. JAX raises if it has been deleted."""
    try:
        return np.asarray(leaf)
    except TypeError as error:  # from a PRNG key
        raise TypeError(
            f"`{name}` must have arrays of numbers, got {shown(leaf)}; {AS_UPDATED}"
        ) from error


def _widened(array: np.ndarray) -> np.ndarray:
    """An array in 32 or 64 bits (a part), if it is floating point or complex."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return array
    dtype: Any = np.float32 if array.itemsize <= 4 else np.float64
    if np.iscomplexobj(array):
        dtype = np.complex64 if array.itemsize <= 8 else np.complex128
    with np.errstate(over="ignore"):  # a longdouble may be infinite in float64
        return array.astype(dtype, copy=False)


def _with_zeros(tree: Any, params: Any) -> Any:
    """A slot's tree with zeros for the leaves of other groups, which are masked."""
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
