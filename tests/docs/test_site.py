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
