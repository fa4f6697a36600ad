"""A torch run in NumPy: what is read out of torch's objects and written into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    import torch

FROZEN = "frozen"  # the label of what no group trains
# torch's options of a group that change numbers, but for lr.
OPTIONS = ("alpha", "eps", "weight_decay", "momentum", "centered", "maximize")
SLOTS = ("square_avg", "grad_avg", "momentum_buffer")


class Source(NamedTuple):
    """What of a torch run is carried, in NumPy."""

    arrays: dict[str, np.ndarray]  # the state_dict, tied parameters once
    tied: dict[str, str]  # further names of tied parameters, to those in arrays
    groups: dict[str, dict[str, Any]]  # options of the optimizer's groups, by label
    labels: dict[str, str]  # of each array, its group or FROZEN
    slots: dict[str, dict[str, np.ndarray]]  # of each parameter that has a state
    steps: dict[str, int]  # of each group


def read(model: torch.nn.Module, optimizer: torch.optim.RMSprop) -> Source:
    import torch

    if not isinstance(optimizer, torch.optim.RMSprop):
        raise TypeError(
            "`optimizer` must be a torch.optim.RMSprop, got "
            f"{type(optimizer).__name__}; its state means something else"
        )
    names, tied = _names(model)
    arrays = {
        name: _to_numpy(name, tensor)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    source = Source(arrays, tied, {}, dict.fromkeys(arrays, FROZEN), {}, {})
    for number, group in enumerate(optimizer.param_groups):
        label = str(number)
        source.groups[label] = {name: group[name] for name in ("lr", *OPTIONS)}
        states = {p: optimizer.state.get(p) for p in group["params"]}
        steps = [int(state["step"]) for state in states.values() if state]
        source.steps[label] = max(steps, default=0)
        for parameter, state in states.items():
            if parameter not in names:
                raise ValueError(
                    "`model` must hold the optimizer's parameters, but lacks one of "
                    f"group {number}, of shape {tuple(parameter.shape)}"
                )
            name = names[parameter]
            if parameter.requires_grad and (state or not steps):
                source.labels[name] = label
            if state:
                source.slots[name] = {
                    slot: _to_numpy(f"{slot} of {name}", state[slot])
                    for slot in SLOTS
                    if slot in state
                }
    return source


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


def _to_numpy(name: str, tensor: torch.Tensor) -> np.ndarray:
    """Without a copy on the CPU: torch goes on writing into it."""
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(
            f"`{name}` must be a dense tensor, got a sparse or quantized one; convert "
            "it with to_dense() or dequantize()"
        )
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def write(
    model: torch.nn.Module,
    optimizer: torch.optim.RMSprop,
    arrays: Mapping[str, np.ndarray],
    slots: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Copy into torch's tensors, after all has been converted."""
    import torch

    targets = model.state_dict()  # shares the model's memory
    names, _ = _names(model)
    parameters = {name: parameter for parameter, name in names.items()}
    copies = [
        (targets[name], _to_tensor(a, targets[name])) for name, a in arrays.items()
    ]
    states = {
        parameters[name]: {
            slot: torch.tensor(float(value))
            if slot == "step"
            else _to_tensor(value, parameters[name])
            for slot, value in entries.items()
        }
        for name, entries in slots.items()
    }
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)
    for parameter, state in states.items():
        optimizer.state[parameter] = state


def _to_tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    import torch

    array = np.array(array)  # one that torch may write into
    if array.dtype == jnp.bfloat16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.to(like.device, like.dtype)
