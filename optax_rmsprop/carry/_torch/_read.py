"""Read a run of torch into a `Source`, from live objects or from a checkpoint."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from optax_rmsprop._errors import bare, kind_of, shown, some
from optax_rmsprop.carry._run import LazyArray, Source, Weight, lazy
from optax_rmsprop.carry._slots import SLOTS
from optax_rmsprop.carry._torch._format import (
    check_groups,
    check_names,
    check_tensor,
    name_in,
    names_in,
    one_parameter,
    tensors_in,
    updates_made,
)
from optax_rmsprop.carry._torch._memory import address, has_shape, overlaps, problem
from optax_rmsprop.carry._torch._options import check_dialect, class_dialect, group_of

if TYPE_CHECKING:
    import torch

# The dtypes that `Tensor.numpy` converts, and bfloat16.
IN_NUMPY = {
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
}


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters under all their names, and the buffers in the model's state_dict."""
    kept = model.state_dict().keys()
    buffers = model.named_buffers(remove_duplicate=False)
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **{name: buffer for name, buffer in buffers if name in kept},
    }


def read(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    trainable: Collection[str] | None = None,
    dialect: str | None = None,
) -> Source:
    """Read a live model and optimizer."""
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {kind_of(model)}; "
            "from_torch_checkpoint takes state_dicts"
        )
    dialect = class_dialect(optimizer, dialect)
    names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
    name_of = functools.partial(name_in, names)
    groups, states = optimizer.param_groups, optimizer.state
    check_groups(groups, states)
    fixed = {name for p, name in names.items() if not p.requires_grad}
    frozen = fixed
    if trainable is not None:
        frozen = _frozen(groups, states, name_of, trainable)
    # timm up to 1.0.30 reads this, and later versions copy it into each group.
    made_with = {"max_lr_snapshot": getattr(optimizer, "defaults", {}).get("lr")}
    options = [made_with | group for group in groups]
    tensors = tensors_of(model)
    source = _source(tensors, options, states, name_of, dialect, frozen, trainable)
    elsewhere = {
        name
        for name in names.values()
        if name not in fixed and (w := source.weights.get(name)) and w.group is None
    }
    return source._replace(elsewhere=elsewhere)


def read_checkpoint(
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    names: Sequence[str] | None,
    trainable: Collection[str] | None = None,
    dialect: str | None = None,
) -> Source:
    """Read the state_dicts of a model and an optimizer."""
    check_dialect(dialect)
    for argument, value in (("model", model), ("optimizer", optimizer)):
        if not isinstance(value, Mapping):
            is_list = isinstance(value, list | tuple)
            remedy = (
                "give one of its items" if is_list else "from_torch takes live objects"
            )
            raise TypeError(
                f"`{argument}` must be a state_dict, got {kind_of(value)}; {remedy}"
            )
    tensors = tensors_in(model)
    if not {"state", "param_groups"} <= optimizer.keys():
        raise ValueError(
            "`optimizer` must be the state_dict of an optimizer, with state and "
            f"param_groups, got one with {some(optimizer) or 'nothing'}; give what "
            "its state_dict() returns"
        )
    groups, states = optimizer["param_groups"], optimizer["state"]
    check_groups(groups, states)
    own = names_in(groups)
    if names is None:
        names = own
    elif not isinstance(names, list | tuple):
        raise TypeError(
            f"`names` must be a list, got {kind_of(names)}; give the parameters' "
            "names in the optimizer's order"
        )
    elif own and list(names) != own:
        raise ValueError(
            f"`names` must be the checkpoint's own, {some(own)}, got "
            f"{some(names)}; leave them out"
        )
    keys = [key for group in groups for key in group["params"]]
    check_names(names, len(keys), tensors)
    name_of = dict(zip(keys, names, strict=True)).__getitem__
    frozen = _frozen(groups, states, name_of, trainable)
    source = _source(tensors, groups, states, name_of, dialect, frozen, trainable)
    return source._replace(may_have_copies=True)


def _frozen(
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Any, Mapping[str, Any]],
    name_of: Callable[[Any], str],
    trainable: Collection[str] | None,
) -> set[str]:
    """The optimizer's parameters that do not train, which a checkpoint does not say."""
    members = [list(map(name_of, group["params"])) for group in groups]
    if trainable is None:
        steps = [any(states.get(key) for key in group["params"]) for group in groups]
        for label, stepped in enumerate(steps):
            if members[label] and not stepped and any(steps):
                raise ValueError(
                    f"`trainable` must be given, because group {label} of `optimizer`, "
                    f"which has {some(map(bare, members[label]))}, has no state and "
                    "another group has one, got None; give the names of all "
                    "parameters that train: those of this group do not if they were "
                    "frozen, and do if it was added after the last step"
                )
        return set()
    if isinstance(trainable, str) or not isinstance(trainable, Collection):
        raise TypeError(
            f"`trainable` must be a list of names, got {shown(trainable)}; give those "
            "of the parameters that train"
        )
    known = {name for group in members for name in group}
    if unknown := [name for name in trainable if name not in list(known)]:
        raise ValueError(
            "`trainable` must be names of the optimizer's parameters, got "
            f"{some(map(str, unknown))}; it has {some(map(bare, known))}"
        )
    return known.difference(trainable)


