"""Write a run into torch's objects, either completely or not at all."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from optax_rmsprop._errors import bare, short
from optax_rmsprop.carry._back import SourceArrays
from optax_rmsprop.carry._torch._memory import overlaps_itself
from optax_rmsprop.carry._torch._read import tensors_of

if TYPE_CHECKING:
    import torch


def write(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, carried: SourceArrays
) -> None:
    """Copy parameters, buffers and slots into torch's objects.

    Tensors that torch refuses to write are found before anything is written. If a write
    fails nevertheless, the old values are restored. The optimizer's new state is built
    beside the old one, and replaces it at the end.
    """
    import torch

    targets = tensors_of(model)
    with torch.no_grad():
        for name in carried.names:
            _check_target(name, targets[name])
        old_state, state = optimizer.state, _state(targets, optimizer, carried)
        old: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for name, array in carried.arrays():
                target = targets[name]
                old.append((target, target.detach().clone()))
                target.copy_(_to_tensor(array))
            optimizer.state = state
        except BaseException:
            optimizer.state = old_state
            for target, values in old:
                # A tensor that raises here has raised before it was written.
                with contextlib.suppress(Exception):
                    target.copy_(values)
            raise


def _check_target(name: str, target: torch.Tensor) -> None:
    """Refuse a tensor that cannot be written."""
    if overlaps_itself(target):
        raise ValueError(
            f"`{bare(name)}` must have memory of its own for each element, got one "
            "that is expanded; clone it in torch"
        )
    try:
        target.copy_(target.detach())  # its own values: nothing changes
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"`{bare(name)}` must be a tensor that torch can write, got one that "
            f"refuses: {short(str(error))}; clone it in torch, outside of inference "
            "mode"
        ) from error


def _state(
    targets: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    carried: SourceArrays,
) -> Any:
    """A new state for the optimizer, with the run's steps and slots."""
    import torch

    # torch keeps the steps of these parameters on their device, all others on the CPU.
    capturable = {
        p for g in optimizer.param_groups if g.get("capturable") for p in g["params"]
    }
    state: Any = copy.copy(optimizer.state)
    for name in carried.without_state:
        state.pop(targets[name], None)
    own: dict[torch.Tensor, dict[str, Any]] = {}
    # torch refuses to update tensors made in inference mode outside of it.
    with torch.inference_mode(False):
        for name, step, slot, array in carried.slots():
            parameter = targets[name]
            if parameter not in own:
                device = parameter.device if parameter in capturable else "cpu"
                own[parameter] = dict(state.get(parameter, {}))
                own[parameter]["step"] = _step(step, device)
            new = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            own[parameter][slot] = new.copy_(_to_tensor(array))
    state.update(own)
    return state


def _step(step: int, device: Any) -> torch.Tensor:
    """The step in float32, as torch has it, or in float64 if float32 would round it."""
    import torch

    is_exact = float(np.float32(step)) == step
    dtype = torch.float32 if is_exact else torch.float64
    return torch.tensor(float(step), dtype=dtype, device=device)


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor that shares the array's memory: the array must not be used any more."""
    import torch

    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
