"""The Chinese pages keep up with the English ones: headings, code, numbers, links."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ENGLISH = {page: DOCS / page.name for page in sorted(DOCS.glob("zh/*.md"))}
ENGLISH[ROOT / "README.zh-CN.md"] = ROOT / "README.md"
CHINESE = {english: chinese for chinese, english in ENGLISH.items()}

FENCE = re.compile(r"^```(\w*).*\n([\s\S]*?)^```$", re.M)
HEADING = re.compile(r"^(#+) (.+)$", re.M)
# Before each Chinese heading stands the English one that it translates.
MARK = re.compile(r"^<!-- en: (#+ .+) -->\n", re.M)
LINK = re.compile(r"\]\(([^)\s#]*)[^)\s]*\)")
SPAN = re.compile(r"`[^`]+`|\$\$[^$]+\$\$|\$[^$\n]+\$")
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)*(?:e-?\d+)?", re.A)


def prose(text):
    return FENCE.sub("", text)


def headings(page, text):
    return [" ".join(heading) for heading in HEADING.findall(prose(text))]


def marks(page, text):
    return MARK.findall(prose(text))


def levels(page, text):
    return [len(level) for level, _ in HEADING.findall(prose(text))]


def code(page, text):
    return [
        (language, parsed(block) if language == "python" else uncommented(block))
        for language, block in FENCE.findall(text)
    ]


def parsed(block):
    """A block's syntax tree, without comments and docstrings."""
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body[0] = ast.Expr(ast.Constant("docstring"))
    return ast.dump(tree)


def uncommented(block):
    return re.sub(r" *# .*", "", block)


def facts(text):
    """The code spans, formulas and numbers in a piece of prose."""
    spans = {re.sub(r"\s+", " ", span) for span in SPAN.findall(text)}
    return spans | set(NUMBER.findall(LINK.sub("]", SPAN.sub("", text))))


def sections(page, text):
    return [facts(part) for part in HEADING.split(MARK.sub("", prose(text)))[::3]]


def tables(page, text):
    """What the cells of each row of each table have in code and numbers."""
    found, lines = [], [*prose(text).splitlines(), ""]
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|?( *:?-+:? *\|)+( *:?-+:? *)?", line):
            end = lines.index("", i)
            rows = [lines[i - 1], *lines[i + 1 : end]]
            found.append([list(map(facts, row.strip("|").split("|"))) for row in rows])
    return found


def targets(page, text):
    """Where links and figures lead, as English pages; not to this very page."""
    links = LINK.findall(prose(text))
    paths = [
        link if "://" in link else (page.parent / link).resolve()
        for link in links
        if link
    ]
    paths = [ENGLISH.get(path, path) for path in paths]
    return sorted(str(path) for path in paths if path != ENGLISH.get(page, page))


# What to read off the English page, and what off the Chinese, to find the same.
VIEWS = {
    "marks": (headings, marks),
    "levels": (levels, levels),
    "code": (code, code),
    "numbers and code in prose": (sections, sections),
    "tables": (tables, tables),
    "links and figures": (targets, targets),
}
each_view = pytest.mark.parametrize("view", VIEWS)
each_page = pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.stem)


@each_view
@each_page
def test_the_chinese_page_follows_the_english(page, view):
    of_english, of_chinese = VIEWS[view]
    english = ENGLISH[page]
    assert of_chinese(page, page.read_text()) == of_english(
        english, english.read_text()
    )


@each_page
def test_every_mark_stands_before_its_heading(page):
    pairs = re.findall(MARK.pattern + HEADING.pattern, prose(page.read_text()), re.M)
    assert len(pairs) == len(headings(page, page.read_text()))


# Negative controls: each change of an English page is noticed by the view it names.
ENGLISH_TEXT = """# A step

See [the example](carry.md). The root is `√v`, 400 times.

argument | default
---|---
`eps` | 1e-8, or `None`

```python
def root(v):
    "The root."
    return v**0.5  # as usual
```
"""
CHINESE_TEXT = """<!-- en: # A step -->
# 一步更新

请看[示例](../carry.md)。根是 `√v`，共 400 次。

| 参数 | 默认值 |
|---|---|
| `eps` | 1e-8，或 `None` |

```python
def root(v):
    "平方根。"
    return v**0.5  # 照常
```
"""
CHANGES = [
    ("marks", "# A step", "# An update"),
    ("marks", "argument |", "## Defaults\n\nargument |"),
    ("levels", "# A step", "## A step"),
    ("code", "v**0.5", "v**0.25"),
    ("code", "```python", "```python\n```\n\n```python"),
    ("numbers and code in prose", "400", "500"),
    ("numbers and code in prose", "`√v`", "`√v + eps`"),
    ("tables", "1e-8", "1e-7"),
    ("tables", "`eps` | 1e-8, or `None`", "`eps`, `None` | 1e-8"),
    ("links and figures", "carry.md", "scale.md"),
    ("links and figures", "See", "See ![a figure](figures/levels.png),"),
]


