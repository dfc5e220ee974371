"""Packed documents of one sequence: ``torchrun --nproc-per-node 4 examples/packed_documents.py``."""

import torch
import torch.distributed as dist

from megatron_wallfacer.attention import attention
from megatron_wallfacer.schedule.grid import Grid

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 16
#: Three documents of one packed sequence. The sequence is split as a whole, wherever documents end.
CU_SEQLENS = (0, 40, 150, TOKENS)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the same attention from the whole tensors, by the formula: ``[1, tokens, heads, head_dim]``."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    position = torch.arange(TOKENS)
    document = torch.bucketize(position, torch.tensor(CU_SEQLENS[1:]), right=True)
    seen = (position[:, None] >= position) & (document[:, None] == document)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def main(rank: int, size: int) -> float:
    """Return the largest difference between this rank's output and the formula."""
    torch.manual_seed(0)
    q = torch.randn(1, TOKENS, HEADS, HEAD_DIM, dtype=torch.float64)
    k, v = torch.randn(2, 1, TOKENS, KV_HEADS, HEAD_DIM, dtype=torch.float64)

    def shard(x: torch.Tensor) -> torch.Tensor:
        chunks = x.chunk(2 * size, dim=1)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)

    out = attention(*map(shard, (q, k, v)), plan=Grid(ring_outer=size), cu_seqlens=CU_SEQLENS)
    return (out - shard(dense(q, k, v))).abs().max().item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    print(f"rank {rank}: largest difference from the formula {main(rank, size):.1e}")
    dist.destroy_process_group()
