"""Dense single-process attention, written from the definition, and the zig-zag split of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One attention problem over the whole sequence; tensors are made from the seed on any process."""

    cp_size: int
    chunk: int = 2
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    causal: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def tokens(self) -> int:
        return 2 * self.cp_size * self.chunk

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout in bshd, drawn in fp64 and rounded to the dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.q_heads, self.kv_heads, self.kv_heads, self.q_heads)
        return tuple(
            torch.randn(self.batch, self.tokens, h, self.head_dim, generator=generator, dtype=torch.float64).to(
                self.dtype
            )
            for h in heads
        )

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        """Chunks rank and 2P-1-rank of a bshd tensor."""
        chunks = whole.chunk(2 * self.cp_size, dim=1)
        return torch.cat([chunks[rank], chunks[2 * self.cp_size - 1 - rank]], dim=1).contiguous()


def dense(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, dq, dk, dv in fp64 bshd, by autograd through softmax."""
    q, k, v, dout = (x.double() for x in problem.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    repeat = problem.q_heads // problem.kv_heads
    k_full, v_full = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k_full) * problem.head_dim**-0.5
    if problem.causal:
        scores = scores.masked_fill(torch.ones(problem.tokens, problem.tokens).triu(1).bool(), float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v_full)
    out.backward(dout)
    return out.detach(), q.grad, k.grad, v.grad


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest entry; infinite where there is a NaN, which compares with nothing."""
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    return float("inf") if isnan(error) else error
