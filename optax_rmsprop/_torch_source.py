"""A torch run in NumPy: what is read out of a live run or of a checkpoint."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from optax_rmsprop._carry import FROZEN, Group, Source
from optax_rmsprop._texts import cut, listed, shown
from optax_rmsprop._torch_memory import overlaps, place, problem

if TYPE_CHECKING:
    import torch

SLOTS = ("square_avg", "grad_avg", "momentum_buffer")
# The options of a group that change numbers, but for lr, and what torch and timm take
# them for in the checkpoints of versions that did not have them yet.
OF_TORCH: dict[str, bool | float] = {
    "alpha": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "centered": False,
    "maximize": False,
}
OF_TIMM: dict[str, bool | float] = {
    "alpha": 0.9,
    "eps": 1e-10,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "centered": False,
    "decoupled_decay": False,
    "corrected_weight_decay": False,
    "lr_in_momentum": True,
    "caution": False,
}
_AS_TRAINED = "give what the run had in torch"
# What `Tensor.numpy` knows, and bfloat16.
IN_NUMPY = {
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
}


class _Arrays(Mapping[str, np.ndarray]):
    """Tensors in NumPy, each converted when it is asked for.

    What a port leaves out, no one asks for, and it may be of any kind.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], ending: str = ""):
        """`ending` is added to a name in errors about it."""
        self._tensors, self._ending = tensors, ending
        self._converted: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._converted:
            tensor = self._tensors[name]
            self._converted[name] = _to_numpy(cut(name) + self._ending, tensor)
        return self._converted[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by all their names, and the buffers of the model's state."""
    kept = model.state_dict().keys()
    buffers = model.named_buffers(remove_duplicate=False)
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **{name: buffer for name, buffer in buffers if name in kept},
    }


def read(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Source:
    """Read a live model and optimizer."""
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}; for "
            "state_dicts there is from_torch_checkpoint"
        )
    _check_class(optimizer)
    names: dict[Any, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, name)

    def name_of(parameter: Any) -> str:
        if not isinstance(parameter, torch.Tensor) or parameter not in names:
            raise ValueError(
                "`model` must hold the optimizer's parameters, but lacks "
                f"{_parameter(parameter)}; give the model that it trains"
            )
        return names[parameter]

    frozen = {name for p, name in names.items() if not p.requires_grad}
    groups, states = optimizer.param_groups, optimizer.state
    _check_groups(groups, states)
    return _source(tensors_of(model), groups, states, name_of, frozen)


def read_checkpoint(
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    names: Sequence[str] | None,
) -> Source:
    """Read the state_dicts of a model and an optimizer."""
    for argument, value in (("model", model), ("optimizer", optimizer)):
        if not isinstance(value, Mapping):
            raise TypeError(
                f"`{argument}` must be a state_dict, got {type(value).__name__}; for "
                "live ones there is from_torch"
            )
    tensors = _tensors_in(model)
    if not {"state", "param_groups"} <= optimizer.keys():
        raise ValueError(
            "`optimizer` must be the state_dict of an optimizer, with state and "
            f"param_groups, got one with {listed(optimizer) or 'nothing'}; give what "
            "its state_dict() returns"
        )
    groups, states = optimizer["param_groups"], optimizer["state"]
    _check_groups(groups, states)
    own = _names_in(groups)
    if names is None:
        names = own
    elif not isinstance(names, list | tuple):
        raise TypeError(
            f"`names` must be a list, got {type(names).__name__}; give the parameters' "
            "names in the optimizer's order"
        )
    elif own and list(names) != own:
        raise ValueError(
            f"`names` must be the checkpoint's own, {listed(own)}, got "
            f"{listed(names)}; leave them out"
        )
    keys = [key for group in groups for key in group["params"]]
    _check_names(names, len(keys), tensors)
    name_of = dict(zip(keys, names, strict=True)).__getitem__
    return _source(tensors, groups, states, name_of)


