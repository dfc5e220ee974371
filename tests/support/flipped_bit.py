"""Trains like scripts/pretrain_gpt.py, but one bit of each message that rank 1 receives is flipped."""

import runpy
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_wallfacer.engine.transfers import BoundTransfer, Transfers

bind = Transfers.bind


def flipping(self: Transfers, number: int, transfer: Any, *args: Any) -> BoundTransfer:
    bound = bind(self, number, transfer, *args)

    def wait(operands: Any, works: Any) -> None:
        bound.wait(operands, works)
        if dist.get_rank() == 1:
            for message in transfer.receives:
                operands[message.operand][0] ^= 1

    return bound._replace(wait=wait)


Transfers.bind = flipping
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
