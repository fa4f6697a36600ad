"""Find out which tensors of torch share memory."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def problem(tensor: torch.Tensor) -> str | None:
    """The rule that a tensor without plain elements in memory breaks, or None.

    It is the part of an error message after "must".
    """
    import torch

    if hasattr(tensor, "full_tensor"):
        return (
            "have all its values in this process, got a DTensor; replace it by its "
            "full_tensor(), or save both state_dicts by get_state_dict of "
            "torch.distributed.checkpoint.state_dict, with full_state_dict=True"
        )
    if torch.nn.parameter.is_lazy(tensor):
        return "have its values, got one that is not initialized; call the model once"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return (
            "be a dense tensor, got a sparse, nested or quantized one; convert it with "
            "to_dense(), to_padded_tensor() or dequantize()"
        )
    if tensor.is_meta:
        return "have its values, got one on the meta device; load it to the CPU"
    return None


def has_shape(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape, even if `problem` says why it cannot be carried."""
    kinds = tensor.is_meta, tensor.is_sparse, hasattr(tensor, "full_tensor")
    return problem(tensor) is None or any(kinds)


def address(tensor: torch.Tensor) -> Hashable:
    """A value that is equal for two tensors of the same elements of the same memory.

    A tensor without memory gets an integer of its own.
    """
    start = 0
    if problem(tensor) is None and tensor.numel():
        with contextlib.suppress(RuntimeError):  # tensors of some classes have none
            start = tensor.data_ptr()
    if not start:
        return id(tensor)
    kind = tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return start, tensor.shape, *(s for size, s in steps if size > 1), *kind


def overlaps(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """The names of each two tensors that share memory, but are not the same."""
    spans = {
        name: (str(tensor.device), *_span(tensor))
        for name, tensor in tensors.items()
        if not isinstance(address(tensor), int)
    }
    found, before = [], list[str]()
    for name in sorted(spans, key=spans.__getitem__):
        device, start, _ = spans[name]
        before = [
            other
            for other in before
            if spans[other][0] == device and spans[other][2] > start
        ]
        found += [(o, name) for o in before if _meet(tensors[o], tensors[name])]
        before.append(name)
    return found


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor share memory, as they do in an expanded one."""
    if tensor.is_contiguous() or not tensor.numel():
        return False
    start, end = _span(tensor)
    used, size = np.zeros(end - start, bool), tensor.element_size()
    np.lib.stride_tricks.as_strided(
        used,
        (*tensor.shape, size),
        (*(stride * size for stride in tensor.stride()), 1),
    )[...] = True
    return bool(np.count_nonzero(used) < tensor.numel() * size)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and of the byte after its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors with overlapping spans have a byte in common.

    They need not: the spans of two columns of one array overlap.
    """
    try:
        most: Any = 10**6  # the annotation allows only -1 and 0
        return np.shares_memory(_addresses(a), _addresses(b), max_work=most)
    except np.exceptions.TooHardError:
        return True


def _addresses(tensor: torch.Tensor) -> np.ndarray:
    """An array with a tensor's addresses. Reading it would crash on another device."""
    size = tensor.element_size()
    interface = {
        "version": 3,
        "typestr": "|u1",
        "data": (tensor.data_ptr(), True),
        "shape": (*tensor.shape, size),
        "strides": (*(stride * size for stride in tensor.stride()), 1),
    }
    return np.asarray(types.SimpleNamespace(__array_interface__=interface))
