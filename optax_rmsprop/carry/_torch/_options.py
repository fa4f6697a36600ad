"""Which RMSprop an optimizer of torch is, and the options of its groups.

torch, timm and Stable-Baselines3 have an RMSprop each, whose groups have options of the
same names. A live optimizer is known by the function of its step, and a checkpoint, in
which there is no class, by the options that only one of them has. Where neither tells,
the user does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optax_rmsprop._errors import kind_of, shown, some
from optax_rmsprop.carry._groups import Group
from optax_rmsprop.carry._torch._checkpoints import wrapped_optimizer
from optax_rmsprop.carry._torch._format import AS_TRAINED, finite

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


def check_dialect(dialect: str | None) -> None:
    if dialect is not None and dialect not in list(OPTIONS):
        raise ValueError(
            f"`dialect` must be {some(map(repr, OPTIONS), ' or ')}, got "
            f"{shown(dialect)}; leave it out for the classes of these packages"
        )


def class_dialect(optimizer: Any, dialect: str | None) -> str:
    """The dialect of an optimizer: the given one, or that of its class.

    A class is known by the module of its step, which a subclass may inherit.
    """
    import torch.optim.optimizer as torch_optimizer

    check_dialect(dialect)
    if remedy := wrapped_optimizer(optimizer):
        raise TypeError(
            "`optimizer` must be the one that makes the steps, got "
            f"{kind_of(optimizer)}, which wraps it; {remedy}"
        )
    step = getattr(type(optimizer), "step", None)
    where = getattr(step, "__module__", ""), getattr(step, "__qualname__", "")
    own = None if _is_wrapped(step) else STEPS.get(where)
    if own and dialect not in (None, own):
        raise ValueError(
            f"`dialect` must be {own!r}, which is that of `optimizer`, got "
            f"{dialect!r}; leave it out"
        )
    for kind in ("pre", "post"):
        own_hooks = getattr(optimizer, f"_optimizer_step_{kind}_hooks", None)
        for_all = getattr(torch_optimizer, f"_global_optimizer_{kind}_hooks", None)
        if own_hooks or for_all:
            raise ValueError(
                f"`optimizer` must have no step {kind} hooks, which may change "
                "parameters and are not carried, got one, of its own or for all "
                "optimizers; remove it (handle.remove()), and do the same in JAX"
            )
    # torch's schedulers put a step that counts around the optimizer's.
    step = getattr(optimizer, "__dict__", {}).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise ValueError(
            "`optimizer` must make the steps of its class, got a step of its own, "
            "which is not carried; remove it (del optimizer.step), and do the same in "
            "JAX"
        )
    known = own or dialect
    if known is None:
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


def _is_wrapped(step: Any) -> bool:
    """Whether a function that is not torch's is around a step, with its name.

    functools.wraps gives a function the name and the module of the one in it.
    """
    while hasattr(step, "__wrapped__"):
        if not step.__globals__["__name__"].startswith("torch."):
            return True
        step = step.__wrapped__
    return False


def group_of(
    label: str, group: Mapping[str, Any], dialect: str | None, step: int
) -> Group:
    """Check the options of a group; without a dialect, they must show it."""
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
