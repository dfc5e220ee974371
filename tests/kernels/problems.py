"""Small attention problems in the layout of the kernels (sbhd), and their solution from the definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_wallfacer.schedule.mask import Band, Lengths

SCALE = 0.4


@dataclass(frozen=True)
class LocalProblem:
    """Query rows against key columns on one device."""

    rows: int = 12
    cols: int = 12
    batch: int = 2
    q_heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    v_head_dim: int = 8
    causal: bool = False
    dtype: torch.dtype = torch.float64
    band: Band | None = None
    softcap: float = 0.0
    #: Of several documents which follow one another; each sees itself alone.
    lengths: Lengths | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout, drawn in fp64 and rounded to the dtype."""
        generator = torch.Generator().manual_seed(0)
        shapes = [
            (self.rows, self.batch, self.q_heads, self.head_dim),
            (self.cols, self.batch, self.kv_heads, self.head_dim),
            (self.cols, self.batch, self.kv_heads, self.v_head_dim),
            (self.rows, self.batch, self.q_heads, self.v_head_dim),
        ]
        return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype) for shape in shapes)

    def solution(self) -> dict[str, Tensor]:
        """out, lse, dq, dk, dv in fp64 by autograd through the definition."""
        q, k, v, dout = (x.double() for x in self.tensors())
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        group = self.q_heads // self.kv_heads
        scores = SCALE * torch.einsum("qbhd,kbhd->qbhk", q, k.repeat_interleave(group, dim=2))
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~self._seen()[:, None, None, :], float("-inf"))
        out = torch.einsum("qbhk,kbhd->qbhd", scores.softmax(-1), v.repeat_interleave(group, dim=2))
        out.backward(dout)
        lse = scores.exp().sum(-1).log()
        return {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}

    def _seen(self) -> torch.Tensor:
        if self.lengths is not None:
            blocks = [torch.ones(shape, dtype=torch.bool) for shape in zip(*self.lengths, strict=True)]
            return torch.block_diag(*(block.tril() if self.causal else block for block in blocks)).bool()
        apart = torch.arange(self.cols) - torch.arange(self.rows).unsqueeze(-1)
        seen = torch.ones_like(apart, dtype=torch.bool) if not self.causal else apart <= 0
        if self.band is not None and self.band.lower is not None:
            seen &= apart >= self.band.lower
        if self.band is not None and self.band.upper is not None:
            seen &= apart <= self.band.upper
        return seen

    def solved_by(self, kernel: object) -> dict[str, Tensor]:
        """The same by a kernel."""
        q, k, v, dout = self.tensors()
        options = {"causal": self.causal, "scale": SCALE}
        options |= {"band": self.band} if self.band else {}
        options |= {"softcap": self.softcap} if self.softcap else {}
        options |= {"lengths": self.lengths} if self.lengths else {}
        out, lse = kernel.forward(q, k, v, **options)
        grads = kernel.backward(dout, q, k, v, out, lse, **options)
        return {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def packed(rows: tuple[int, ...], cols: tuple[int, ...] | None = None, **fields: object) -> LocalProblem:
    """Documents of these lengths; without ``cols`` as many columns as rows, seen to the diagonal."""
    lengths = Lengths(rows, rows if cols is None else cols)
    sizes = (sum(side) for side in lengths)
    return LocalProblem(*sizes, batch=1, causal=cols is None, lengths=lengths, **fields)


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest difference of any tensor over its largest entry."""
    return max(((got[name].double() - want[name]).abs().max() / want[name].abs().max()).item() for name in want)
