"""docs/flags.md has every flag of the plugin, with the default that it has."""

from __future__ import annotations

import argparse
import re

from megatron_wallfacer.megatron.arguments import add_arguments
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "flags.md").read_text()
#: Flag by flag, the default as it is written: `text`, off for a switch, none where the parser has none.
ROWS = dict(re.findall(r"^\| `(--wallfacer-[a-z-]+)` \| ([^|]+?) \|", PAGE, flags=re.MULTILINE))


def written(default: object) -> str:
    if default is None:
        return "none"
    return "off" if default is False else f"`{default}`"


def test_the_table_is_complete_and_its_defaults_are_right() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    flags = {action.option_strings[0]: written(action.default) for action in parser._actions}
    assert {flag: re.split(r"[:;]", default)[0] for flag, default in ROWS.items()} == flags
