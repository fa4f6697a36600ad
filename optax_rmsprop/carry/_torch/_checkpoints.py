"""Find the model, its optimizer and the parameters' names in a checkpoint.

torch, Lightning, timm and others save a model and its optimizer under keys of their
own. Take this checkpoint of a torch.nn.Linear(3, 2), whose tensors are shown by their
shapes:

    {"epoch": 5, "net": {"module.weight": (2, 3), "module.bias": (2,)},
     "opt": {"state": {0: {"square_avg": (2, 3), ...}, 1: {"square_avg": (2,), ...}},
             "param_groups": [{"params": [0, 1], "lr": 0.01, ...}]}}

`recognise` finds the two state_dicts by their form, and removes "module.", which
DistributedDataParallel has put before the names. `_names.py` finds that parameter 0 can
only be "weight", and parameter 1 only "bias".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from optax_rmsprop._errors import bare, kind_of, short, shown, some
from optax_rmsprop.carry._slots import SLOTS
from optax_rmsprop.carry._torch._format import check_groups, names_in, tensors_in
from optax_rmsprop.carry._torch._names import (
    MayBeIn,
    Shape,
    bare_names,
    candidates_in,
    in_order,
    may_train,
)

if TYPE_CHECKING:
    import torch

TORCH, DISTRIBUTED = "a torch checkpoint", "a torch.distributed checkpoint"
LIGHTNING, TIMM = "a Lightning checkpoint", "a timm checkpoint"
STABLE_BASELINES3 = "a Stable-Baselines3 zip"
TRAINER, ACCELERATE = "files of HF Trainer", "files of accelerate"


class Saved(NamedTuple):
    """The parts of a checkpoint that `from_torch_checkpoint` needs.

    Attributes:
      model: the state_dict of the model.
      optimizer: the state_dict of its optimizer, with state and param_groups.
      names: the names of the optimizer's parameters, in its order. None if the
        optimizer has them itself, or if more than one order is possible.
      kind: the kind of checkpoint, as in "a Lightning checkpoint".
    """

    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    names: list[str] | None
    kind: str


def recognise(saved: Mapping[str, Any]) -> Saved:
    """Find the parts of a checkpoint, the dict that torch.load returns.

    For a Stable-Baselines3 zip, it is a dict of what torch.load returns for each
    member. Other parts, such as schedulers and random states, are not read.

    Raises:
      TypeError: this is not a dict.
      ValueError: it has no model or no optimizer, or several; two names are equal
        without the parts that wrappers have put into them.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(
            "`model` must be a checkpoint, or a state_dict with its `optimizer`, got "
            f"{kind_of(saved)}; from_torch takes live objects"
        )
    if _is_model(saved):
        raise ValueError(
            "`optimizer` must be given with the state_dict of a model, got None; give "
            "the optimizer's state_dict, or a checkpoint with both"
        )
    kind, keys = _kind(saved)
    parts = {key: saved[key] for key in keys}
    models, optimizers = (
        list(_find(parts, is_one, {id(saved)})) for is_one in (_is_model, _is_optimizer)
    )
    _check_one_of_each(saved, models, optimizers)
    ((_, model),), ((path, optimizer),) = models, optimizers
    if _is_flat(optimizer):
        optimizer = _unflattened(optimizer)
    groups, states = optimizer["param_groups"], optimizer["state"]
    check_groups(groups, states)
    bare_name = bare_names(model, "model")
    model = {bare_name[name]: tensor for name, tensor in model.items()}
    if own := names_in(groups):
        optimizer = _renamed(optimizer, bare_names(own, "optimizer"))
        return Saved(model, optimizer, None, kind)
    candidates = candidates_in(tensors_in(model))
    if kind == STABLE_BASELINES3:
        candidates = _of_owner(candidates, _member(path[-1]))
    wanted = [[_shape_of(states.get(key)) for key in g["params"]] for g in groups]
    names = in_order(candidates, wanted, _rule(kind, len(groups)))
    return Saved(model, dict(optimizer), names, kind)


