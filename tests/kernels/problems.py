"""Small attention problems in the layout of the kernels (sbhd), and their solution from the definition."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel
from megatron_wallfacer.schedule.attn_tile import AttnTile, CuSeqlens, TileWindow

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
    window: TileWindow | None = None
    softcap: float = 0.0
    #: Boundaries of several documents; each sees itself alone.
    cu_seqlens: CuSeqlens | None = None

    @property
    def call(self) -> tuple[AttnTile, AttnSpec]:
        """Tile and spec of the kernel call."""
        tile = AttnTile((0, self.rows), (0, self.cols), self.causal, self.window, self.cu_seqlens)
        return tile, AttnSpec(SCALE, self.softcap)

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
        if self.cu_seqlens is not None:
            lengths = (torch.tensor(side).diff().tolist() for side in (self.cu_seqlens.q, self.cu_seqlens.k))
            blocks = [torch.ones(shape, dtype=torch.bool) for shape in zip(*lengths, strict=True)]
            return torch.block_diag(*(block.tril() if self.causal else block for block in blocks)).bool()
        apart = torch.arange(self.cols) - torch.arange(self.rows).unsqueeze(-1)
        seen = torch.ones_like(apart, dtype=torch.bool) if not self.causal else apart <= 0
        if self.window is not None and self.window.left is not None:
            seen &= apart >= -self.window.left
        if self.window is not None and self.window.right is not None:
            seen &= apart <= self.window.right
        return seen

    def solved_by(self, kernel: Kernel) -> dict[str, Tensor]:
        """The same by a kernel."""
        q, k, v, dout = self.tensors()
        out, lse = kernel.forward(q, k, v, *self.call)
        grads = kernel.backward(dout, q, k, v, out, lse, *self.call)
        return {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def packed(rows: tuple[int, ...], cols: tuple[int, ...] | None = None, **fields: object) -> LocalProblem:
    """Documents of these lengths; without ``cols`` as many columns as rows, seen to the diagonal."""
    q, k = (tuple(accumulate(side, initial=0)) for side in (rows, rows if cols is None else cols))
    return LocalProblem(q[-1], k[-1], batch=1, causal=cols is None, cu_seqlens=CuSeqlens(q, k), **fields)


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest difference of any tensor over its largest entry."""
    return max(((got[name].double() - want[name]).abs().max() / want[name].abs().max()).item() for name in want)
