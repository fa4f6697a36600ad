"""Sphinx makes the site of these pages: `make docs`."""

import importlib
import importlib.metadata
import inspect
import os
import re
import runpy
import textwrap
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

project = "optax_rmsprop"
release = importlib.metadata.version("optax_rmsprop")
html_title = f"{project} {release}"
html_theme = "sphinx_book_theme"
# Links to edit a page would need the address of a repository.
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
html_js_files = [("site.js", {"defer": "defer"})]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "explorer"]
default_role = "code"
add_function_parentheses = False
suppress_warnings = ["ref.python"]  # a name in two rooms leads to one of them
autodoc_typehints = "none"  # `types_as_written` adds them
autodoc_member_order = "bysource"
maximum_signature_line_length = 68
python_use_unqualified_type_names = True
autosummary_generate = False
napoleon_use_ivar = True  # attributes as a list, with their types
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
# What is typed, without prompts and what is printed. Formulas are not to be run.
copybutton_selector = "div:not(.highlight-text) > div.highlight > pre"
copybutton_exclude = ".linenos, .gp, .go"

# `INTERSPHINX=1 make html` links names of other packages to their documentation. Their
# lists of names come from the network, which a build does not need otherwise.
if os.environ.get("INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
intersphinx_mapping = {
    "flax": ("https://flax.readthedocs.io/en/latest/", None),
    "jax": ("https://docs.jax.dev/en/latest/", None),
    "optax": ("https://optax.readthedocs.io/en/latest/", None),
    "torch": ("https://docs.pytorch.org/docs/stable/", None),
}

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|References):$", re.M)
# What the theme says around a page.
CHINESE = {
    "Back to top": "回到顶部",
    "Color mode": "颜色模式",
    "Contents": "目录",
    "Dark": "深色",
    "Light": "浅色",
    "Link to this heading": "此标题的链接",
    "Search": "搜索",
    "Skip to main content": "跳到正文",
    "System Settings": "跟随系统",
    "Toggle primary sidebar": "显示或隐藏导航栏",
    "Toggle secondary sidebar": "显示或隐藏目录",
    "next": "下一页",
    "next page": "下一页",
    "previous": "上一页",
    "previous page": "上一页",
}


def list_names(app, docname, source):
    """Begin the API page with a table of the names that it documents."""
    if docname != "api":
        return
    names, module = [], ""
    directive = r"^\.\. (currentmodule|automodule|autofunction|autoclass):: (\S+)"
    for kind, name in re.findall(directive, source[0], re.M):
        if kind == "currentmodule":
            module = name
        elif kind == "automodule":
            names += [f"{name}.{x}" for x in importlib.import_module(name).__all__]
        else:
            names.append(f"{module}.{name}")
    lines = "\n".join(f"   {name.removeprefix(f'{project}.')}" for name in names)
    table = (
        f".. currentmodule:: {project}\n.. autosummary::\n   :nosignatures:\n\n{lines}"
    )
    source[0] = source[0].replace("<!-- names -->", f"```{{eval-rst}}\n{table}\n```")


def types_as_written(app, what, name, obj, options, signature, returns):
    """Show types by their names in the source: ArrayLike is a union of nine."""
    if what not in ("function", "method"):
        return None
    written = r"def \w+\((?:self,?\s*)?(.*?)\)(?: -> ([^:]+))?:\n"
    arguments, returns = re.search(written, inspect.getsource(obj), re.S).groups()
    return f"({' '.join(arguments.split())})", returns


def to_restructured_text(app, what, name, obj, options, lines):
    """Keep what docstrings set off, formulas and tables, as it stands."""
    kept, within = [], False
    for paragraph in "\n".join(lines).split("\n\n"):
        within = within or bool(SECTION.search(paragraph))
        if not within and (paragraph.startswith("    ") or "---|---" in paragraph):
            block = textwrap.indent(textwrap.dedent(paragraph), "    ")
            paragraph = f".. code-block:: text\n\n{block}"
        else:
            paragraph = NAME.sub(linked, with_list(paragraph))
            paragraph = paragraph.replace("|g|", r"\|g\|")  # no substitution
        kept += [*paragraph.split("\n"), ""]
    lines[:] = kept


def with_list(paragraph):
    """A list needs an empty line before it, and no indentation."""
    if not (first := re.search(r"^  1\. ", paragraph, re.M)):
        return paragraph
    text, items = paragraph[: first.start()], paragraph[first.start() :]
    return f"{text}\n{textwrap.dedent(items)}"


NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`")


def linked(found):
    """A reference, which stays code where the site documents no such object.

    The dot in front finds an object by the end of its address. The roles find no
    attributes, whose names are also those of arguments.
    """
    is_class = found[1].rpartition(".")[2][0].isupper()
    return f":py:{'class' if is_class else 'func'}:`.{found[1]}`"


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


def fit_phones(app, pagename, templatename, context, doctree):
    """Link figures, which are small there, and keep the numbers of a call whole."""
    if "body" in context:
        image = r'<img [^>]*src="([^"]+)"[^>]*>'
        number = r"(?<=[(=])\d[\d.]*(?:e-\d+)?(?![^<]*>)"
        body = re.sub(image, r'<a href="\1">\g<0></a>', context["body"])
        context["body"] = re.sub(number, r'<span class="number">\g<0></span>', body)


def speak_chinese(app, pagename, templatename, context, doctree):
    """Name the language, by which browsers choose fonts, and use it around the page.

    The theme translates a whole site, not some of its pages.
    """
    if not pagename.startswith("zh/"):
        return

    def say(text):
        return CHINESE.get(text, text)

    context |= {"language": "zh-CN", "gettext": say, "translate": say}
    context["theme_search_bar_text"] = say("Search")
    permalink = "Link to this heading"
    context["body"] = context["body"].replace(permalink, say(permalink))


def setup(app):
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)
    app.connect("autodoc-process-signature", types_as_written)
    app.connect("source-read", list_names)
    app.connect("source-read", join_alternative_texts)
    app.connect("html-page-context", fit_phones)
    app.connect("html-page-context", speak_chinese, priority=600)  # after the theme
    app.connect("build-finished", write_explorer)
    # MathML needs no script, and so no network.
    renderers = (inline_math, None), (display_math, None)
    app.add_html_math_renderer("mathml", *renderers)
