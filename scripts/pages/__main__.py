"""The command: writes the generated blocks of the pages, or reports the pages whose blocks are stale."""

from __future__ import annotations

import argparse
import sys

from scripts.pages.blocks import PAGES, regenerated


def main() -> int:
    """Return the exit code: 1 where ``--check`` finds a stale page."""
    parser = argparse.ArgumentParser(prog="python -m scripts.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is stale")
    options = parser.parse_args()
    stale = {page: text for page in PAGES if (text := regenerated(page.read_text())) != page.read_text()}
    for page, text in stale.items():
        print(f"{page.name}: {'stale' if options.check else 'written'}")
        if not options.check:
            page.write_text(text)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
