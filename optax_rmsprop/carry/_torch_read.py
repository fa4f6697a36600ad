"""Read a run of torch into a `Source`, from live objects or from a checkpoint."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from optax_rmsprop._errors import bare, kind_of, shown, some
from optax_rmsprop.carry._checkpoints import wrapped_optimizer
from optax_rmsprop.carry._run import Group, LazyArray, Source, Weight, lazy
from optax_rmsprop.carry._slots import SLOTS
from optax_rmsprop.carry._torch_format import (
    AS_TRAINED,
    check_groups,
    check_names,
    check_tensor,
    finite,
    names_in,
    one_parameter,
    tensors_in,
)
from optax_rmsprop.carry._torch_memory import address, overlaps, problem

if TYPE_CHECKING:
    import torch

# The options of a group that change numbers. Checkpoints of older versions lack those
# with a value here, by which newer versions do the same.
COMMON = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")
ONLY_TIMM = ("decoupled_decay", "lr_in_momentum")
OPTIONS: dict[str, dict[str, bool]] = {
    "torch": {"maximize": False},
    "timm": {"corrected_weight_decay": False, "caution": False},
    "stable_baselines3": {},
}
FLAGS = {"centered", *ONLY_TIMM, *OPTIONS["torch"], *OPTIONS["timm"]}
# The functions that make an update, by module and name, and the dialects they follow.
STEPS = {
    ("torch.optim.rmsprop", "RMSprop.step"): "torch",
    ("timm.optim.rmsprop_tf", "RMSpropTF.step"): "timm",
    (
        "stable_baselines3.common.sb2_compat.rmsprop_tf_like",
        "RMSpropTFLike.step",
    ): "stable_baselines3",
}
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
    dialect = _class_dialect(optimizer, dialect)
    names: dict[Any, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, name)

    def name_of(parameter: Any) -> str:
        if not isinstance(parameter, torch.Tensor) or parameter not in names:
            raise ValueError(
                "`model` must have the optimizer's parameters, but lacks "
                f"{one_parameter(parameter)}; give the model that it trains"
            )
        return names[parameter]

    groups, states = optimizer.param_groups, optimizer.state
    check_groups(groups, states)
    fixed = {name for p, name in names.items() if not p.requires_grad}
    frozen = fixed
    if trainable is not None:
        frozen = _frozen(groups, states, name_of, trainable)
    # timm up to 1.0.30 reads this, and later versions copy it into each group.
    made_with = {"max_lr_snapshot": getattr(optimizer, "defaults", {}).get("lr")}
    options = [made_with | group for group in groups]
    chosen = trainable or ()
    tensors = tensors_of(model)
    source = _source(tensors, options, states, name_of, dialect, frozen, chosen)
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
    _check_dialect(dialect)
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
    chosen = trainable or ()
    source = _source(tensors, groups, states, name_of, dialect, frozen, chosen)
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


def _check_dialect(dialect: str | None) -> None:
    if dialect is not None and dialect not in list(OPTIONS):
        raise ValueError(
            f"`dialect` must be {some(map(repr, OPTIONS), ' or ')}, got "
            f"{shown(dialect)}; leave it out for the classes of these packages"
        )


def _class_dialect(optimizer: Any, dialect: str | None) -> str:
    """The dialect of an optimizer: the given one, or that of its class.

    A class is known by the module of its step, which a subclass may inherit.
    """
    _check_dialect(dialect)
    if remedy := wrapped_optimizer(optimizer):
        raise TypeError(
            "`optimizer` must be the one that makes the steps, got "
            f"{kind_of(optimizer)}, which wraps it; {remedy}"
        )
    step = getattr(type(optimizer), "step", None)
    where = getattr(step, "__module__", ""), getattr(step, "__qualname__", "")
    own = STEPS.get(where)
    if own and dialect not in (None, own):
        raise ValueError(
            f"`dialect` must be {own!r}, which is that of `optimizer`, got "
            f"{dialect!r}; leave it out"
        )
    for kind in ("pre", "post"):
        if getattr(optimizer, f"_optimizer_step_{kind}_hooks", None):
            raise ValueError(
                f"`optimizer` must have no step {kind} hooks, which may change "
                "parameters and are not carried, got one; remove it (handle.remove()), "
                "and do the same in JAX"
            )
    if (known := own or dialect) is None:
        remedy = (
            "its state may mean something else: if its step is that of one of these, "
            f"say which: dialect={some(map(repr, OPTIONS), ' or ')}"
        )
        if isinstance(optimizer, list | tuple | Mapping):
            remedy = "give the optimizer itself, or both dicts to from_torch_checkpoint"
        raise TypeError(
            "`optimizer` must be a torch.optim.RMSprop, timm's RMSpropTF or "
            f"Stable-Baselines3's RMSpropTFLike, got {kind_of(optimizer)}; {remedy}"
        )
    return known


def _source(
    tensors: Mapping[str, torch.Tensor],
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Any, Mapping[str, Any]],
    name_of: Callable[[Any], str],
    dialect: str | None,
    frozen: Collection[str] = (),
    trainable: Collection[str] = (),
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
        read_groups[label] = _group(label, group, dialect, max(steps, default=0))
        for name, state in group_states.items():
            if name in frozen:
                continue
            waits = not state and bool(steps)
            # torch makes a state at the first gradient, and skips a parameter without
            # one. With gradients of 0, as JAX has, only a weight decay would move it.
            if waits and group["weight_decay"] and name not in trainable:
                still.append(name)
                continue
            slots = _slots(name, state) if state else None
            weights[name] = weights[name]._replace(
                trained=True, slots=slots, waits=waits and name not in trainable
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
    reason = problem(tensor)
    kinds = tensor.is_meta, tensor.is_sparse, hasattr(tensor, "full_tensor")
    has_shape = reason is None or any(kinds)
    return tuple(tensor.shape) if has_shape else ()


def _step(name: str, state: Mapping[str, Any]) -> int:
    if "step" not in state:
        raise ValueError(
            f"the optimizer's state of `{bare(name)}` must have its step, got "
            f"{some(state)}; give the state_dict as it was saved"
        )
    step = finite(f"`step` of `{bare(name)}`", state["step"])
    if step != int(step) or not 0 <= step < 2**31:
        raise ValueError(
            f"`step` of `{bare(name)}` must be an integer in [0, 2³¹), got {step:g}; "
            "give the number of updates made"
        )
    return int(step)


def _group(
    label: str, group: Mapping[str, Any], dialect: str | None, step: int
) -> Group:
    others = [name for name in group if name not in ("params", "max_lr_snapshot")]

    def require(names: Sequence[str], what: str) -> None:
        if missing := [name for name in names if name not in group]:
            raise TypeError(
                f"`optimizer` must be {what}, but its group {label} lacks "
                f"{some(missing)}, got the options {some(others)}; its state means "
                "something else"
            )

    require(COMMON, "an RMSprop")
    dialect = dialect or _group_dialect(label, group, others)
    required = COMMON + (ONLY_TIMM if dialect == "timm" else ())
    require(required, f"an RMSprop of {dialect}")
    foreign = FLAGS.difference(required, OPTIONS[dialect])
    if used := [name for name in sorted(foreign) if group.get(name)]:
        raise ValueError(
            f"`dialect` must be one that has {some(used)}, which group {label} of "
            f"`optimizer` uses, got {dialect!r}; give the right one, or set them to "
            "False if the optimizer's step does not use them"
        )
    options = {name: group[name] for name in required}
    options |= {name: group.get(name, off) for name, off in OPTIONS[dialect].items()}
    options["initial_lr"] = group.get("initial_lr", group["lr"])
    options["lr_scale"] = group.get("lr_scale", 1.0)  # timm's schedulers multiply by it
    if options.get("corrected_weight_decay"):
        options["max_lr"] = _max_lr(label, group)
    for name, value in options.items():
        where = f"`{name}` of group {label} of `optimizer`"
        if name not in FLAGS:
            options[name] = finite(where, value)
        elif not isinstance(value, bool | np.bool_):
            raise TypeError(
                f"{where} must be True or False, got {shown(value)}; {AS_TRAINED}"
            )
    _check_decay(label, group, options)
    lr, initial_lr, lr_scale = (
        options.pop(n) for n in ("lr", "initial_lr", "lr_scale")
    )
    return Group(dialect, lr, options, step, initial_lr * lr_scale)


def _group_dialect(label: str, group: Mapping[str, Any], others: list[str]) -> str:
    """The dialect of a group in a checkpoint, which does not name its class."""
    is_timm = [name in group for name in ONLY_TIMM]
    if all(is_timm):
        return "timm"
    since_1_12 = ("maximize", "foreach", "capturable", "differentiable")
    if not any(is_timm) and any(name in group for name in since_1_12):
        return "torch"
    raise ValueError(
        "`dialect` must be given, because several classes have the options of group "
        f"{label} of `optimizer`, got {some(others)}; give 'torch' for a "
        "torch.optim.RMSprop of torch up to 1.11, 'stable_baselines3' for its "
        "RMSpropTFLike"
    )


def _max_lr(label: str, group: Mapping[str, Any]) -> Any:
    """The rate by which timm's corrected decay divides."""
    rate = group.get("max_lr_snapshot")
    if rate is None:
        raise ValueError(
            f"`max_lr_snapshot` must be in group {label} of `optimizer`, because "
            "corrected_weight_decay divides by it, got none: timm up to 1.0.30 does "
            "not save it; set group['max_lr_snapshot'] to the lr that RMSpropTF was "
            "made with"
        )
    return rate


def _check_decay(
    label: str, group: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Refuse a decay that timm up to 0.4 does not multiply by the learning rate."""
    decoupled = options.get("decoupled_decay") and options["weight_decay"]
    if decoupled and "corrected_weight_decay" not in group:
        raise ValueError(
            f"`corrected_weight_decay` must be in group {label} of `optimizer`, "
            "because its decay is decoupled, got none: timm up to 0.4 subtracts "
            "weight_decay * p, which has no counterpart here, later versions lr * "
            "weight_decay * p; set group['corrected_weight_decay'] = False for these"
        )


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
