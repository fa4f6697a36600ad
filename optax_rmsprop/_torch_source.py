"""A torch run in NumPy: what is read out of torch's objects and written into them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from optax_rmsprop._carry import FROZEN, Group, Source, WayBack

if TYPE_CHECKING:
    import torch

SLOTS = ("square_avg", "grad_avg", "momentum_buffer")
# The options of a group that change numbers, but for lr, and what torch and timm take
# them for in the checkpoints of versions that did not have them yet.
OF_TORCH = {
    "alpha": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "centered": False,
    "maximize": False,
}
OF_TIMM = {
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


def read(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Source:
    """Read a live model and optimizer."""
    _check_class(optimizer)
    names, tied = _names(model)

    def name_of(parameter: torch.nn.Parameter) -> str:
        if parameter not in names:
            raise ValueError(
                "`model` must hold the optimizer's parameters, but lacks one of shape "
                f"{tuple(parameter.shape)}"
            )
        return names[parameter]

    once = {name: parameter for parameter, name in names.items()} | _buffers(model)
    frozen = {name for p, name in names.items() if not p.requires_grad}
    groups, states = optimizer.param_groups, optimizer.state
    return _source(once, groups, states, name_of, frozen, tied)


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
    if not {"state", "param_groups"} <= optimizer.keys():
        raise ValueError(
            "`optimizer` must be the state_dict of an optimizer, with state and "
            f"param_groups, got one with {', '.join(map(str, optimizer))}"
        )
    groups = optimizer["param_groups"]
    # In the format of torch.distributed.checkpoint names stand in place of numbers.
    own = [
        name
        for group in groups
        for name in group.get("param_names", group["params"])
        if isinstance(name, str)
    ]
    if names is None:
        names = own
    elif not isinstance(names, list | tuple):
        raise TypeError(f"`names` must be a list, got {type(names).__name__}")
    elif own and list(names) != own:
        raise ValueError(
            f"`names` must be the checkpoint's own, {', '.join(own)}, got "
            f"{', '.join(names)}; leave them out"
        )
    places = [place for group in groups for place in group["params"]]
    _check_names(names, len(places), model)
    name_of = dict(zip(places, names, strict=True)).__getitem__
    for name, tensor in model.items():
        _check_tensor(name, tensor)
    tied = _tied(model, names)
    once = {name: tensor for name, tensor in model.items() if name not in tied}
    return _source(once, groups, optimizer["state"], name_of, tied=tied)


def _tied(model: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, str]:
    """Further names of tensors that share their memory with one of `names`."""
    first = {_place(model[name]): name for name in names}
    return {
        name: first[_place(tensor)]
        for name, tensor in model.items()
        if first.get(_place(tensor), name) != name
    }


def _place(tensor: torch.Tensor) -> Any:
    """Where a tensor's memory is; that of an empty one is its own."""
    if not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


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
            f"{', '.join(model)}"
        )
    for name, count in collections.Counter(names).items():
        if name not in model:
            raise ValueError(
                f"`names` must be in the model's state, got {name}; {usual}; it has "
                f"{', '.join(model)}"
            )
        if count > 1:
            raise ValueError(f"`names` must differ, got {name} {count} times; {usual}")


def _check_class(optimizer: Any) -> None:
    import torch

    is_timm = any(kind.__name__ == "RMSpropTF" for kind in type(optimizer).__mro__)
    if not is_timm and not isinstance(optimizer, torch.optim.RMSprop):
        raise TypeError(
            "`optimizer` must be a torch.optim.RMSprop or timm's RMSpropTF, got "
            f"{type(optimizer).__name__}; its state means something else"
        )