def _tensors_in(model: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Those of a state_dict, in which a module may have put other things too."""
    for name, value in model.items():
        if not isinstance(name, str):
            raise TypeError(
                f"`model` must have names for keys, got {shown(name)}; give the "
                "state_dict itself"
            )
        if not _is_extra(name):
            _check_tensor(cut(name), value)
    return {name: tensor for name, tensor in model.items() if not _is_extra(name)}


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"


def _names_in(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that a checkpoint has for its parameters, if it has any."""
    own = []
    for number, group in enumerate(groups):
        # In the format of torch.distributed.checkpoint names stand in place of numbers.
        found = group.get("param_names", group["params"])
        for key in group["params"]:
            if not isinstance(key, int | str):
                raise TypeError(
                    f"`params` of group {number} must be numbers or names, got "
                    f"{shown(key)}; give the optimizer's state_dict as it was saved"
                )
        if not isinstance(found, list | tuple) or len(found) != len(group["params"]):
            raise ValueError(
                f"`param_names` of group {number} must be a list of "
                f"{len(group['params'])} names, one a parameter, got {shown(found)}; "
                "give the optimizer's state_dict as it was saved"
            )
        own += [name for name in found if isinstance(name, str)]
    return own


def _check_groups(groups: Any, states: Any) -> None:
    """Refuse what does not have the form of an optimizer's groups and states."""
    remedy = "give an optimizer, or its state_dict, as torch made it"
    if not isinstance(groups, list | tuple) or not groups:
        error = ValueError if isinstance(groups, list | tuple) else TypeError
        raise error(
            f"`optimizer` must have a list of param_groups, got {shown(groups)}; "
            + remedy
        )
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise TypeError(
                f"group {number} of `optimizer` must be a dict, got {shown(group)}; "
                + remedy
            )
        if not isinstance(group.get("params"), list | tuple):
            raise TypeError(
                f"`params` of group {number} must be a list, got "
                f"{shown(group.get('params'))}; {remedy}"
            )
    if not isinstance(states, Mapping):
        raise TypeError(
            f"`optimizer` must have a dict for its state, got {shown(states)}; {remedy}"
        )
    for key, state in states.items():
        if not isinstance(state, Mapping):
            raise TypeError(
                f"the state that `optimizer` has of {_parameter(key)} must be a dict, "
                f"got {shown(state)}; {remedy}"
            )


def _check_names(
    names: Sequence[str], wanted: int, model: Mapping[str, torch.Tensor]
) -> None:
    usual = (
        "of an RMSprop(model.parameters()) they are "
        "[name for name, _ in model.named_parameters()]"
    )
    if len(names) != wanted:
        raise ValueError(
            f"`names` must have one for each of the optimizer's {wanted} parameters, "
            f"in its order, got {len(names)}; {usual}; the model's state has "
            f"{listed(model)}"
        )
    for name in names:
        if not isinstance(name, str) or name not in model:
            raise ValueError(
                f"`names` must be in the model's state, got {_bare(name)}; {usual}; it "
                f"has {listed(model)}"
            )
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ValueError(
                f"`names` must differ, got {cut(name)} {count} times; {usual}"
            )


def _check_class(optimizer: Any) -> None:
    import torch

    is_timm = any(kind.__name__ == "RMSpropTF" for kind in type(optimizer).__mro__)
    if not is_timm and not isinstance(optimizer, torch.optim.RMSprop):
        raise TypeError(
            "`optimizer` must be a torch.optim.RMSprop or timm's RMSpropTF, got "
            f"{type(optimizer).__name__}; its state means something else"
        )


def _source(
    tensors: Mapping[str, torch.Tensor],
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Any, Mapping[str, Any]],
    name_of: Callable[[Any], str],
    frozen: Collection[str] = (),
) -> Source:
    """Put together what both kinds of reading give."""
    labels = dict.fromkeys(tensors, FROZEN)
    members: dict[str, str] = {}
    slots: dict[str, Mapping[str, np.ndarray]] = {}
    carried = {}
    owned: set[Any] = set()
    for number, group in enumerate(groups):
        label = str(number)
        of_group = {}
        for parameter in group["params"]:
            name = name_of(parameter)
            if name in members:
                raise ValueError(
                    f"`optimizer` must have `{cut(name)}` once, got it in group "
                    f"{members[name]} and again in group {label}; take it out of one"
                )
            members[name] = label
            of_group[name] = states.get(parameter)
            owned.add(parameter)
        steps = [_step(name, state) for name, state in of_group.items() if state]
        carried[label] = _group(label, group, max(steps, default=0))
        for name, state in of_group.items():
            if name in frozen or not (state or not carried[label].step):
                continue
            labels[name] = label
            if state:
                found = {slot: state[slot] for slot in SLOTS if slot in state}
                slots[name] = _Arrays(found, f" of {cut(name)}")
    if foreign := states.keys() - owned:
        raise ValueError(
            "`optimizer` must have a state for its own parameters only, got one for "
            f"{listed(map(_parameter, foreign))}, which no group has"
        )
    tied = _tied(tensors, labels)
    once = {name: tensor for name, tensor in tensors.items() if name not in tied}
    return Source(
        _Arrays(once),
        {name: _shape(tensor) for name, tensor in once.items()},
        tied,
        carried,
        {name: labels[name] for name in once},
        members,
        slots,
        overlaps(once),
    )


