"""Name the parameters of an optimizer, whose state_dict has numbers in place of names.

Take a model with these tensors, and an optimizer whose state has these shapes:

    model       {"a.weight": (3, 3), "a.bias": (3,), "b.weight": (3, 3), "b.bias": (3,)}
    optimizer   group 0: [(3, 3), (3, 3)]    group 1: [(3,), (3,)]

A program may give parameters to an optimizer in any order. But some kinds of checkpoint
are known to have those of each group in the order of the model. Then there is only one
possibility:

    group 0: ["a.weight", "b.weight"]        group 1: ["a.bias", "b.bias"]

If group 0 were [(3, 3)] and group 1 [(3,)], because one layer is frozen, there would be
four, and `in_order` would not choose one. The user is asked instead, and `names_of`
gives the answer.
"""

from __future__ import annotations  # so that help() shows these types by name

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optax_rmsprop._errors import bare, kind_of
from optax_rmsprop.carry._torch._format import check_groups, name_in
from optax_rmsprop.carry._torch._memory import address, has_shape

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
# Whether a parameter of this name and shape may be in the group of this number.
MayBeIn = Callable[[str, Shape, int], bool]

# DistributedDataParallel and torch.compile put these before names.
WRAPPERS = {"module", "_orig_mod"}
# A state_dict does not tell buffers from parameters. These are torch's own buffers.
BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}
# The search for names gives up at so many partial assignments. Their number grows with
# each group and each tensor that is not trained, if all have the same shape.
MOST_PARTIAL = 2000


def names_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Name the parameters of a live optimizer, in its order.

    Save the names beside a checkpoint, and give them to `from_torch_checkpoint`.

    Args:
      model: has all of the optimizer's parameters.
      optimizer: any optimizer of torch, also a wrapped one.

    Returns:
      The names, group after group, without the parts "module." and "_orig_mod." that
      DistributedDataParallel and torch.compile put into them.

    Raises:
      TypeError: the model or the optimizer is of another kind.
      ValueError: the model lacks a parameter of the optimizer; two names are equal
        without those parts.

    Example:
      >>> import torch
      >>> from optax_rmsprop.carry import names_of
      >>> model = torch.nn.Linear(3, 2)
      >>> names_of(model, torch.optim.RMSprop([model.bias, model.weight]))
      ['bias', 'weight']

    References:
      torch/nn/parallel/distributed.py, torch/_dynamo/eval_frame.py (2.13.0).
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {kind_of(model)}; give the model "
            "that the optimizer trains"
        )
    groups = getattr(optimizer, "param_groups", None)
    check_groups(groups, {})
    name_of: dict[Any, str] = {p: name for name, p in model.named_parameters()}
    bare_name = bare_names(name_of.values(), "model")
    parameters = itertools.chain.from_iterable(g["params"] for g in groups or ())
    return [bare_name[name_in(name_of, parameter)] for parameter in parameters]


def bare_names(names: Iterable[str], argument: str) -> dict[str, str]:
    """Each name with the one that it has without wrappers.

    The last part of a name is the parameter's own, which no wrapper gives.
    """
    found, taken = dict[str, str](), dict[str, str]()
    for name in names:
        *modules, last = name.split(".")
        found[name] = ".".join([*(m for m in modules if m not in WRAPPERS), last])
        other = taken.setdefault(found[name], name)
        if other != name:
            raise ValueError(
                f"`{argument}` must have names that differ in more than 'module.' and "
                f"'_orig_mod.', got {bare(other)} and {bare(name)}; rename one of the "
                "modules"
            )
    return found


