"""A run of another framework, in the same form for all of them, and its start in JAX.

A source (`_torch`, `_keras.py`) fills one table: a `Weight` for each parameter
and buffer. `carry` probes the user's port with the shapes in that table (`_port.py`),
and then moves the arrays and each of their slots as the port does.

For example, take a model of one parameter after three updates, and a port that
transposes it into "kernel". The table is

    {"weight": Weight(shape=(1, 2), array=[[5, 6]], group="0", trained=True, slots={
        "grad_avg": [[1, 2]], "square_avg": [[3, 4]], "momentum_buffer": [[7, 8]]})}

and `carry` makes of it the parameters and the state

    {"kernel": [[5], [6]]}
    (ScaleByStddevState(count=3, mu={"kernel": [[1], [2]]}, var={"kernel": [[2], [0]]}),
     TraceState(trace={"kernel": [[7], [8]]}), ...)

because var = square_avg - grad_avg². `_back.py` does the reverse.
"""

from __future__ import annotations

import collections
import functools
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop import _errors
from optax_rmsprop._errors import at, bare, kind_of, shown, some
from optax_rmsprop.carry._groups import Adapted, Group, learning_rates
from optax_rmsprop.carry._port import Port, ProbedPort, other_tree
from optax_rmsprop.carry._slots import (
    FIELDS,
    field_value,
)

InjectedState = optax.InjectStatefulHyperparamsState
FROZEN = "frozen"  # the label of parameters that no group trains, and of buffers
LazyArray = Callable[[], np.ndarray]  # see `lazy`


class Run(NamedTuple):
    """A run that goes on in JAX.

    Attributes:
      params: the tree that the port returns.
      tx: the optimizer: one of the `dialects` torch, timm, stable_baselines3 and keras,
        with the options of the run's group, or an `optax.partition` of several.
      opt_state: its state, with the run's averages, momentum and number of steps.
    """

    params: Any
    tx: optax.GradientTransformationExtraArgs
    opt_state: Any


def lazy(convert: Callable[..., np.ndarray], *arguments: Any) -> LazyArray:
    """A function that converts an array to NumPy at its first call, and keeps it.

    Nothing calls it for arrays that the port leaves out. So these may be of a kind that
    NumPy does not have, such as sparse or float8.
    """
    return functools.cache(functools.partial(convert, *arguments))


class Weight(NamedTuple):
    """A parameter or a buffer of the source.

    Attributes:
      shape: known without converting the array.
      array: its values, see `lazy`.
      group: the label of the group that has it, trained or not; None for a buffer.
      trained: False if it is frozen, or decays and has had no gradient although others
        of its group have.
      slots: by torch's names; None if the optimizer has no state of it.
      waits: whether it has had no gradient although others of its group have. The port
        may leave it out.
    """

    shape: tuple[int, ...]
    array: LazyArray
    group: str | None = None
    trained: bool = False
    slots: Mapping[str, LazyArray] | None = None
    waits: bool = False

    @property
    def label(self) -> str:
        """The label of the group that trains it, or FROZEN."""
        return self.group if self.group and self.trained else FROZEN


class Source(NamedTuple):
    """A run of another framework, as it was read.

    Attributes:
      weights: by name, in the order in which the port gets them. Tied ones are in it
        once.
      groups: by label.
      tied: the further names of tied weights, each with the name in `weights`.
      overlaps: pairs of weights that share a part of their memory.
      elsewhere: parameters that train, but not by this optimizer.
      still: parameters that do not train only because they have had no gradient.
      may_have_copies: whether tied weights may be in `weights` twice, because the
        source does not keep which share memory.
    """

    weights: dict[str, Weight]
    groups: dict[str, Group]
    tied: Mapping[str, str] = {}
    overlaps: Sequence[tuple[str, str]] = ()
    elsewhere: Collection[str] = ()
    still: Collection[str] = ()
    may_have_copies: bool = False

    def check(self) -> None:
        """Refuse slots that do not fit the options; warn of NaN in them.

        Raises:
          ValueError: a slot is missing, or its shape or kind is not that of its
            parameter.
        """
        broken = []
        for name, weight in self.weights.items():
            if weight.slots is None:
                continue
            for slot in self.groups[weight.label].slots:
                if slot not in weight.slots:
                    raise ValueError(
                        f"the optimizer's state of `{bare(name)}` must have {slot}, "
                        "which its options need, got "
                        f"{some(weight.slots) or 'nothing'}; give the options that it "
                        "was trained with"
                    )
                what, array = f"{slot} of `{bare(name)}`", weight.slots[slot]()
                if array.shape != weight.shape:
                    raise ValueError(
                        f"{what} must have its parameter's shape "
                        f"{shown(weight.shape)}, got {shown(array.shape)}; model and "
                        "optimizer must be of the same run"
                    )
                wanted = weight.array().dtype
                if not _errors.averages(array.dtype, wanted):
                    raise ValueError(
                        f"{what} must be floating point as its parameter, {wanted}, "
                        f"got {array.dtype}; model and optimizer must be of the same "
                        "run"
                    )
                if not np.isfinite(array).all():
                    broken.append(what)
        warn_of_nan(broken)


