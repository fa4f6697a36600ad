"""Parts of error messages that stay short, whatever tree or checkpoint is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any


def cut(text: Any, most: int = 60) -> str:
    """A text without its end, where it is long."""
    text = str(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(items: Iterable[Any], most: int = 4) -> str:
    """The first few of the items, and how many more there are."""
    rest = iter(items)
    first = [cut(item) for item in itertools.islice(rest, most)]
    more = sum(1 for _ in rest)
    return ", ".join(first) + (f" and {more} more" if more else "")


def shown(value: Any) -> str:
    """A value as an error shows it: by its shape, where it has one."""
    shape = getattr(value, "shape", ())
    if shape:
        return f"{type(value).__name__} of shape {cut(tuple(shape))}"
    try:
        return cut(repr(value))
    except ValueError:  # Python writes no integer of more than 4300 digits.
        return f"one {type(value).__name__} too long to show"