def _source(
    tensors: Mapping[str, torch.Tensor],
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Any, Mapping[str, Any]],
    name_of: Callable[[Any], str],
    dialect: str | None,
    frozen: Collection[str],
    trainable: Collection[str] | None,
) -> Source:
    """Put together what was read from a live run or from a checkpoint.

    Without a dialect, the options of a group show it. Parameters that are neither
    frozen nor trainable train if they have a state, or if none of their group has.
    """
    weights = {
        name: Weight(_shape(tensor), lazy(_to_numpy, bare(name), tensor))
        for name, tensor in tensors.items()
    }
    read_groups = {}
    owned: set[Any] = set()
    still = list[str]()
    for number, group in enumerate(groups):
        label = str(number)
        group_states = {}
        for parameter in group["params"]:
            name = name_of(parameter)
            if (other := weights[name].group) is not None:
                raise ValueError(
                    f"`optimizer` must have `{bare(name)}` once, got it in group "
                    f"{other} and again in group {label}; take it out of one"
                )
            weights[name] = weights[name]._replace(group=label)
            group_states[name] = states.get(parameter)
            owned.add(parameter)
        steps = [_step(name, state) for name, state in group_states.items() if state]
        read_groups[label] = group_of(label, group, dialect, max(steps, default=0))
        for name, state in group_states.items():
            if name in frozen:
                continue
            waits = not state and bool(steps) and name not in (trainable or ())
            # torch makes a state at the first gradient, and skips a parameter without
            # one. With gradients of 0, as JAX has, only a weight decay would move it.
            if waits and group["weight_decay"]:
                still.append(name)
                continue
            slots = _slots(name, state) if state else None
            weights[name] = weights[name]._replace(
                trained=True, slots=slots, waits=waits
            )
    if foreign := states.keys() - owned:
        raise ValueError(
            "`optimizer` must have a state for its own parameters only, got one for "
            f"{some(map(one_parameter, foreign))}, which no group has"
        )
    tied = _tied(tensors, weights)
    for name in tied:
        del weights[name]
    shared = overlaps({name: tensors[name] for name in weights})
    return Source(weights, read_groups, tied, shared, still=still)


def _slots(name: str, state: Mapping[str, Any]) -> dict[str, LazyArray]:
    return {
        slot: lazy(_to_numpy, f"{slot} of {bare(name)}", state[slot])
        for slot in SLOTS
        if slot in state
    }


def _tied(
    tensors: Mapping[str, torch.Tensor], weights: Mapping[str, Weight]
) -> dict[str, str]:
    """Further names of tensors in the same memory, each with the name that is kept.

    The tensor's kept name is the one that is trained, because it has the slots, or else
    the first.
    """
    alike = collections.defaultdict(list)
    for name, tensor in tensors.items():
        alike[address(tensor)].append(name)
    tied: dict[str, str] = {}
    for names in alike.values():
        trained = [n for n in names if weights[n].trained and not weights[n].waits]
        if len(trained) > 1:
            raise ValueError(
                "`optimizer` must train a parameter once, but "
                f"{some(f'`{bare(name)}`' for name in trained)} are the same memory, "
                "which it moves by averages of each; make them one parameter in torch "
                "(a.weight = b.weight) that the optimizer has once"
            )
        kept = (trained or names)[0]
        tied |= {name: kept for name in names if name != kept}
    return tied


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape, or () for a tensor without one, which cannot be carried anyway."""
    return tuple(tensor.shape) if has_shape(tensor) else ()


def _step(name: str, state: Mapping[str, Any]) -> int:
    if "step" not in state:
        raise ValueError(
            f"the optimizer's state of `{bare(name)}` must have its step, got "
            f"{some(state)}; give the state_dict as it was saved"
        )
    return updates_made(f"`step` of `{bare(name)}`", state["step"])


def _to_numpy(name: str, tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values, on the CPU without a copy: torch may still write into them."""
    import torch

    check_tensor(name, tensor)
    if reason := problem(tensor):
        raise TypeError(f"`{name}` must {reason}")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in IN_NUMPY:
        raise TypeError(
            f"`{name}` must be of a dtype that NumPy has too, got {dtype}; convert it "
            "in torch, or let the port leave it out"
        )
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
