"""Fill the tables of the pages, which stand between `begin` and `end` comments.

python docs/tables                     all but the slow ones
python docs/tables --all               all
python docs/tables switches losses     these
python docs/tables --all --check       write nothing, and exit 1 if a page differs
"""

import argparse
import difflib
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(DOCS / "figures"), str(DOCS.parent / "benchmarks")]

# Importing a module registers its tables.
import dialect_tables  # noqa: E402, F401
import elsewhere  # noqa: E402, F401
import number_tables  # noqa: E402, F401
import port_tables  # noqa: E402, F401
import recipe_tables  # noqa: E402, F401
import record_tables  # noqa: E402, F401
import sources  # noqa: E402, F401
from generated import BLOCK, TABLES, filled  # noqa: E402

PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(TABLES))
    parser.add_argument("--all", action="store_true", help="the slow ones too")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    used = {name for text in texts.values() for _, name, *_ in BLOCK.findall(text)}
    if unknown := (used | set(args.names)) - TABLES.keys():
        parser.error(f"no function makes {', '.join(sorted(unknown))}")
    if unused := TABLES.keys() - used:
        parser.error(f"no page has {', '.join(sorted(unused))}")
    quick = [name for name, table in TABLES.items() if args.all or not table.slow]
    differs = False
    for page, old in texts.items():
        language = "zh" if page.parent.name == "zh" else "en"
        new = filled(old, language, args.names or quick)
        if new == old:
            continue
        differs = True
        path = str(page.relative_to(DOCS.parent))
        lines = old.splitlines(), new.splitlines()
        print("\n".join(difflib.unified_diff(*lines, path, path, "page", "computed")))
        if not args.check:
            page.write_text(new, encoding="utf-8")
    if args.check and differs:
        sys.exit("A page differs from what is computed: run python docs/tables")


if __name__ == "__main__":
    main()
