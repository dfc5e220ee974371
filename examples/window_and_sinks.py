"""A sliding window with sinks, with gradients: ``torchrun --nproc-per-node 4 examples/window_and_sinks.py``.

Each rank receives the chunks in its window from their origin ranks; blocks do not go around a ring.
"""

import torch
import torch.distributed as dist

from megatron_wallfacer.attention import attention
from megatron_wallfacer.schedule.grid import Grid

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 16
#: Each query sees its own position and 31 before it.
WINDOW = (31, 0)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Return the same attention from the whole tensors, by the formula: ``[1, tokens, heads, head_dim]``."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
    scores = scores.masked_fill((distance < 0) | (distance > WINDOW[0]), -torch.inf)
    # A sink is one more logit per head, whose value is zero.
    sink = sinks[:, None, None].expand(1, HEADS, TOKENS, 1)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def main(rank: int, size: int) -> float:
    """Return the largest difference from the formula: of this rank's output, and of the gradients of q and sinks."""
    torch.manual_seed(0)
    q = torch.randn(1, TOKENS, HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 1, TOKENS, KV_HEADS, HEAD_DIM, dtype=torch.float64)
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)

    def shard(x: torch.Tensor) -> torch.Tensor:
        chunks = x.chunk(2 * size, dim=1)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)

    local_q, local_sinks = (x.detach().clone().requires_grad_() for x in (shard(q), sinks))
    out = attention(local_q, shard(k), shard(v), plan=Grid(ring_outer=size), window_size=WINDOW, sinks=local_sinks)
    out.square().sum().backward()
    # The gradient of the sinks covers this rank's rows only.
    dist.all_reduce(local_sinks.grad)

    whole = dense(q, k, v, sinks)
    whole.square().sum().backward()
    pairs = [(out, shard(whole)), (local_q.grad, shard(q.grad)), (local_sinks.grad, sinks.grad)]
    return max((got - want).abs().max().item() for got, want in pairs)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    print(f"rank {rank}: largest difference from the formula {main(rank, size):.1e}")
    dist.destroy_process_group()