def candidates_in(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that may be parameters, in the model's order; of tied ones the first.

    Integers cannot be trained. Nested and uninitialized tensors have no shape.
    """
    found: dict[str, torch.Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        is_buffer = name.rpartition(".")[2] in BUFFERS
        if has_shape(tensor) and may_train(tensor) and not is_buffer:
            if (where := address(tensor)) not in seen:
                found[name] = tensor
            seen.add(where)
    return found


def may_train(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a dtype that can have gradients."""
    return tensor.is_floating_point() or tensor.is_complex()


def in_order(
    candidates: Mapping[str, torch.Tensor],
    wanted: Sequence[Sequence[Shape | None]],
    may_be_in: MayBeIn | None,
) -> list[str] | None:
    """The names of the optimizer's parameters, if there is only one possibility.

    Args:
      candidates: the model's tensors, in its order.
      wanted: for each group, the shapes of its parameters, or None for one that has no
        state and may therefore have any shape.
      may_be_in: a rule about the groups, in which the parameters have the order of the
        model. None if they may have any order.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in candidates.items()}
    by_shape = collections.defaultdict(list)
    for name, shape in shapes.items():
        by_shape[shape].append(name)
    known = (s for s in itertools.chain.from_iterable(wanted) if s is not None)
    alike = [by_shape[shape] for shape in known]
    only = {names[0] for names in alike if len(names) == 1}
    if len(only) == sum(map(len, wanted)):
        return [name for (name,) in alike]
    if may_be_in is None or _may_be_sorted(candidates):
        return None
    return _only_assignment(shapes, wanted, may_be_in)


def _may_be_sorted(candidates: Mapping[str, torch.Tensor]) -> bool:
    """Whether this may be safetensors' order, by dtype and name, not the model's."""
    by_dtype = collections.defaultdict(list)
    for name, tensor in candidates.items():
        by_dtype[tensor.dtype].append(name)
    is_sorted = all(names == sorted(names) for names in by_dtype.values())
    return is_sorted and len(candidates) > 1


def _only_assignment(
    shapes: Mapping[str, Shape],
    wanted: Sequence[Sequence[Shape | None]],
    may_be_in: MayBeIn,
) -> list[str] | None:
    """Fill the groups from their starts, with one name after another.

    A partial assignment is described by how many parameters of each group have a name:
    (2, 1) if two of group 0 and one of group 1 have. From it, the next name leads to
    (3, 1) if it goes to group 0, to (2, 2) if it goes to group 1, and to (2, 1) if it
    is not in the optimizer. `reached[i]` has all that the first i names can lead to.
    Back from the end, where all have names, the way is unique if each step is.
    """

    def fits(name: str, partial: tuple[int, ...], group: int) -> bool:
        """Whether a name may be the next in a group."""
        shape = shapes[name]
        return (
            partial[group] < len(wanted[group])
            and wanted[group][partial[group]] in (None, shape)
            and may_be_in(name, shape, group)
        )

    numbers = range(len(wanted))
    end = tuple(map(len, wanted))
    reached = [{(0,) * len(wanted)}]
    for left, name in zip(range(len(shapes))[::-1], shapes, strict=True):
        after = set(reached[-1])
        for partial in reached[-1]:
            after |= {_moved(partial, g, 1) for g in numbers if fits(name, partial, g)}
        # Drop those that the names that are left cannot complete.
        after = {partial for partial in after if sum(end) - sum(partial) <= left}
        if len(after) > MOST_PARTIAL:
            return None
        reached.append(after)
    if end not in reached[-1]:
        return None
    names: list[list[str]] = [[] for _ in wanted]
    partial = end
    for name, before in reversed(list(zip(shapes, reached, strict=False))):
        ways: list[tuple[tuple[int, ...], int | None]] = []
        if partial in before:
            ways.append((partial, None))
        for group in numbers:
            previous = _moved(partial, group, -1)
            if previous in before and fits(name, previous, group):
                ways.append((previous, group))
        if len(ways) != 1:
            return None
        ((partial, chosen),) = ways
        if chosen is not None:
            names[chosen].insert(0, name)
    return list(itertools.chain.from_iterable(names))


def _moved(partial: tuple[int, ...], group: int, by: int) -> tuple[int, ...]:
    return (*partial[:group], partial[group] + by, *partial[group + 1 :])
