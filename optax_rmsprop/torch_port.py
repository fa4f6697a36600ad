"""Carry a run between torch and JAX: parameters, optimizer state, parameter groups.

How the weights move is yours to say: a port, a function from torch's arrays by name
(those of the model's state_dict) to a tree for JAX. It may rename, reshape, transpose,
split, concatenate and stack. `_port.py` finds out where it puts each element; so the
same function carries every slot of the optimizer, there and back.
"""

from __future__ import annotations  # so that help() shows these types by name

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop import dialects
from optax_rmsprop._port import Correspondence, Port
from optax_rmsprop._torch_state import FROZEN, OPTIONS, Source, read, write
from optax_rmsprop.transforms import ScaleByRmsState, ScaleByStddevState

if TYPE_CHECKING:
    import torch

# Our averages, and torch's; var is square_avg - grad_avg².
MOMENTS = {"nu": "square_avg", "mu": "grad_avg", "var": "", "trace": "momentum_buffer"}


class TorchRun(NamedTuple):
    """A run of torch that goes on in JAX.

    Attributes:
      params: the port's tree.
      tx: the optimizer: that of `dialects.torch` with the options of torch's group, or
        an `optax.partition` of several.
      opt_state: its state, with torch's averages, momentum and number of steps.
    """

    params: Any
    tx: optax.GradientTransformationExtraArgs
    opt_state: Any


def from_torch(
    model: torch.nn.Module,
    optimizer: torch.optim.RMSprop,
    port: Port,
    learning_rate: Any = None,
) -> TorchRun:
    """Carry a model and its RMSprop from torch to JAX.

    Args:
      model: holds all of the optimizer's parameters. Nothing is changed in it.
      optimizer: a `torch.optim.RMSprop`, before its first step or after any.
      port: function from a dict of NumPy arrays, the model's state_dict, to a tree of
        arrays. It must use every trained parameter, each element once, and may leave
        out the others (frozen parameters, buffers, further names of tied parameters).
        A leaf must stay within one parameter group.
      learning_rate: in place of torch's: a number, an optax schedule of the steps made
        (torch's included), or a list of one for each group.

    Returns:
      A `TorchRun`. Leaves that no group trains, or that have had no gradient while
      others of their group have, stay put.

    Raises:
      TypeError: another optimizer; sparse or quantized tensors.
      ValueError: a port that does more than to move elements, mixes groups or casts; a
        model that does not hold the optimizer's parameters.
    """
    source = read(model, optimizer)
    places = _probe(source, port)
    # An empty leaf comes from nowhere, and may be in any group.
    labels = jax.tree.map(lambda label: label or "0", places.label(source.labels))
    params = _to_jax(places, source.arrays)
    rates = _learning_rates(learning_rate, source)
    transforms = {
        label: dialects.torch(rates[label], **{name: group[name] for name in OPTIONS})
        for label, group in source.groups.items()
    }

    def fill(state: Any, label: str) -> Any:
        return _filled(state, places, source, label)

    if set(jax.tree.leaves(labels)) == {"0"}:
        tx = transforms["0"]
        return TorchRun(params, tx, fill(tx.init(params), "0"))
    tx = optax.partition(transforms | {FROZEN: optax.set_to_zero()}, labels)
    state = tx.init(params)
    inner = {
        label: masked._replace(inner_state=fill(masked.inner_state, label))
        for label, masked in state.inner_states.items()
        if label != FROZEN
    }
    inner_states = state.inner_states | inner
    return TorchRun(params, tx, state._replace(inner_states=inner_states))


def to_torch(
    params: Any,
    opt_state: Any,
    model: torch.nn.Module,
    optimizer: torch.optim.RMSprop,
    port: Port,
) -> None:
    """Carry a run back: write parameters and optimizer state into torch's, in place.

    Args:
      params, opt_state: as from `from_torch`, after any number of updates.
      model, optimizer: like those given to `from_torch`, or the same.
      port: the same.

    Raises:
      TypeError, ValueError: as `from_torch`; parameters or a state that do not belong
        to this model, optimizer and port. Nothing is written then.
    """
    source = read(model, optimizer)
    places = _probe(source, port)
    arrays = places.bring_back(params)
    for name, array in arrays.items():
        if array.dtype != source.arrays[name].dtype:
            raise ValueError(
                f"`params` must keep the dtype of `{name}`, "
                f"{source.arrays[name].dtype}, got {array.dtype}"
            )
    slots: dict[str, dict[str, np.ndarray]] = {}
    for label, group in source.groups.items():
        state = opt_state
        if isinstance(opt_state, optax.transforms.PartitionState):
            state = opt_state.inner_states[label].inner_state
        step, trees = _slots_in(state, group)
        for slot, tree in trees.items() if step else ():
            for name, array in _bring_back(places, tree, params).items():
                if source.labels[name] == label:
                    slots.setdefault(name, {"step": np.array(step)})[slot] = array
    write(model, optimizer, arrays, slots)


