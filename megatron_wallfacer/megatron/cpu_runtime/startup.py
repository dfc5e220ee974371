"""Waiting that has no purpose without CUDA."""

from __future__ import annotations

import functools
from typing import Any

from megatron_wallfacer.megatron.replace import replace, wrap


def install() -> None:
    """Leave it out."""
    # initialize.py runs the fused functions twenty times on tensors of [seq, micro_batch, ffn or hidden] so that
    # torch.compile has done its work before the first step. Nothing is compiled here.
    replace("megatron.training.initialize._warmup_jit_function", _skip)
    # The first checkpoint starts a small manager process by 'spawn', which imports the script and with it all of
    # Megatron: five seconds a rank. 'spawn' because CUDA does not survive a fork; Megatron's own asynchronous writer,
    # too, asks this function for 'fork' (training/async_utils.py).
    wrap(
        "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
        lambda spawning: functools.partial(spawning, "fork"),
    )


def _skip(*_: Any, **__: Any) -> None:
    """Do nothing."""
