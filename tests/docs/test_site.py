"""The site builds without a warning, and what it leads to is there."""

import html
import re
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

import optax_rmsprop

pytest.importorskip("sphinx")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # building takes half a minute


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    recipe = (ROOT / "Makefile").read_text()
    options = re.search(r"python (-m sphinx --builder html .*) docs docs/", recipe)[1]
    command = [sys.executable, *options.split(), "docs", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """The targets of a page, and what it refers to."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        self.links.add(attrs.get("src" if tag in ("img", "script") else "href"))


def pages_of(site):
    return [path for path in site.rglob("*.html") if "_static" not in path.parts]


def test_every_link_of_the_site_leads_somewhere(site):
    pages = {path: Page(path.read_text()) for path in pages_of(site)}
    assert len(pages) > 18
    broken = []
    for path, page in pages.items():
        for link in page.links - {None, ""}:
            scheme, _, target, _, fragment = urllib.parse.urlsplit(link)
            if scheme:
                continue
            file = (path.parent / urllib.parse.unquote(target)) if target else path
            file = file.resolve()
            is_there = file.exists()
            if fragment and file in pages and file.name != "explore.html":
                is_there = urllib.parse.unquote(fragment) in pages[file].ids
            if not is_there:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


def test_the_site_needs_no_network(site):
    """Other sites are linked to, but nothing is fetched from them."""
    for path in pages_of(site):
        fetched = re.findall(
            r'<(?:img|script|iframe)[^>]+src="(https?:[^"]+)', path.read_text()
        )
        fetched += re.findall(r'<link[^>]+href="(https?:[^"]+)', path.read_text())
        assert not fetched, path
    for path in site.rglob("*.css"):
        fetched = re.findall(
            r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]+)", path.read_text()
        )
        assert not fetched, path


def test_the_buttons_of_a_phone_open_what_they_say(site, browser):
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": 390, "height": 844})
    for sidebar in ("primary", "secondary"):
        page.goto((site / "parameters.html").as_uri())
        page.click(f".{sidebar}-toggle:visible")
        opened = page.locator(f"#pst-{sidebar}-sidebar-modal[open]")
        expect(opened).to_be_visible()
    page.close()


# The least contrast of text with the ground behind it, and the text. What has the
# classes of an earlier text is passed over.
CONTRAST = """() => {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const numbers = (color) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].map((x) => x / 255);
  };
  const light = (rgb) => {
    const linear = (x) => (x > 0.04045 ? ((x + 0.055) / 1.055) ** 2.4 : x / 12.92);
    const [r, g, b] = rgb.map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const groundOf = (node) => {
    for (; node; node = node.parentElement) {
      const ground = numbers(getComputedStyle(node).backgroundColor);
      if (ground[3] === 1) return ground.slice(0, 3);
    }
  };
  const opacityOf = (node) =>
    node ? getComputedStyle(node).opacity * opacityOf(node.parentElement) : 1;
  let least = [21, ""];
  const seen = new Set();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    const text = texts.currentNode.data.trim();
    const kind = [node, node.parentElement, node.parentElement?.parentElement]
      .map((x) => `${x?.tagName}.${x?.className}`)
      .join();
    if (!text || seen.has(kind)) continue;
    if (!node.checkVisibility({ visibilityProperty: true })) continue;
    seen.add(kind);
    const ground = groundOf(node);
    const [r, g, b, a] = numbers(getComputedStyle(node).color);
    const alpha = a * opacityOf(node);
    const ink = [r, g, b].map((x, i) => alpha * x + (1 - alpha) * ground[i]);
    const [low, high] = [light(ink), light(ground)].sort((x, y) => x - y);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < least[0]) least = [contrast, text.slice(0, 40), kind];
  }
  return least;
}"""


def test_pages_run_without_errors_and_can_be_read(site, browser):
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append((page.url, str(error))))
    page.on(
        "console",
        lambda said: said.type == "error" and errors.append((page.url, said.text)),
    )
    source = "_modules/optax_rmsprop/optimizer.html"  # pages with sources are alike
    for path in pages_of(site):
        name = str(path.relative_to(site))
        if "_modules" in name and name != source:
            continue
        page.goto(path.as_uri())
        # The explorer has its own tests.
        for theme in ("light", "dark") if name != "explore.html" else ():
            page.evaluate(
                """(theme) => {
                  document.documentElement.dataset.theme = theme;
                  document.getAnimations().forEach((animation) => animation.finish());
                }""",
                theme,
            )
            contrast, *text = page.evaluate(CONTRAST)
            assert contrast >= 4.5, (name, theme, text)
    page.close()
    assert errors == []


def test_contents_mark_the_section_in_sight(site, browser):
    from playwright.sync_api import expect

    page = browser.new_page()
    page.goto((site / "parameters.html").as_uri())
    for link in page.locator("#pst-page-toc-nav a").all()[2:4]:
        section = page.locator(link.get_attribute("href"))
        section.evaluate("node => node.scrollIntoView()")
        expect(link).to_have_attribute("aria-current", "true")
    page.close()


def test_the_search_shows_words_of_the_article(site, browser):
    page = browser.new_page()
    page.goto((site / "search.html").as_uri())
    text = page.evaluate("Search.htmlToText", (site / "scale.html").read_text())
    assert text.split(maxsplit=1)[0] == "Scale"
    page.close()


def test_a_phone_shows_figures_whole_and_no_name_over_numbers(site, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((site / "dialects.html").as_uri())
    ends = "nodes => nodes.map((node) => node.getBoundingClientRect().right)"
    assert max(page.eval_on_selector_all("article img", ends)) <= 390
    covered = """cells => cells.map((cell) => {
      const parts = [cell, ...cell.querySelectorAll("*")];
      const [end, ...ends] = parts.map((x) => x.getBoundingClientRect().right);
      return [cell.textContent, Math.max(...ends) - end];
    }).filter(([name, over]) => over > 0)"""
    assert page.eval_on_selector_all("td:first-child", covered) == []
    page.close()


def test_chinese_pages_are_chinese_around_the_text(site):
    text = (site / "zh" / "parameters.html").read_text()
    assert 'lang="zh-CN"' in text
    around = text.partition('<article class="bd-article">')
    around = around[0] + around[2].partition("</article>")[2]
    for english in (
        "Contents",
        "Skip to",
        "Search",
        "Color mode",
        "previous",
        "Toggle",
    ):
        assert not re.search(rf'>\s*{english}|(?:title|label)="{english}', around)
    assert 'title="Link to this heading"' not in text


def test_docstrings_have_types_links_and_lists(site):
    text = (site / "api.html").read_text()
    assert "ArrayLike" in text
    assert "<blockquote>" not in text
    summary = text.partition("autosummary")[2].partition("</table>")[0]
    for name in ("rmsprop", "dialects.torch", "wrappers.compress_state"):
        assert f'href="#optax_rmsprop.{name}"' in summary
        assert f'href="#optax_rmsprop.{name}"' in text.partition(summary)[2]
    assert 'href="_modules/optax_rmsprop/optimizer.html#rmsprop"' in text


def test_the_explorer_is_beside_the_page_that_leads_to_it(site):
    assert (site / "explore.html").exists()
    links = Page((site / "explorer.html").read_text()).links - {None}
    assert any(link.startswith("explore.html") for link in links)


def test_alternative_texts_keep_their_words(site):
    for path in (ROOT / "docs").glob("*.md"):
        built = html.unescape((site / f"{path.stem}.html").read_text())
        for text in re.findall(r"!\[([^]]+)\]", path.read_text()):
            assert " ".join(text.split()) in built


def test_every_public_name_is_on_the_api_page(site):
    documented = Page((site / "api.html").read_text()).ids
    from_optax = {"trace", "add_decayed_weights"}
    # The names of a room are documented at the room's address. TorchRun is carry.Run.
    rooms = {"carry", "dialects", "identify", "wrappers", "torch_layers"}
    expected = set()
    core = set(optax_rmsprop.__all__) - from_optax - rooms - {"TorchRun"}
    for room in (getattr(optax_rmsprop, name) for name in rooms):
        expected |= {f"{room.__name__}.{name}" for name in room.__all__}
        core -= set(room.__all__)
    expected -= {
        f"optax_rmsprop.carry.{source}_layers" for source in ("torch", "keras")
    }
    expected |= {f"optax_rmsprop.{name}" for name in core}
    assert len(expected) > 40
    assert not expected - documented
    text = (ROOT / "docs" / "api.md").read_text()
    assert all(f"`optax_rmsprop.{name}`" in text for name in from_optax)


def test_the_gallery_has_every_example():
    text = (ROOT / "docs" / "gallery.md").read_text()
    commands = [
        path.stem
        for path in (ROOT / "examples").glob("*.py")
        if re.search(r"^def main\(", path.read_text(), re.M)
    ]
    shown = re.findall(r"^python examples/(\w+)\.py", text, re.M)
    assert set(commands) <= set(shown)