def _probe(source: Source, port: Port) -> Correspondence:
    shapes = {name: array.shape for name, array in source.arrays.items()}
    trained = [name for name, label in source.labels.items() if label != FROZEN]

    def with_tied(arrays: dict[str, np.ndarray]) -> Any:
        again = {name: arrays[first] for name, first in source.tied.items()}
        return port(arrays | again)

    return Correspondence(with_tied, shapes, trained)


def _to_jax(places: Correspondence, arrays: dict[str, np.ndarray]) -> Any:
    """The port's tree in JAX arrays of torch's dtypes."""
    tree = places.carry(arrays)
    leaves, structure = jax.tree.flatten(tree)
    carried = []
    for path, names, leaf in zip(places.paths, places.sources, leaves, strict=True):
        array = jnp.array(leaf)  # a copy
        for name in names:
            if array.dtype != arrays[name].dtype:
                raise ValueError(
                    f"{path} must keep the dtype of `{name}`, {arrays[name].dtype}, "
                    f"got {array.dtype}; float64 needs "
                    "jax.config.update('jax_enable_x64', True)"
                )
        carried.append(array)
    return jax.tree.unflatten(structure, carried)


def _learning_rates(learning_rate: Any, source: Source) -> dict[str, Any]:
    if learning_rate is None:
        return {label: float(group["lr"]) for label, group in source.groups.items()}
    if not isinstance(learning_rate, list | tuple):
        return dict.fromkeys(source.groups, learning_rate)
    if len(learning_rate) != len(source.groups):
        raise ValueError(
            f"`learning_rate` must have one for each of {len(source.groups)} groups, "
            f"got {len(learning_rate)}"
        )
    return dict(zip(source.groups, learning_rate, strict=True))


def _filled(state: Any, places: Correspondence, source: Source, label: str) -> Any:
    """The state of one group's transform, with torch's numbers."""

    def slot(name: str, like: Any) -> Any:
        arrays = {
            key: _moment(name, source.slots.get(key, {}), array)
            for key, array in source.arrays.items()
        }
        return jax.tree.map(
            lambda old, new: old if _is_masked(old) else jnp.array(new, old.dtype),
            like,
            places.carry(arrays),
            is_leaf=_is_masked,
        )

    parts = []
    for part in state:
        carried = {
            field: slot(field, getattr(part, field))
            for field in part._fields
            if field in MOMENTS
        }
        if "count" in part._fields:
            carried["count"] = jnp.asarray(source.steps[label], part.count.dtype)
        parts.append(part._replace(**carried))
    return tuple(parts)


def _moment(name: str, slots: Mapping[str, np.ndarray], like: np.ndarray) -> np.ndarray:
    """One of our averages from torch's, 0 before the first step."""
    if not slots:
        return np.zeros_like(like)
    if name != "var":
        return slots[MOMENTS[name]]
    mean = slots["grad_avg"].astype(np.result_type(like, np.float32))
    variance = slots["square_avg"] - _square(mean)
    # torch's difference can round below 0, where it gives NaN.
    if np.iscomplexobj(variance):
        return np.maximum(variance.real, 0) + 1j * np.maximum(variance.imag, 0)
    return np.maximum(variance, 0)


def _square(x: Any) -> Any:
    """Of either part by itself."""
    return x.real**2 + 1j * x.imag**2 if np.iscomplexobj(x) else x * x


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _slots_in(state: Any, group: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The steps made and torch's slots, as trees, from one group's state."""
    wanted = {ScaleByStddevState if group["centered"] else ScaleByRmsState}
    if group["momentum"]:
        wanted.add(optax.TraceState)
    parts = {type(part): part for part in state}
    averages = {ScaleByRmsState, ScaleByStddevState, optax.TraceState} & parts.keys()
    if averages != wanted:
        raise ValueError(
            "`opt_state` must have the averages of torch's options, "
            f"{sorted(t.__name__ for t in wanted)}, got "
            f"{sorted(t.__name__ for t in averages)}; give the state that goes with "
            "this optimizer"
        )
    trees = {}
    if group["centered"]:
        part = parts[ScaleByStddevState]
        trees["grad_avg"] = part.mu
        trees["square_avg"] = jax.tree.map(
            lambda var, mu: var if _is_masked(var) else var + _square(mu),
            part.var,
            part.mu,
            is_leaf=_is_masked,
        )
    else:
        part = parts[ScaleByRmsState]
        trees["square_avg"] = part.nu
    if group["momentum"]:
        trees["momentum_buffer"] = parts[optax.TraceState].trace
    return int(part.count), trees


def _bring_back(
    places: Correspondence, tree: Any, params: Any
) -> dict[str, np.ndarray]:
    """Arrays from a slot; what another group has is 0."""
    whole = jax.tree.map(
        lambda leaf, p: np.zeros(p.shape) if _is_masked(leaf) else np.asarray(leaf),
        tree,
        params,
        is_leaf=_is_masked,
    )
    return places.bring_back(whole)
