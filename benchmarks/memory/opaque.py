"""Fused kernels of a training step as functions without values: inputs saved, results made, nothing else allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_wallfacer.engine.autograd import Finished, attend, finish
from megatron_wallfacer.engine.call import Call

Mark = Callable[[str], None]


class FusedNorm(nn.Module):
    """RMSNorm that saves its input.

    Attributes:
        before: moment that begins when its backward pass has run, or None.
    """

    before: str | None = None
    mark: Mark = print

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: FusedNorm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        gradients = torch.empty_like(x), torch.empty_like(weight), None
        if ctx.norm.before is not None:
            FusedNorm.mark(ctx.norm.before)
        return gradients


class Rotary(torch.autograd.Function):
    """Rotary positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return torch.empty_like(dout, memory_format=torch.contiguous_format)


class SwiGlu(torch.autograd.Function):
    """SwiGLU that saves its input."""

    mark: Mark = print

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        SwiGlu.mark("mlp")
        return torch.empty_like(ctx.saved_tensors[0])


class EngineAttention(nn.Module):
    """The engine's attention of one rank, whose kernels and messages do nothing.

    Args:
        call: plan, transfers and kernel.
        keep: keep the output where the layer is recomputed.
    """

    mark: Mark = print

    def __init__(self, call: Call, *, keep: bool) -> None:
        super().__init__()
        self._call, self._keep = call, keep
        self._kept: list[Finished] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        EngineAttention.mark("forward")
        finished = None
        if self._keep and not torch.is_grad_enabled():
            finished = finish(q, k, v, self._call)
            self._kept.append(finished)
        elif self._keep:
            finished = self._kept.pop(0)
        out = attend(q, k, v, self._call, finished)
        if out.requires_grad:
            out.register_hook(lambda _: EngineAttention.mark("attention"))
            q.register_hook(lambda _: EngineAttention.mark("projection"))
        EngineAttention.mark("")
        return out.flatten(2)
