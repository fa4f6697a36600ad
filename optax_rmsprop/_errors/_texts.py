"""Short texts for values and trees in error messages.

No message has more than 600 characters. These functions shorten everything in it whose
length is not known.
"""

from collections.abc import Iterable
from typing import Any

from jax.core import Tracer
from jax.tree_util import keystr


def short(text: str, most: int = 160) -> str:
    """Return a text or, if it is longer than `most`, its two ends."""
    end = most // 2 - 2
    return text if len(text) <= most else f"{text[:end]} ... {text[-end:]}"


def shown(value: Any) -> str:
    """Return the repr of a value; for arrays that are not scalars, type and shape."""
    try:
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape:
            return f"{kind_of(value)} of shape {short(str(tuple(shape)), 100)}"
        return short(repr(value), 100)
    except Exception:  # Python's repr refuses integers of more than 4300 digits
        return kind_of(value) + " too long to show" * isinstance(value, int)


def bare(name: Any) -> str:
    """Return a string without quotes, and anything else as `shown`."""
    return short(name, 80) if isinstance(name, str) else shown(name)


def some(items: Iterable[Any], between: str = ", ", most: int = 200) -> str:
    """List as many items as fit in `most` characters, and how many more there are.

    `some(["a", "b", "c"], most=6)` is "a, b, and 1 more". The first is always listed.
    """
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
    """Return the name of a value's type with its article, as in "a list"."""
    if value is None:
        return "None"
    kind = "traced array" if isinstance(value, Tracer) else bare(type(value).__name__)
    return f"a{'n' * (kind[0] in 'aeiouAEIOU')} {kind}"


def at(path: Any) -> str:
    """Return the path of a leaf as text."""
    return short(keystr(path)) or "the root"


def trees(structure: Any, expected: Any) -> str:
    """Show two structures that differ although the paths of their leaves agree."""
    return f"got {short(str(structure))}, expected {short(str(expected))}"
