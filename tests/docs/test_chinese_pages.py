"""The Chinese pages have the headings of the English ones.

What else lags behind, blocks of code, numbers and formulas, is a warning.
"""

import ast
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGLISH = {page: ROOT / "docs" / page.name for page in ROOT.glob("docs/zh/*.md")}
ENGLISH[ROOT / "README.zh-CN.md"] = ROOT / "README.md"

FENCE = re.compile(r"^```(\w*).*\n([\s\S]*?)^```$", re.M)
HEADING = re.compile(r"^(#+ .+)$", re.M)
# Before each Chinese heading stands the English one that it translates.
MARKED = re.compile(r"^<!-- en: (#+) (.+) -->\n\1 .+$", re.M)
SPAN = re.compile(r"`[^`]+`|\$\$[^$]+\$\$|\$[^$\n]+\$")
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)*(?:e-?\d+)?", re.A)


def headings(english):
    return HEADING.findall(FENCE.sub("", english))


def translated(chinese):
    return [f"{level} {title}" for level, title in MARKED.findall(chinese)]


def code(text):
    """Blocks without comments and docstrings."""
    return [stripped(*block) for block in FENCE.findall(text)]


def stripped(language, block):
    if language != "python":
        return re.sub(r" *# .*", "", block)
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body[0] = ast.Expr(ast.Constant("docstring"))
    return ast.dump(tree)


def facts(text):
    """The names in code, formulas and numbers of each section."""
    parts = re.split(r"^(?:<!-- en: .+ -->\n)?#+ .+$", FENCE.sub("", text), flags=re.M)
    found = []
    for part in parts:
        spans = {re.sub(r"\s+", " ", span) for span in SPAN.findall(part)}
        rest = re.sub(r"\]\([^)]*\)", "]", SPAN.sub("", part))
        found.append(spans | set(NUMBER.findall(rest)))
    return found


def broken_markup(chinese):
    """Emphasis like `**甲。**乙`, whose asterisks show, and formulas glued to text."""
    prose = FENCE.sub("", chinese)
    before = [
        prose[: span.start()][-1:] for span in SPAN.finditer(prose) if "$" in span[0]
    ]
    shown = re.findall(r"\*\*[^*\n]+[^\w*`\n]\*\*\w", SPAN.sub("`code`", prose))
    return shown + [char for char in before if char.strip()]


each_page = pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.stem)


@each_page
def test_no_heading_is_missing(page):
    english = ENGLISH[page].read_text("utf-8")
    assert translated(page.read_text("utf-8")) == headings(english)


@each_page
@pytest.mark.filterwarnings("default::UserWarning")
def test_what_lags_is_reported(page):
    chinese, english = page.read_text("utf-8"), ENGLISH[page].read_text("utf-8")
    name = page.relative_to(ROOT)
    if code(chinese) != code(english):
        warnings.warn(f"{name}: other code than on the English page", stacklevel=1)
    for title, ours, theirs in zip(
        ["the top", *headings(english)], facts(chinese), facts(english), strict=False
    ):
        if ours != theirs:
            lags = f"{sorted(theirs - ours)} in English, here {sorted(ours - theirs)}"
            warnings.warn(f"{name}, {title}: {lags}", stacklevel=1)
    if broken := broken_markup(chinese):
        warnings.warn(f"{name}: broken markup {broken}", stacklevel=1)


TRANSLATION = "<!-- en: # A step -->\n# 一步更新\n\n共 400 次，`eps`。\n"


@pytest.mark.parametrize(
    ("english", "same_headings", "same_facts"),
    [
        ("# A step\n\n400 updates, `eps`.\n", True, True),
        ("# An update\n\n400 updates, `eps`.\n", False, True),
        ("# A step\n\n400 updates, `eps`.\n\n## Range\n", False, False),
        ("# A step\n\n500 updates, `eps`.\n", True, False),
        ("# A step\n\n400 updates, `decay`.\n", True, False),
    ],
)
def test_a_change_of_the_english_page_is_noticed(english, same_headings, same_facts):
    assert (translated(TRANSLATION) == headings(english)) == same_headings
    assert (facts(TRANSLATION) == facts(english)) == same_facts
