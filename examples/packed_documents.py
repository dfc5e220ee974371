"""Packed documents with a window and sinks: ``torchrun --nproc-per-node 4 examples/packed_documents.py``."""

import torch
import torch.distributed as dist

from megatron_wallfacer.attention import attention
from megatron_wallfacer.schedule.grid import Grid

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 16
#: Three documents of one packed sequence. The sequence is split as a whole, wherever documents end.
CU_SEQLENS = (0, 40, 150, TOKENS)
#: Each query sees its own position and 31 before it, in its document.
WINDOW = (31, 0)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Return the same attention from the whole tensors, by the formula: ``[1, tokens, heads, head_dim]``."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    position = torch.arange(TOKENS)
    document = torch.bucketize(position, torch.tensor(CU_SEQLENS[1:]), right=True)
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance <= WINDOW[0]) & (document[:, None] == document)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
    sink = sinks[:, None, None].expand(1, HEADS, TOKENS, 1)
    scores = torch.cat([scores.masked_fill(~seen, -torch.inf), sink], dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1)[..., :-1], v)


def main(rank: int, size: int) -> float:
    """Return the largest difference between this rank's output and the formula."""
    torch.manual_seed(0)
    q = torch.randn(1, TOKENS, HEADS, HEAD_DIM, dtype=torch.float64)
    k, v = torch.randn(2, 1, TOKENS, KV_HEADS, HEAD_DIM, dtype=torch.float64)
    sinks = torch.randn(HEADS, dtype=torch.float64)

    def shard(x: torch.Tensor) -> torch.Tensor:
        chunks = x.chunk(2 * size, dim=1)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)

    out = attention(
        *map(shard, (q, k, v)),
        plan=Grid(ring_outer=size),
        window_size=WINDOW,
        cu_seqlens=CU_SEQLENS,
        sinks=sinks,
    )
    return (out - shard(dense(q, k, v, sinks))).abs().max().item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    print(f"rank {rank}: largest difference from the formula {main(rank, size):.1e}")
    dist.destroy_process_group()
