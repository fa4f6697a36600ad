"""The registry of generated tables, and how pages take them over."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

# The text in a page, with the white space around it.
BLOCK = re.compile(r"(<!-- begin ([\w-]+) -->\s*)(.*?)(\s*<!-- end \2 -->)", re.S)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")


class Table(NamedTuple):
    """A function from a language, "en" or "zh", to the text between two markers."""

    make: Callable[[str], str]
    slow: bool
    tolerance: float


TABLES: dict[str, Table] = {}


def table(name, *, slow=False, tolerance=0.0):
    """Register a function. Its numbers may differ by `tolerance` times themselves.

    A tolerance is for numbers that depend on how a processor rounds.
    """

    def register(make):
        TABLES[name] = Table(make, slow, tolerance)
        return make

    return register


def rows_of(header, rows):
    """A table in Markdown."""
    first, *rest = (f"| {' | '.join(map(str, row))} |" for row in (header, *rows))
    return "\n".join([first, "|---" * len(header) + "|", *rest])


def number(x):
    """A setting as people write it: 0.9, 1e-8, 2.5e-4."""
    if x == 0 or abs(x) >= 1e-3:
        return f"{x:.6g}"
    mantissa, exponent = f"{x:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def digits(x, significant=2):
    """A computed number, rounded: 31.6, 0.032, 1.2e-5."""
    rounded = float(f"{x:.{significant}g}")
    if abs(rounded) >= 1:
        decimals = max(0, significant - 1 - math.floor(math.log10(abs(rounded))))
        text = f"{rounded:.{decimals}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return number(rounded)


def same(old, new, tolerance):
    """Whether two texts are equal, up to a tolerance of their numbers."""
    if not tolerance or NUMBER.split(old) != NUMBER.split(new):
        return old == new
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=tolerance) for a, b in pairs)


def filled(text, language, names):
    """The page with the named tables made anew, where they differ."""

    def made(found):
        begin, name, old, end = found.groups()
        if name not in names:
            return found[0]
        new = TABLES[name].make(language)
        if same(old, new, TABLES[name].tolerance):
            return found[0]
        if not old:  # a block to be filled for the first time
            begin, end = f"{begin.rstrip()}\n\n", f"\n\n{end.lstrip()}"
        return f"{begin}{new}{end}"

    return BLOCK.sub(made, text)
