"""Replace functions of Megatron that fail on a CPU, or are slow there."""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_wallfacer.megatron.replace import replace, wrap


def install() -> None:
    """Skip the warm-up of fused functions, start the checkpoint process by fork, and pass split sizes to gloo."""
    # initialize.py runs the fused functions twenty times on tensors [seq, micro_batch, ffn or hidden], so that
    # torch.compile compiles them before the first step. The CPU runtime compiles nothing.
    replace("megatron.training.initialize:_warmup_jit_function", lambda *_, **__: None)
    # Megatron starts a manager process for the first checkpoint by 'spawn', because CUDA does not support a fork. The
    # new process imports the script and Megatron, which takes 5 s per rank. Without CUDA a fork is safe.
    wrap(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
        lambda spawning: functools.partial(spawning, "fork"),
    )
    replace("megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu", _on_the_host)


def _on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return `tensor`, or its numpy array if `as_numpy` is True.

    Gloo does not accept tensors as split sizes. Megatron's own function (moe_utils.py) does not convert CPU tensors.
    """
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
