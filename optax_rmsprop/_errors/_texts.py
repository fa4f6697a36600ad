"""What error messages show of values and trees, in few characters.

No message has more than 600 characters. Whatever can be of any length goes into it
through one of these functions.
"""

from collections.abc import Iterable
from typing import Any

from jax.core import Tracer
from jax.tree_util import keystr


def short(text: str, most: int = 160) -> str:
    """A text or, if it is longer than `most`, its two ends."""
    end = most // 2 - 2
    return text if len(text) <= most else f"{text[:end]} ... {text[-end:]}"


def shown(value: Any) -> str:
    """A value by its repr; an array that is no scalar by its shape."""
    try:
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape:
            return f"{kind_of(value)} of shape {short(str(tuple(shape)), 100)}"
        return short(repr(value), 100)
    except Exception:  # Python writes no integer of more than 4300 digits
        return kind_of(value) + " too long to show" * isinstance(value, int)


def bare(name: Any) -> str:
    """A name without quotes; anything that is no text by its repr."""
    return short(name, 80) if isinstance(name, str) else shown(name)


def some(items: Iterable[Any], between: str = ", ", most: int = 200) -> str:
    """As many items as `most` characters hold, at least one, and how many more."""
    found: list[str] = []
    length = 0
    rest = iter(items)
    for item in rest:
        text = short(item if isinstance(item, str) else shown(item), most)
        length += len(text) + len(between)
        if found and length > most:
            more = 1 + sum(1 for _ in rest)
            return f"{between.join(found)}{between}and {more} more"
        found.append(text)
    return between.join(found)


def kind_of(value: Any) -> str:
    """The type of a value, with its article."""
    if value is None:
        return "None"
    kind = "traced array" if isinstance(value, Tracer) else bare(type(value).__name__)
    return f"a{'n' * (kind[0] in 'aeiouAEIOU')} {kind}"


def at(path: Any) -> str:
    """The path of a leaf."""
    return short(keystr(path)) or "the root"


def trees(structure: Any, expected: Any) -> str:
    """Two structures that differ where no path does."""
    return f"got {short(str(structure))}, expected {short(str(expected))}"
