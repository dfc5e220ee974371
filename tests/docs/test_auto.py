"""The table of docs/choosing.md says what ``auto`` chooses."""

from __future__ import annotations

import re

from megatron_wallfacer.schedule.schemes import make_plan
from tests.docs.pages import ROOT

COLUMNS = (1024, 2048, 4096, 8192, 16384, 65536)


def test_the_table_is_what_auto_chooses() -> None:
    page = (ROOT / "docs/choosing.md").read_text()
    table = page.partition("| P | 1K tokens per rank |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = {int(cells[0]): cells[1:] for line in table for cells in [re.split(r" \| ", line.strip("| "))]}
    assert list(rows) == [2, 4, 8, 16, 32, 64, 128, 512]
    for cp_size, cells in rows.items():
        plans = [make_plan("auto", cp_size, q_heads=32, kv_heads=8, tokens=tokens) for tokens in COLUMNS]
        assert cells == [str(plan.grid).replace("ring_outer", "ring") for plan in plans], cp_size
