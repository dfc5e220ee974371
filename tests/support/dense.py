"""Dense single-process attention, written from the definition, and the zig-zag split of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import isnan

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One attention problem over the whole sequence; tensors are made from the seed on any process.

    Documents begin and end at ``documents`` (0 and all tokens among them); ``cut`` is what is laid out zig-zag.
    """

    cp_size: int
    chunk: int = 2
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    causal: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0
    window: tuple[int, int] = (-1, -1)
    documents: tuple[int, ...] | None = None
    shard_mode: str = "sequence"
    v_head_dim: int | None = None
    sinks: bool = False
    softcap: float = 0.0

    @property
    def tokens(self) -> int:
        return 2 * self.cp_size * self.chunk

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout in bshd, drawn in fp64 and rounded to the dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.q_heads, self.kv_heads, self.kv_heads, self.q_heads)
        v_dim = self.v_head_dim or self.head_dim
        return tuple(
            torch.randn(self.batch, self.tokens, h, dim, generator=generator, dtype=torch.float64).to(self.dtype)
            for h, dim in zip(heads, (self.head_dim, self.head_dim, v_dim, v_dim), strict=True)
        )

    def sink_logits(self) -> Tensor | None:
        """One for each query head, if there are any."""
        return torch.linspace(-1.0, 2.0, self.q_heads, dtype=torch.float64) if self.sinks else None

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        """Chunks rank and 2P-1-rank of a bshd tensor; of each of its documents, if those are what is cut."""
        ends = self.documents if self.shard_mode == "per_document" and self.documents else (0, self.tokens)
        pieces = []
        for document in whole.split([end - start for start, end in pairwise(ends)], dim=1):
            chunks = document.chunk(2 * self.cp_size, dim=1)
            pieces += [chunks[rank], chunks[2 * self.cp_size - 1 - rank]]
        return torch.cat(pieces, dim=1).contiguous()

    def live(self) -> Tensor:
        """``[tokens, tokens]``, whether a query (row) sees a key."""
        position = torch.arange(self.tokens)
        apart = position - position.unsqueeze(-1)
        left, right = (self.tokens if side == -1 else side for side in self.window)
        live = (apart >= -left) & (apart <= (0 if self.causal else right))
        if self.documents is None:
            return live
        document = torch.bucketize(position, torch.tensor(self.documents[1:]), right=True)
        return live & (document == document.unsqueeze(-1)) & (document < len(self.documents) - 1)


def dense(problem: Problem) -> tuple[Tensor, ...]:
    """out, dq, dk, dv in fp64 bshd, by autograd through softmax; and the sinks' gradient, if there are sinks."""
    q, k, v, dout = (x.double() for x in problem.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    repeat = problem.q_heads // problem.kv_heads
    k_full, v_full = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k_full) * problem.head_dim**-0.5
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    live = problem.live()
    blind = ~live.any(-1, keepdim=True)
    scores = scores.masked_fill(~live & ~blind, float("-inf"))
    sinks = problem.sink_logits()
    if sinks is not None:
        column = sinks.requires_grad_().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : problem.tokens].masked_fill(blind, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v_full)
    out.backward(dout)
    return out.detach(), q.grad, k.grad, v.grad, *(() if sinks is None else (sinks.grad,))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest entry; infinite where there is a NaN, which compares with nothing.

    What has to be zero everywhere has to be just that.
    """
    if not want.any():
        return 0.0 if (got == 0).all() else float("inf")
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    return float("inf") if isnan(error) else error
