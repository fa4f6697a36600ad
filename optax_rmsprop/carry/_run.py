"""A run of another framework, and how it goes on in JAX: what all sources share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop import _errors, dialects
from optax_rmsprop._errors import at, bare, shown, some
from optax_rmsprop.carry._port import Correspondence, Port

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


class Run(NamedTuple):
    """A run that goes on in JAX.

    Attributes:
      params: the port's tree.
      tx: the optimizer: that of `dialects.torch`, `dialects.timm` or `dialects.keras`
        with the options of the run's group, or an `optax.partition` of several.
      opt_state: its state, with the run's averages, momentum and number of steps.
    """

    params: Any
    tx: optax.GradientTransformationExtraArgs
    opt_state: Any


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
                        f"the optimizer's state of `{bare(name)}` must have {slot}, "
                        f"which its options need, got {some(slots) or 'nothing'}; "
                        "give the options that it was trained with"
                    )
                what, array = f"{slot} of `{bare(name)}`", slots[slot]
                if array.shape != self.shapes[name]:
                    expected, shape = shown(self.shapes[name]), shown(array.shape)
                    raise ValueError(
                        f"{what} must have its parameter's shape {expected}, got "
                        f"{shape}; model and optimizer must be of the same run"
                    )
                wanted = self.arrays[name].dtype
                if not _errors.averages(array.dtype, wanted):
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
            a, b = (f"`{bare(name)}`" for name in pair)
            raise ValueError(
                f"{a} and {b} must be apart in memory, or the same elements of it, but "
                "share some; clone one of them in torch, or let the port leave it out"
            )
    return places


def carry(source: Source, port: Port, learning_rate: Any) -> Run:
    """Make a run of JAX from what was read of one elsewhere."""
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
        return Run(params, tx, _filled(state, places, source, "0"))
    inner_states = {
        label: masked._replace(
            inner_state=_filled(masked.inner_state, places, source, label)
        )
        for label, masked in state.inner_states.items()
        if label != FROZEN
    }
    inner_states = state.inner_states | inner_states
    return Run(params, tx, state._replace(inner_states=inner_states))


def _to_jax(places: Correspondence, arrays: Mapping[str, np.ndarray]) -> Any:
    """The port's tree in JAX arrays of the source's dtypes."""
    carried = []
    for number, path in enumerate(places.paths):
        array = jnp.array(places.gather(number, arrays.__getitem__))
        for name in places.sources[number]:
            if array.dtype != arrays[name].dtype:
                raise ValueError(
                    f"{at(path)} must keep the dtype of `{bare(name)}`, "
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

        leaves = jax.tree.leaves(like, is_leaf=is_masked)
        for number, old in enumerate(leaves):
            if not is_masked(old):
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
    var = np.empty(square.shape, mean.dtype)
    # torch's difference can round below 0, where it gives NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        var.real = np.maximum(square.real - mean.real**2, 0)
        if np.iscomplexobj(square):
            var.imag = np.maximum(square.imag - mean.imag**2, 0)
    return var


def is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def report(broken: list[str]) -> None:
    """Warn of slots that are not finite, at the line outside of this package."""
    if not broken:
        return
    package, level, frame = __name__.partition(".")[0], 1, sys._getframe()
    # Within exec, a frame may have no name.
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"carried as it is, with NaN or infinity: {some(broken, most=300)}; those "
        "parameters will not train any more",
        RuntimeWarning,
        stacklevel=level,
    )