@each_view
def test_a_translation_passes(view):
    of_english, of_chinese = VIEWS[view]
    english = of_english(DOCS / "page.md", ENGLISH_TEXT)
    assert of_chinese(DOCS / "zh" / "page.md", CHINESE_TEXT) == english


@pytest.mark.parametrize(("view", "old", "new"), CHANGES)
def test_a_change_of_the_english_page_is_noticed(view, old, new):
    of_english, of_chinese = VIEWS[view]
    changed = ENGLISH_TEXT.replace(old, new)
    assert changed != ENGLISH_TEXT
    english = of_english(DOCS / "page.md", changed)
    assert of_chinese(DOCS / "zh" / "page.md", CHINESE_TEXT) != english


@each_page
def test_a_changed_heading_of_the_real_page_is_noticed(page):
    text = ENGLISH[page].read_text()
    *_, last = HEADING.finditer(prose(text))
    changed = text.replace(f"\n{last[0]}\n", f"\n{last[0]} today\n")
    assert changed != text
    assert marks(page, page.read_text()) != headings(ENGLISH[page], changed)


HAN = r"[\u4e00-\u9fff]"


def plain(text):
    """Chinese prose in which code, formulas and links have become words."""
    return LINK.sub("]", SPAN.sub("`code`", MARK.sub("", prose(text)))).translate(
        str.maketrans("", "", "[]!")
    )


def untranslated(text):
    """Headings without Chinese that are not the name of something in the code."""
    name = re.compile(r"`[^`]+`|\w*_\w*")
    return [
        title
        for _, title in HEADING.findall(prose(text))
        if not re.search(HAN, title) and name.sub("", title).strip(" ,、()")
    ]


def narrow(text):
    """Half-width punctuation at Chinese, and Latin glued to it."""
    half = rf"{HAN}[,.:;?()]|[,:;?()]{HAN}"
    glued = rf"{HAN}[A-Za-z0-9`]|[A-Za-z0-9`]{HAN}"
    return re.findall(rf".{{,6}}(?:{half}|{glued}).{{,6}}", text)


def broken_emphasis(text):
    """CommonMark shows the asterisks of `**甲。**乙`, which `**甲**。乙` avoids."""
    text = text.replace("`code`", "`")
    found = re.finditer(r"(\w?)(\*\*?)([^*\n]+)\2(\w?)", text)
    return [
        match[0]
        for match in found
        if (match[1] and re.match(r"\W", match[3]))
        or (match[4] and re.search(r"\W$", match[3]))
    ]


def unseen_formulas(text):
    """GitHub takes `，$x$` for text: a formula begins after a space."""
    spans = SPAN.finditer(FENCE.sub("", text))
    before = [span.string[: span.start()][-1:] for span in spans if span[0][0] == "$"]
    return [char for char in before if char.strip()]


@each_page
def test_headings_are_translated(page):
    assert untranslated(page.read_text()) == []


@each_page
def test_punctuation_and_emphasis(page):
    text = plain(page.read_text())
    assert narrow(text) == []
    assert broken_emphasis(text) == []
    assert unseen_formulas(page.read_text()) == []


def test_bad_typography_is_noticed():
    assert untranslated("# Quick start\n# `eps`\n# 用法\n") == ["Quick start"]
    assert narrow("步长,学习率") == ["步长,学习率"]
    assert narrow("用 torch训练") == ["用 torch训练"]
    assert narrow("用 torch 训练，步长为 1。") == []
    assert broken_emphasis("**甲。**乙") == ["**甲。**乙"]
    assert broken_emphasis("**甲**。乙，**丙**") == []
    assert unseen_formulas("步长，$x$ 与 $y$") == ["，"]


@each_page
def test_the_two_languages_link_to_each_other_at_the_top(page):
    english = ENGLISH[page]
    for here, there in ((page, english), (english, page)):
        top = HEADING.split(prose(here.read_text()))[3]
        links = [(here.parent / link).resolve() for link in LINK.findall(top)]
        assert there in links


@each_page
def test_links_prefer_chinese_pages(page):
    links = LINK.findall(prose(page.read_text()))
    paths = [(page.parent / link).resolve() for link in links]
    assert [path for path in paths if path in CHINESE] == [ENGLISH[page]]
