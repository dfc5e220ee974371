"""Dense attention and its gradients in fp64, written from the formulas.

Without autograd: its engine rejects to work in the forks of a process that has used it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Problem:
    """One attention problem over the whole sequence, and its answer; bshd, fp64, batch 1, causal."""

    inputs: dict[str, Tensor]
    answers: dict[str, Tensor]


def make_problem(tokens: int, heads: int, kv_heads: int, head_dim: int, seed: int = 0) -> Problem:
    """Random q, k, v, dout, the same in every process, with out, dq, dk, dv."""
    generator = torch.Generator().manual_seed(seed)
    widths = {"q": heads, "k": kv_heads, "v": kv_heads, "dout": heads}
    # Rounded to fp32 first, so that a run in fp32 starts from the same numbers.
    inputs = {
        name: torch.randn(1, tokens, width, head_dim, generator=generator).double() for name, width in widths.items()
    }
    return Problem(inputs, dict(zip(NAMES, _dense(**inputs), strict=True)))


def _dense(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    (_, tokens, heads, head_dim), kv_heads = q.shape, k.shape[2]
    q, dout = (x[0].transpose(0, 1) for x in (q, dout))
    k, v = (x[0].transpose(0, 1).repeat_interleave(heads // kv_heads, 0) for x in (k, v))
    scale = head_dim**-0.5
    above = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = (q @ k.transpose(1, 2) * scale).masked_fill(above, float("-inf")).softmax(-1)
    out = weights @ v
    dweights = dout @ v.transpose(1, 2)
    dscores = weights * (dweights - (dout * out).sum(-1, keepdim=True)) * scale
    dq, dk, dv = dscores @ k, dscores.transpose(1, 2) @ q, weights.transpose(1, 2) @ dout
    dk, dv = (x.unflatten(0, (kv_heads, -1)).sum(1) for x in (dk, dv))
    return tuple(x.transpose(0, 1).unsqueeze(0) for x in (out, dq, dk, dv))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest entry."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()
