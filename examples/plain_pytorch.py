"""Attention without Megatron, compared with dense: ``torchrun --nproc-per-node 4 examples/plain_pytorch.py``."""

import torch
import torch.distributed as dist

from megatron_wallfacer.attention import attention
from megatron_wallfacer.schedule.grid import Grid


def shard(x: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    """Return the zig-zag shard of a rank: chunks r and 2P-1-r of 2P."""
    chunks = x.chunk(2 * size, dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim)


def main(rank: int, size: int) -> float:
    """Return the largest difference between this rank's output and dense attention, after a backward pass too."""
    torch.manual_seed(0)
    whole = torch.randn(3, 1, 1024, 8, 64, dtype=torch.float64)  # q, k, v: batch, tokens, heads, head dim
    q, k, v = shard(whole, 2, rank, size).requires_grad_()
    out = attention(q, k, v, plan=Grid(team=2, ring_outer=2), causal=True)  # [batch, tokens / 4, heads, head_dim]
    out.square().sum().backward()
    dense = torch.nn.functional.scaled_dot_product_attention(*whole.transpose(2, 3), is_causal=True).transpose(1, 2)
    return (out - shard(dense, 1, rank, size)).abs().max().item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    print(f"rank {rank}: largest difference from dense attention {main(rank, size):.1e}")
    dist.destroy_process_group()
