"""Trains like scripts/pretrain_gpt.py, but in torchrun's first attempt rank 1 is killed in its third step.

PLACE names where: before the ``optimizer`` steps, which is the default, or in the ``attention`` of layer 2.
"""

from __future__ import annotations

import os
import runpy
import signal
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention

FATAL_STEP = 3
PLACE = os.environ.get("PLACE", "optimizer")
steps = 0


def count(*_: object) -> None:
    """Called before each step of the optimizer."""
    global steps
    steps += 1
    if steps == FATAL_STEP and PLACE == "optimizer":
        os.kill(os.getpid(), signal.SIGKILL)


def forward(self: WallfacerCoreAttention, *args: Any, **kwargs: Any) -> Tensor:
    """Called in place of a layer's attention."""
    if steps == FATAL_STEP - 1 and self.layer_number == 2 and PLACE == "attention":
        os.kill(os.getpid(), signal.SIGKILL)
    return attention(self, *args, **kwargs)


if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    register_optimizer_step_pre_hook(count)
    attention, WallfacerCoreAttention.forward = WallfacerCoreAttention.forward, forward
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
