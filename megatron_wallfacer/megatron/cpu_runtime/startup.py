"""Skip slow steps of Megatron's start that have no effect without CUDA."""

from __future__ import annotations

import functools

from megatron_wallfacer.megatron.replace import replace, wrap


def install() -> None:
    """Replace the warm-up of fused functions, and start Megatron's checkpoint process by fork."""
    # initialize.py runs the fused functions twenty times on tensors [seq, micro_batch, ffn or hidden], so that
    # torch.compile compiles them before the first step. The CPU runtime compiles nothing.
    replace("megatron.training.initialize._warmup_jit_function", lambda *_, **__: None)
    # Megatron starts a manager process for the first checkpoint by 'spawn', because CUDA does not support a fork. The
    # new process imports the script and Megatron, which takes 5 s per rank. Without CUDA a fork is safe.
    wrap(
        "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
        lambda spawning: functools.partial(spawning, "fork"),
    )
