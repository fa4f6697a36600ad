"""Sphinx makes the site of these pages: `make docs`."""

import importlib.metadata
import re
import runpy
import textwrap
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

project = "optax_rmsprop"
release = importlib.metadata.version("optax_rmsprop")
html_title = "optax_rmsprop"
html_theme = "sphinx_book_theme"
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "footer_content_items": "last-updated.html",
}
html_static_path = ["_static"]
html_context = {"default_mode": "auto"}
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "explorer"]
default_role = "code"
autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
napoleon_attr_annotations = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|References):$", re.M)


def to_restructured_text(app, what, name, obj, options, lines):
    """Keep what docstrings set off, formulas and tables, as it stands."""
    kept, within = [], False
    for paragraph in "\n".join(lines).split("\n\n"):
        within = within or bool(SECTION.search(paragraph))
        if not within and (paragraph.startswith("    ") or "---|---" in paragraph):
            block = textwrap.indent(textwrap.dedent(paragraph), "    ")
            paragraph = f".. code-block:: text\n\n{block}"
        else:
            # A list needs an empty line before it, and |g| is no substitution.
            paragraph = paragraph.replace(":\n  1. ", ":\n\n  1. ")
            paragraph = paragraph.replace("|g|", r"\|g\|")
        kept += [*paragraph.split("\n"), ""]
    lines[:] = kept


def mathml(formula, **options):
    """The formula, with bars as close to what they enclose as parentheses are."""
    bar = '<mo stretchy="false"{}>&#x0007C;</mo>'.format
    close = bar(' lspace="0" rspace="0"')
    return convert(formula, **options).replace(bar(""), close)


def inline_math(translator, node):
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def display_math(translator, node):
    translator.body.append(mathml(node.astext(), display="block"))
    raise nodes.SkipNode


def join_alternative_texts(app, name, source):
    """Keep the space where the text of a figure goes on in the next line."""
    one_line = lambda match: match[0].replace("\n", " ")  # noqa: E731
    source[0] = re.sub(r"!\[[^]]*\]", one_line, source[0])


def write_explorer(app, error):
    """Put the explorer, which is a page by itself, beside the others."""
    if app.builder.name == "html" and not error:
        explorer = runpy.run_path(str(Path(__file__).parent / "explorer" / "build.py"))
        Path(app.outdir, "explore.html").write_text(
            explorer["page"](home="index.html"), "utf-8"
        )


def speak_chinese(app, pagename, templatename, context, doctree):
    """Name the language, by which browsers choose fonts."""
    if pagename.startswith("zh/"):
        context["language"] = "zh-CN"


def setup(app):
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)
    app.connect("source-read", join_alternative_texts)
    app.connect("html-page-context", speak_chinese)
    app.connect("build-finished", write_explorer)
    # MathML needs no script, and so no network.
    renderers = (inline_math, None), (display_math, None)
    app.add_html_math_renderer("mathml", *renderers)
