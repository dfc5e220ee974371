"""A Megatron script in the place of pretrain_gpt.py: some ranks change their own command line, or come late.

The variable DISAGREE is JSON: by rank, ``flags`` to add, ``without`` those to remove, ``sleep`` seconds before, and
``poll`` seconds in which the first rank waits for all.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

from megatron_wallfacer.engine.agreement import exchange

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"


def change(argv: list[str], own: dict) -> list[str]:
    """Return the arguments of a rank; each flag that is removed has one value."""
    for flag in own.get("without", ()):
        place = argv.index(flag)
        argv = argv[:place] + argv[place + 2 :]
    return argv + own.get("flags", [])


if __name__ == "__main__":
    mine = json.loads(os.environ["DISAGREE"]).get(os.environ["RANK"], {})
    time.sleep(mine.get("sleep", 0))
    # A difference ends the job without ranks that come later than this.
    exchange.POLL_S = mine.get("poll", exchange.POLL_S)
    sys.argv = change(sys.argv, mine)
    runpy.run_path(str(SCRIPT), run_name="__main__")