def _kind(saved: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The kind of a checkpoint, and the keys under which model and optimizer are."""
    if "pytorch-lightning_version" in saved:
        # Its callbacks may have dicts of tensors, too.
        return LIGHTNING, [k for k in ("state_dict", "optimizer_states") if k in saved]
    if {"state_dict", "optimizer", "arch", "version"} <= saved.keys():
        left_out = ", without its state_dict_ema" if "state_dict_ema" in saved else ""
        return TIMM + left_out, ["state_dict", "optimizer"]
    if any(_member(key).endswith(".optimizer") for key in saved):
        keys = [key for key in saved if _member(key) != "pytorch_variables"]
        return STABLE_BASELINES3, keys
    kind = TORCH
    if "optimizer.pt" in saved:
        kind = TRAINER
    elif "optimizer.bin" in saved:
        kind = ACCELERATE
    elif any(
        _is_flat(optimizer) for _, optimizer in _find(saved, _is_optimizer, {id(saved)})
    ):
        kind = DISTRIBUTED
    return kind, list(saved)


def _member(key: Any) -> str:
    return str(key).removesuffix(".pth")


def _rule(kind: str, groups: int) -> MayBeIn | None:
    """The rule by which this kind divides parameters into groups, if it has one.

    Within a group, these kinds keep the order of the model. HF Trainer gives no decay
    to the weights of layers of some classes either, and timm to those that a model
    lists: so other parameters may be in any group.
    """

    def trainer(name: str, shape: Shape, group: int) -> bool:
        return group == 1 or "bias" not in name  # group 1 has no decay

    def timm(name: str, shape: Shape, group: int) -> bool:
        is_bias = len(shape) == 1 or name.endswith(".bias")
        return group == 0 or not is_bias  # group 0 has no decay

    if kind == TRAINER and groups == 2:
        return trainer
    if kind.startswith(TIMM) and groups == 2:
        return timm
    if kind == STABLE_BASELINES3:
        return lambda name, shape, group: True
    return None  # the program chose the order


def _of_owner(
    candidates: Mapping[str, torch.Tensor], member: str
) -> dict[str, torch.Tensor]:
    """The parameters that an optimizer in a Stable-Baselines3 zip trains.

    "policy.optimizer" trains the policy without its target networks, which DQN has, and
    "actor.optimizer" trains the actor.
    """
    owner = member.removesuffix(".optimizer")

    def is_of_owner(name: str) -> bool:
        top, _, _ = name.partition(".")
        return not top.endswith("_target") if owner == "policy" else top == owner

    return {name: t for name, t in candidates.items() if is_of_owner(name)}


def _find(
    saved: Any,
    is_one: Callable[[Any], bool],
    seen: set[int],
    path: tuple[Any, ...] = (),
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and the value of each state_dict of one sort.

    `seen` collects the identities of all values, because a checkpoint may have one
    twice, or contain itself.
    """
    items = saved.items() if isinstance(saved, Mapping) else enumerate(saved)
    for key, value in items:
        if not isinstance(value, Mapping | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        if is_one(value):
            yield (*path, key), value
        elif not _is_optimizer(value):
            yield from _find(value, is_one, seen, (*path, key))


def _is_model(value: Any) -> bool:
    """Whether this is a dict of named tensors, and not only of integers.

    The states of random generators are tensors of integers.
    """
    if not isinstance(value, Mapping) or _is_optimizer(value):
        return False
    try:
        tensors = tensors_in(value)
    except TypeError:
        return False
    return any(map(may_train, tensors.values()))


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return {"state", "param_groups"} <= value.keys() or _is_flat(value)


def _is_flat(value: Mapping[Any, Any]) -> bool:
    """Whether torch.distributed.checkpoint has flattened an optimizer's state_dict."""
    sections = {str(key).partition(".")[:2] for key in value}
    flat = ("param_groups", "."), ("state", ".")
    return flat[0] in sections and sections.issubset(flat)


def _check_one_of_each(
    saved: Mapping[str, Any], models: Sequence[Any], optimizers: Sequence[Any]
) -> None:
    each = ((models, "model"), (optimizers, "optimizer"))
    for found, what in each:
        if not found:
            raise ValueError(
                f"`model` must be a checkpoint with the state_dict of one {what}, got "
                f"none in {some(map(bare, saved)) or 'an empty dict'}; add what "
                f"state_dict() of the {what} returns"
            )
    for found, what in each:
        if len(found) > 1:
            model, optimizer = (_at(found[0][0]) for found, _ in each)
            raise ValueError(
                f"`model` must be a checkpoint with one {what}, got {len(found)}: "
                f"{some((_at(path) for path, _ in found), most=160)}; give the two "
                "that belong together, as in "
                f'{{"model": saved{model}, "optimizer": saved{optimizer}}}'
            )


def _at(path: Sequence[Any]) -> str:
    return short("".join(f"[{shown(key)}]" for key in path), 80)


def _renamed(
    optimizer: Mapping[str, Any], bare_name: Mapping[str, str]
) -> dict[str, Any]:
    """A copy of an optimizer's state_dict that has its own names, without wrappers."""

    def renamed(keys: Iterable[Any]) -> list[Any]:
        return [bare_name.get(key, key) for key in keys]

    groups = [
        {k: renamed(v) if k in ("params", "param_names") else v for k, v in g.items()}
        for g in optimizer["param_groups"]
    ]
    states = optimizer["state"]
    states = dict(zip(renamed(states), states.values(), strict=True))
    return {**optimizer, "state": states, "param_groups": groups}


def _unflattened(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The usual form of a state_dict that torch.distributed.checkpoint has flattened.

    It has the options of each parameter, as in {"param_groups.layer.weight.lr": 0.01},
    but not the groups. Here, parameters of equal options are a group.
    """
    states, options = dict[str, Any](), dict[str, Any]()
    for key, value in flat.items():
        section, _, rest = key.partition(".")
        name, _, field = rest.rpartition(".")
        part = states if section == "state" else options
        part.setdefault(name, {})[field] = value
    groups = list[dict[str, Any]]()
    for name, own in options.items():
        own = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in own.items()}
        group = next((g for g in groups if g == {**own, "params": g["params"]}), None)
        if group is None:
            groups.append({**own, "params": [name]})
        else:
            group["params"].append(name)
    for group in groups:
        # A parameter without a state may be frozen, or in a group that was added later
        # and makes its first step next.
        without = [name for name in group["params"] if name not in states]
        if 0 < len(without) < len(group["params"]):
            raise ValueError(
                "`optimizer` must have a state for all parameters of equal options, or "
                f"for none, if it is flattened, got none for {some(without)}; save it "
                "without flatten_optimizer_state_dict, or remove the keys param_groups"
                f".{bare(without[0])}.* and those of other frozen parameters"
            )
    return {"state": states, "param_groups": groups}


def _shape_of(state: Mapping[str, Any] | None) -> Shape | None:
    """The shape of a parameter, which its slots have, too."""
    shapes = (getattr((state or {}).get(slot), "shape", None) for slot in SLOTS)
    return next((tuple(shape) for shape in shapes if shape is not None), None)


def wrapped_optimizer(optimizer: Any) -> str:
    """The remedy for an optimizer that wraps one of torch, or "" if it wraps none.

    accelerate's AcceleratedOptimizer and Lightning's have it in `optimizer`, torch's
    ZeroRedundancyOptimizer in `optim`.
    """
    import torch

    for name in ("optimizer", "optim", *getattr(optimizer, "__dict__", ())):
        inner = getattr(optimizer, name, None)
        if not isinstance(inner, torch.optim.Optimizer):
            continue
        remedy = f"give the {bare(type(inner).__name__)} in its `.{bare(name)}`"
        if hasattr(optimizer, "consolidate_state_dict"):
            remedy += (
                ", if it is of one process; of several, call consolidate_state_dict(), "
                "and give its state_dict() to from_torch_checkpoint"
            )
        return remedy
    return ""
