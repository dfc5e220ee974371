"""Trains like scripts/pretrain_gpt.py and at the end says what attention received, and what is still kept, as JSON."""

import json
import runpy
from pathlib import Path

from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.megatron.keep import _keepers

made: list[Transfers] = []
connect = Transfers.__init__


def noted(self: Transfers, groups: AxisGroups) -> None:
    connect(self, groups)
    made.append(self)


Transfers.__init__ = noted
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
received = sum(sum(transfers.received.values()) for transfers in made)
waiting = sum(len(keeper._kept) for keeper in _keepers)
print("counted", json.dumps({"received": received, "waiting": waiting}), flush=True)
