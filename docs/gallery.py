"""Run every command of gallery.md, and put its last line and its CPU time there.

python docs/gallery.py                 all of them, one after another
python docs/gallery.py digits sweep    those of examples/digits.py and sweep.py
"""

import argparse
import re
import resource
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("gallery.md")
# A command, and what it was seen to do.
ENTRY = re.compile(
    r"```sh\npython (examples/(\w+)\.py.*)\n```\n\n```text\n.*\n```\n\n.*"
)


def cpu_seconds():
    """All processes started here that have ended. Other work lengthens it less."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(match, names):
    arguments, name = match.groups()
    if names and name not in names:
        return match[0]
    start = cpu_seconds()
    command = [sys.executable, *arguments.split()]
    done = subprocess.run(
        command, cwd=PAGE.parent.parent, check=True, stdout=subprocess.PIPE, text=True
    )
    seconds = cpu_seconds() - start
    last = done.stdout.rstrip("\n").rsplit("\n", 1)[-1]
    print(f"{name}: {last} ({seconds:.0f} s)", flush=True)
    block = f"```sh\npython {arguments}\n```\n\n```text\n{last}\n```\n\n"
    return f"{block}{seconds:.0f} seconds of CPU time."


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of examples; all of them by default")
    names = parser.parse_args().names
    text = PAGE.read_text()
    known = [match[2] for match in ENTRY.finditer(text)]
    if unknown := set(names) - set(known):
        parser.error(f"{', '.join(unknown)}: not in gallery.md, which has {known}")
    for match in list(ENTRY.finditer(text)):
        text = text.replace(match[0], run(match, names))
        PAGE.write_text(text)  # after each, so that a run cut short leaves what it saw


if __name__ == "__main__":
    main()