def _tied(
    tensors: Mapping[str, torch.Tensor], labels: Mapping[str, str]
) -> dict[str, str]:
    """Further names of tensors in the same memory, and the name that stands for them.

    It is that of the one that is trained, which has the slots, or else the first.
    """
    alike = collections.defaultdict(list)
    for name, tensor in tensors.items():
        alike[place(tensor)].append(name)
    tied: dict[str, str] = {}
    for names in alike.values():
        trained = [name for name in names if labels[name] != FROZEN]
        if len(trained) > 1:
            raise ValueError(
                "`optimizer` must train a parameter once, but "
                f"{listed(f'`{cut(name)}`' for name in trained)} are the same memory, "
                "which it moves by averages of each; make them one parameter in torch "
                "(a.weight = b.weight) that the optimizer has once"
            )
        first = (trained or names)[0]
        tied |= {name: first for name in names if name != first}
    return tied


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Empty where there is no plain one; such a tensor cannot be carried anyway."""
    reason = problem(tensor)
    has_shape = reason is None or tensor.is_meta or tensor.is_sparse
    return tuple(tensor.shape) if has_shape else ()


def _step(name: str, state: Mapping[str, Any]) -> int:
    if "step" not in state:
        raise ValueError(
            f"the optimizer's state of `{cut(name)}` must have its step, got "
            f"{listed(state)}; give the state_dict as it was saved"
        )
    step = _number(f"`step` of `{cut(name)}`", state["step"])
    if step != int(step) or not 0 <= step < 2**31:
        raise ValueError(
            f"`step` of `{cut(name)}` must be an integer in [0, 2³¹), got {step:g}; "
            "give the number of updates made"
        )
    return int(step)


def _group(label: str, group: Mapping[str, Any], step: int) -> Group:
    if not {"lr", "alpha", "centered", "momentum"} <= group.keys():
        raise TypeError(
            "`optimizer` must be an RMSprop, but its group "
            f"{label} has the options {listed(group.keys() - {'params'}, 8)}"
        )
    dialect = "timm" if "lr_in_momentum" in group else "torch"
    defaults = OF_TIMM if dialect == "timm" else OF_TORCH
    options = {name: group.get(name, default) for name, default in defaults.items()}
    options["lr"] = group["lr"]
    if options.get("corrected_weight_decay"):
        options["max_lr"] = group.get("max_lr_snapshot", group["lr"])
    for name, value in options.items():
        where = f"`{name}` of group {label} of `optimizer`"
        if not isinstance(defaults.get(name), bool):
            options[name] = _number(where, value)
        elif not isinstance(value, bool | np.bool_):
            raise TypeError(
                f"{where} must be True or False, got {shown(value)}; {_AS_TRAINED}"
            )
    return Group(dialect, options.pop("lr"), options, step)


def _number(what: str, value: Any) -> float:
    """A finite number, or a tensor that holds one."""
    import torch

    given = value
    if isinstance(value, torch.Tensor) and problem(value) is None:
        value = value.item() if value.numel() == 1 else value
    elif isinstance(value, np.ndarray) and not value.shape:
        value = value[()]
    kinds = int | float | np.integer | np.floating
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{what} must be a number, got {shown(given)}; {_AS_TRAINED}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(
            f"{what} must be a finite number, got {shown(given)}; {_AS_TRAINED}"
        )
    return number


def _parameter(key: Any) -> str:
    """A parameter, or what stands for it in a checkpoint, as an error shows it."""
    shape = getattr(key, "shape", None)
    return _bare(key) if shape is None else f"one of shape {cut(tuple(shape))}"


def _bare(name: Any) -> str:
    return cut(name) if isinstance(name, str) else shown(name)


def _check_tensor(name: str, tensor: Any) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"`{name}` must be a tensor, got {type(tensor).__name__}; give the "
            "state_dict itself"
        )


def _to_numpy(name: str, tensor: torch.Tensor) -> np.ndarray:
    """Without a copy on the CPU: torch goes on writing into it."""
    import torch

    _check_tensor(name, tensor)
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
