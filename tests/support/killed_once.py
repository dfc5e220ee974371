"""Trains like scripts/pretrain_gpt.py, but in torchrun's first attempt rank 1 is killed in its third step."""

from __future__ import annotations

import os
import runpy
import signal
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_pre_hook

FATAL_STEP = 3
steps = 0


def count(*_: object) -> None:
    """Called before each step of the optimizer."""
    global steps
    steps += 1
    if steps == FATAL_STEP:
        os.kill(os.getpid(), signal.SIGKILL)


if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    register_optimizer_step_pre_hook(count)
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