def probe(source: Source, port: Port | None) -> ProbedPort:
    """Find out where the port moves each element of the source.

    Raises:
      TypeError: the port is not a function.
      ValueError: the port changes elements, or keeps two arrays that share some.
    """

    if not callable(port):
        raise TypeError(
            "`port` must be a function from a dict of arrays to a tree of them, got "
            f"{shown(port)}; `dict` keeps every name as it is"
        )

    def with_tied(arrays: dict[str, np.ndarray]) -> Any:
        arrays.update({name: arrays[first] for name, first in source.tied.items()})
        return port(arrays)

    probed = ProbedPort(
        with_tied,
        shapes={name: weight.shape for name, weight in source.weights.items()},
        needed={
            name
            for name, weight in source.weights.items()
            if weight.trained and not weight.waits
        },
    )
    used = {name for names in probed.sources for name in names}
    for pair in source.overlaps:
        if used.issuperset(pair):
            a, b = (f"`{bare(name)}`" for name in pair)
            raise ValueError(
                f"{a} and {b} must be apart in memory, or the same elements of it, but "
                "share some; clone one of them in torch, or let the port leave it out"
            )
    for name, twin in _copies(source, used) if source.may_have_copies else ():
        raise ValueError(
            f"`{bare(name)}`, which the optimizer does not have, must not be a copy of "
            f"`{bare(twin)}`, which it trains, got equal values; let the port leave it "
            "out. If they were tied in torch, use the other one twice in JAX; if not, "
            "copy it in JAX"
        )
    return probed