def _source(
    state_dict: Mapping[str, torch.Tensor],
    groups: Iterable[Mapping[str, Any]],
    states: Mapping[Any, Mapping[str, Any]],
    name_of: Callable[[Any], str],
    frozen: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
) -> Source:
    """Put together what both kinds of reading give."""
    arrays = {name: _to_numpy(name, t) for name, t in state_dict.items()}
    labels = dict.fromkeys(arrays, FROZEN)
    source = Source(arrays, dict(tied or {}), {}, labels, {}, {})
    owned: set[Any] = set()
    for number, group in enumerate(groups):
        label = str(number)
        owned |= {*group["params"]}
        of_group = {name_of(p): states.get(p) for p in group["params"]}
        step = max((_step(n, s) for n, s in of_group.items() if s), default=0)
        source.groups[label] = _group(label, group, step)
        for name, state in of_group.items():
            source.members[name] = label
            if name not in frozen and (state or not step):
                source.labels[name] = label
            if state and name not in frozen:
                source.slots[name] = {
                    slot: _to_numpy(f"{slot} of {name}", state[slot])
                    for slot in SLOTS
                    if slot in state
                }
    if foreign := states.keys() - owned:
        raise ValueError(
            "`optimizer` must have a state for its own parameters only, got one for "
            f"{', '.join(map(str, foreign))}, which no group has"
        )
    return source


def _step(name: str, state: Mapping[str, Any]) -> int:
    if "step" not in state:
        raise ValueError(
            f"the optimizer's state of `{name}` must have its step, got "
            f"{', '.join(state)}"
        )
    return int(state["step"])


def _buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those that belong to the model's state."""
    kept = model.state_dict().keys()
    named = model.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in named if name in kept}


def _group(label: str, group: Mapping[str, Any], step: int) -> Group:
    if not {"lr", "alpha", "centered", "momentum"} <= group.keys():
        raise TypeError(
            "`optimizer` must be an RMSprop, but its group "
            f"{label} has the options {', '.join(group.keys() - {'params'})}"
        )
    dialect = "timm" if "lr_in_momentum" in group else "torch"
    defaults = OF_TIMM if dialect == "timm" else OF_TORCH
    options = {name: group.get(name, default) for name, default in defaults.items()}
    if options.get("corrected_weight_decay"):
        options["max_lr"] = group.get("max_lr_snapshot", group["lr"])
    return Group(dialect, float(group["lr"]), options, step)


def _names(
    model: torch.nn.Module,
) -> tuple[dict[torch.nn.Parameter, str], dict[str, str]]:
    """The name of each parameter, and of its further names the first."""
    names: dict[torch.nn.Parameter, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(parameter, name)
        if first != name:
            tied[name] = first
    return names, tied


def _check_tensor(name: str, tensor: Any) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"`{name}` must be a tensor, got {type(tensor).__name__}; give the "
            "state_dict itself"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(
            f"`{name}` must be a dense tensor, got a sparse or quantized one; convert "
            "it with to_dense() or dequantize()"
        )


def _to_numpy(name: str, tensor: torch.Tensor) -> np.ndarray:
    """Without a copy on the CPU: torch goes on writing into it."""
    import torch

    _check_tensor(name, tensor)
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def write(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, way: WayBack
) -> None:
    """Copy parameters, buffers and slots into torch's objects."""
    import torch

    names, _ = _names(model)
    parameters = {name: parameter for parameter, name in names.items()}
    targets = parameters | _buffers(model)
    for name, target in targets.items():
        if target.numel() > 1 and 0 in target.stride():
            raise ValueError(
                f"`{name}` must have a place in memory for each element, got one that "
                "is expanded; clone it in torch"
            )
    # Where the number of steps is kept on the parameter's device.
    capturable = {
        p for g in optimizer.param_groups if g.get("capturable") for p in g["params"]
    }
    with torch.no_grad():
        for name, array in way.arrays():
            targets[name].copy_(_to_tensor(array))
    for name in way.unstepped:
        optimizer.state.pop(parameters[name], None)
    for name, step, slot, array in way.slots():
        parameter = parameters[name]
        device = parameter.device if parameter in capturable else "cpu"
        state = optimizer.state[parameter]
        state["step"] = torch.tensor(float(step), device=device)
        state[slot] = _to_tensor(array).to(parameter.device, parameter.dtype)


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    """In the memory of the array, which is nobody else's."""
    import torch

    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
