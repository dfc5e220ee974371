"""Trains like scripts/pretrain_gpt.py, but in the second step one value of rank 2 in layer 2 is NaN.

The variable TENSOR names the tensor: ``query``, ``key`` or ``value``.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention

MICRO_BATCHES = 2
forward = WallfacerCoreAttention.forward
calls = 0


def forward_with_nan(self: WallfacerCoreAttention, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any):
    """Attention of Megatron's layer, with a NaN from the second step on."""
    global calls
    calls += self.layer_number == 2
    given = {"query": query, "key": key, "value": value}
    if dist.get_rank() == 2 and self.layer_number == 2 and calls > MICRO_BATCHES:
        name = os.environ["TENSOR"]
        given[name] = given[name].clone()
        given[name][5, 0, 1, 3] = float("nan")
    return forward(self, *given.values(), *args, **kw)


WallfacerCoreAttention.forward = forward_with_nan
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