def _copies(source: Source, used: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each weight without a group that equals a trained one, and that one.

    Weights of one value, such as 0, are equal by chance.
    """
    trained = collections.defaultdict(list)
    for name in used:
        if source.weights[name].trained:
            trained[source.weights[name].shape].append(name)
    for name in used:
        weight = source.weights[name]
        for twin in trained[weight.shape] if weight.group is None else ():
            a, b = weight.array(), source.weights[twin].array()
            if (
                a.size
                and a.dtype == b.dtype
                and (a == b).all()
                and (a != a.flat[0]).any()
            ):
                yield name, twin


def carry(source: Source, port: Port | None, learning_rate: Any) -> Run:
    """Start a run in JAX with the numbers of another framework's run."""
    source.check()
    probed = probe(source, port)
    if source.still:
        warn(
            "carried as parameters that do not train, because they have had no "
            "gradient and others of their group have: "
            f"{some(map(bare, source.still), most=300)}; if they do, give `trainable`"
        )
    rates = learning_rates(learning_rate, source.groups)
    source = _joined(source, rates)
    labels = probed.label_tree(
        {n: weight.label for n, weight in source.weights.items()}
    )
    # An empty leaf has no source array and no label. Any group may have it.
    labels = jax.tree.map(lambda label: label or "0", labels)
    params = _params(probed, source)
    transforms = {
        label: group.transform(rates[label]) for label, group in source.groups.items()
    }
    is_one = set(jax.tree.leaves(labels)) == {"0"}
    if is_one:
        tx = transforms["0"]
    else:
        # A function, because labels in the form of an Equinox model are callable.
        all_transforms = transforms | {FROZEN: optax.set_to_zero()}
        tx = _for_tree(labels, optax.partition(all_transforms, lambda _: labels))
    state: Any = jax.eval_shape(tx.init, params)  # every array in it is replaced
    if is_one:
        return Run(params, tx, _filled(state, probed, source, "0", rates["0"]))
    filled = {
        label: masked._replace(
            inner_state=_filled(masked.inner_state, probed, source, label, rates[label])
        )
        for label, masked in state.inner_states.items()
        if label != FROZEN
    }
    inner_states = state.inner_states | filled
    return Run(params, tx, state._replace(inner_states=inner_states))


def _for_tree(
    like: Any, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The same, with a short error for a tree that is not like the port's.

    The error of optax.partition has all names of both trees.
    """
    structure = jax.tree.structure(like)

    def check(name: str, tree: Any) -> None:
        if not _errors.fits(structure, tree):  # None fits any leaf
            raise other_tree(name, tree, like)

    def init_fn(params: Any) -> Any:
        try:
            return tx.init(params)  # optax's own tools give it other trees, too
        except ValueError:
            check("params", params)
            raise

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        check("updates", updates)
        if params is not None:
            check("params", params)
        if not isinstance(state, optax.transforms.PartitionState):
            raise ValueError(
                "`state` must be the opt_state of this run, of several groups, got "
                f"{kind_of(state)}; give what the last update returned"
            )
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _params(probed: ProbedPort, source: Source) -> Any:
    """The port's tree, in JAX arrays of the source's dtypes."""
    leaves = []
    for number, path in enumerate(probed.paths):
        leaf = probed.assemble(number, lambda name: source.weights[name].array())
        array = jax.device_put(leaf)
        for name in probed.sources[number]:
            wanted = source.weights[name].array().dtype
            if array.dtype != wanted:
                raise ValueError(
                    f"{at(path)} must keep the dtype of `{bare(name)}`, "
                    f"{wanted}, got {array.dtype}; 64 bits need "
                    "jax.config.update('jax_enable_x64', True); leave out a buffer"
                )
        leaves.append(array)
    return probed.unflatten(leaves)


def _joined(source: Source, rates: Mapping[str, Any]) -> Source:
    """The source, with one group in place of groups that are the same in all they do.

    A run may have a thousand groups of one parameter each, and every group of
    `optax.partition` goes through the whole tree.
    """
    first: dict[Any, str] = {}
    label_of = {}
    for label, group in source.groups.items():
        rate = rates[label]
        if isinstance(rate, Adapted):
            rate = id(rate.schedule), rate.factor, rate.behind
        elif not isinstance(rate, int | float):
            rate = id(rate)
        key = group.dialect, tuple(sorted(group.options.items())), group.step, rate
        label_of[label] = first.setdefault(key, label)
    weights = {
        name: weight._replace(group=label_of[weight.group]) if weight.group else weight
        for name, weight in source.weights.items()
    }
    groups = {label: source.groups[label] for label in first.values()}
    return source._replace(weights=weights, groups=groups)


def _filled(
    state: Any, probed: ProbedPort, source: Source, label: str, rate: Any
) -> Any:
    """The state of one group's transform, with the source's numbers."""
    group = source.groups[label]

    def filled(field: str, like: Any) -> Any:
        def array_of(name: str) -> np.ndarray:
            weight = source.weights[name]
            if weight.slots is None:
                return np.full(weight.shape, group.initial(field), np.float32)
            return field_value(field, weight.slots)

        leaves = jax.tree.leaves(like, is_leaf=is_masked)
        for number, old in enumerate(leaves):
            if not is_masked(old):
                leaf = probed.assemble(number, array_of)
                leaves[number] = jax.device_put(leaf.astype(old.dtype, copy=False))
        return probed.unflatten(leaves)

    def part_of(part: Any) -> Any:
        new = {
            field: filled(field, getattr(part, field))
            for field in part._fields
            if field in FIELDS
        }
        if "count" in part._fields:
            new["count"] = jnp.asarray(group.step, part.count.dtype)
        return part._replace(**new)

    if not isinstance(state, InjectedState):
        return tuple(map(part_of, state))
    momentum = jnp.asarray(
        rate.momentum(group.step), state.hyperparams["momentum"].dtype
    )
    counts = state.count, state.hyperparams_states
    count, states = jax.tree.map(lambda x: jnp.asarray(group.step, x.dtype), counts)
    inner = tuple(map(part_of, state.inner_state))
    return InjectedState(count, {"momentum": momentum}, states, inner)


def is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def warn_of_nan(slots: list[str]) -> None:
    """Warn of slots that are not finite."""
    if slots:
        warn(
            f"carried as it is, with NaN or infinity: {some(slots, most=300)}; those "
            "parameters will not train any more"
        )


def warn(message: str) -> None:
    """Warn at the user's line that called the package."""
    package, level, frame = __name__.partition(".")[0], 1, sys._getframe()
    # A frame has no name where exec runs code in a namespace without one.
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
