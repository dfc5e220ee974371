"""Context parallelism of other projects on a GPU, unmodified, and the plugin's: bshd, causal, zig-zag shards."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.ranks import Ranks
from benchmarks.gpu.report import device_of, kernel_of
from benchmarks.gpu.rows import LeftOut
from benchmarks.peers.loading import PeerMissing
from benchmarks.peers.ring_flash import RingFlashAttention
from megatron_wallfacer.attention import attention
from megatron_wallfacer.schedule.schemes import make_plan

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Maker = Callable[[argparse.Namespace, Ranks], Attend]


def _ours(scheme: str) -> Maker:
    def make(options: argparse.Namespace, ranks: Ranks) -> Attend:
        plan_for = cache(partial(make_plan, scheme, ranks.size, q_heads=options.heads[0], kv_heads=options.heads[1]))
        # A scheme that does not fit fails here, before anything is timed.
        plan_for()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            plan = plan_for(tokens=q.shape[1])
            return attention(q, k, v, plan=plan, kernel=options.kernel, transfers=ranks.transfers)

        return attend

    return make


def _transformer_engine(comm_type: str) -> Maker:
    def make(options: argparse.Namespace, ranks: Ranks) -> Attend:
        on_gpu = device_of(options).type == "cuda"
        groups = _groups(comm_type, ranks)
        q_heads, kv_heads = options.heads
        module = _module(options)(
            q_heads, options.head_dim, num_gqa_groups=kv_heads, qkv_format="bshd", attn_mask_type="causal"
        )
        stream = torch.cuda.Stream() if on_gpu else None
        module.set_context_parallel_group(groups, list(range(ranks.size)), stream, comm_type)
        return lambda q, k, v: module(q, k, v).view(q.shape)

    return make


def _module(options: argparse.Namespace) -> type:
    """TransformerEngine's attention; its stand-in in a smoke run on a CPU.

    Raises:
        LeftOut: it is not installed, or there is no GPU.
    """
    if device_of(options).type != "cuda":
        if options.smoke:
            from benchmarks.gpu.stand_ins import DotProductAttention

            return DotProductAttention
        raise LeftOut("TransformerEngine needs a GPU")
    try:
        from transformer_engine.pytorch import DotProductAttention
    except ImportError as error:
        raise LeftOut(f"transformer_engine: {error}") from None
    return DotProductAttention


def _groups(comm_type: str, ranks: Ranks) -> dist.ProcessGroup | list[dist.ProcessGroup]:
    """What TransformerEngine takes: one group; of ``a2a+p2p`` that of all-to-all and that of the ring.

    Raises:
        LeftOut: there are too few ranks for two levels.
    """
    if comm_type != "a2a+p2p":
        return dist.group.WORLD
    if ranks.size < 4:
        raise LeftOut(f"{ranks.size} ranks are one level")
    pairs = [range(first, first + 2) for first in range(0, ranks.size, 2)]
    rings = [range(first, ranks.size, 2) for first in range(2)]
    made = [(members, dist.new_group(list(members))) for members in (*pairs, *rings)]
    return [group for members, group in made if ranks.rank in members]


def _ring_flash(options: argparse.Namespace, ranks: Ranks) -> Attend:
    peer = RingFlashAttention()
    try:
        peer.prepare()
    except PeerMissing as error:
        raise LeftOut(str(error)) from None
    kernel = kernel_of(options, device_of(options), getattr(torch, options.dtype))
    return lambda q, k, v: peer.attend(q, k, v, kernel)


#: By name, in the order of a table.
CONTENDERS: dict[str, Maker] = {
    "auto": _ours("auto"),
    "te p2p": _transformer_engine("p2p"),
    "te a2a": _transformer_engine("a2a"),
    "te all_gather": _transformer_engine("all_gather"),
    "te a2a+p2p": _transformer_engine("a2a+p2p"),
    "ring-flash-attn zigzag": _ring_flash,
    "ring": _ours("ring"),
    "wallfacer": _ours("wallfacer"),
}
