"""Refuse state_dicts and optimizers that do not have the form of torch's."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_rmsprop._errors import bare, kind_of, shown, some
from optax_rmsprop.carry._torch._memory import problem

if TYPE_CHECKING:
    import torch

AS_TRAINED = "give what the run had in torch"


def tensors_in(model: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a state_dict, without the extra state that modules may add."""
    for name, value in model.items():
        if not isinstance(name, str):
            raise TypeError(
                f"`model` must have names for keys, got {shown(name)}; give the "
                "state_dict itself"
            )
        if not _is_extra(name):
            check_tensor(bare(name), value)
    return {name: tensor for name, tensor in model.items() if not _is_extra(name)}


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"


def names_in(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parameters' names in a checkpoint, if it has them."""
    own = []
    for number, group in enumerate(groups):
        # torch.distributed.checkpoint replaces the numbers in params by names.
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


def check_groups(groups: Any, states: Any) -> None:
    """Check the form of an optimizer's groups and states."""
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
                f"the state that `optimizer` has of {one_parameter(key)} must be a "
                f"dict, got {shown(state)}; {remedy}"
            )


def check_names(
    names: Sequence[str], wanted: int, model: Mapping[str, torch.Tensor]
) -> None:
    """Check that these names are distinct, in the model, and as many as wanted."""
    usual = (
        "of an RMSprop(model.parameters()) they are "
        "[name for name, _ in model.named_parameters()], of any optimizer "
        "names_of(model, optimizer)"
    )
    if len(names) != wanted:
        raise ValueError(
            f"`names` must have one for each of the optimizer's {wanted} parameters, "
            f"in its order, got {len(names)}; {usual}; the model's state has "
            f"{some(model)}"
        )
    for name in names:
        if not isinstance(name, str) or name not in model:
            if any({"module", "_orig_mod"} & set(key.split(".")) for key in model):
                usual = (
                    "from_torch_checkpoint(checkpoint, port=port) removes 'module.' "
                    "and '_orig_mod.' from both"
                )
            raise ValueError(
                f"`names` must be in the model's state, got {bare(name)}; {usual}; it "
                f"has {some(model)}"
            )
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ValueError(
                f"`names` must differ, got {bare(name)} {count} times; {usual}"
            )


def finite(what: str, value: Any) -> float:
    """The value of a finite number, or of a tensor with one element."""
    import torch

    given = value
    if isinstance(value, torch.Tensor) and problem(value) is None:
        value = value.item() if value.numel() == 1 else value
    elif isinstance(value, np.ndarray) and not value.shape:
        value = value[()]
    kinds = int | float | np.integer | np.floating
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{what} must be a number, got {shown(given)}; {AS_TRAINED}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(
            f"{what} must be a finite number, got {shown(given)}; {AS_TRAINED}"
        )
    return number


def updates_made(what: str, value: Any) -> int:
    """The value of an optimizer's step."""
    step = finite(what, value)
    if step != int(step) or not 0 <= step < 2**31:
        raise ValueError(
            f"{what} must be an integer in [0, 2³¹), got {step:g}; give the number of "
            "updates made"
        )
    return int(step)


def name_in(names: Mapping[Any, str], parameter: Any) -> str:
    """The name of a live optimizer's parameter, from those of its model."""
    import torch

    if not isinstance(parameter, torch.Tensor) or parameter not in names:
        raise ValueError(
            "`model` must have the optimizer's parameters, but lacks "
            f"{one_parameter(parameter)}; give the model that it trains"
        )
    return names[parameter]


def one_parameter(key: Any) -> str:
    """A live parameter, or its key in a checkpoint, as errors show it."""
    shape = getattr(key, "shape", None)
    return bare(key) if shape is None else f"one of shape {shown(tuple(shape))}"


def check_tensor(name: str, tensor: Any) -> None:
    """Check that this is a tensor."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"`{name}` must be a tensor, got {kind_of(tensor)}; give the "
            "state_dict itself"
        )
