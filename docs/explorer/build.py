"""Write the interactive explorer of RMSprop: one HTML page that needs no network.

    python docs/explorer/build.py

puts the pieces in this folder together, and ends with a line like

    explorer.html (71 kB, nothing to fetch): open it in a browser

Sliders for every argument of `rmsprop`, six surfaces, and torch, Keras and optax beside
it, in English and Chinese.
"""

import argparse
import json
import re
from html import escape
from pathlib import Path

PIECES = Path(__file__).parent


def piece(name: str) -> str:
    text = (PIECES / name).read_text(encoding="utf-8").strip()
    if name.endswith(".json"):
        # In a script element, "</script>" would end it.
        text = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
        text = text.replace("<", "\\u003c")
    return text


def page(*, home: str | None = None) -> str:
    """The page, its styles, labels and code within, and a link to `home` if given."""
    link = ""
    if home is not None:
        link = f'<a id="home" href="{escape(home)}" data-label="home"></a>'
    text = piece("template.html").replace("{{home}}", link)
    return re.sub(r"\{\{([\w.]+)\}\}", lambda found: piece(found[1]), text) + "\n"


def outside_references(html: str) -> list[str]:
    """The addresses that a browser would fetch."""
    fetched = r"""(?:src|href|action|srcset|data)\s*=\s*["']?(?!data:|#)[^\s"'>]+"""
    found = re.findall(rf"<[^>]*\s({fetched})", html)
    return found + re.findall(r"@import.*|url\(.*|\bfetch\(.*|\bimport\(.*", html)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default="explorer.html", help="file of the page"
    )
    output = parser.parse_args(argv).output
    html = page()
    if found := outside_references(html):
        raise SystemExit(f"expected nothing to fetch, got {found}: please report it")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(html, encoding="utf-8")
    size = output.stat().st_size / 1000
    print(f"{output} ({size:.0f} kB, nothing to fetch): open it in a browser")


if __name__ == "__main__":
    main()
