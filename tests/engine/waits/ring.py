"""One of three ranks of a ring that runs attention twice: python -m tests.engine.waits.ring FOLDER RANK."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_wallfacer.attention import attention
from megatron_wallfacer.engine.agreement.calls import CALLS
from megatron_wallfacer.schedule.schemes import make_plan


def main(folder: Path, rank: int) -> None:
    """Rank 0 sleeps before its second call until there is a file; rank 1 before its third, to be stopped there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    plan = make_plan("ring", 3)
    q = torch.randn(1, 4, 2, 8)
    for _ in range(CALLS):  # of these ranks compare the arguments, and wait for each other there
        attention(q, q, q, plan=plan, kernel="reference")
    for call in range(3):
        if (rank, call) == (0, 1):
            while not (folder / "go").exists():
                time.sleep(0.05)
        if (rank, call) == (1, 2):
            print("stopping", flush=True)
            time.sleep(600)
        attention(q, q, q, plan=plan, kernel="reference")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
