"""Fused kernels of a training step: they save inputs and make results, and nothing else of them is counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.memory.live import LiveBytes
from megatron_wallfacer.engine.autograd import ForwardResult, attend, run_forward
from megatron_wallfacer.engine.call import Call
from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel
from megatron_wallfacer.schedule.attn_tile import AttnTile

_counting: list[LiveBytes] = []


def count_with(live: LiveBytes) -> None:
    """Set the counter whose moment these functions set, and which they pause where a kernel would not allocate."""
    _counting[:] = [live]


def mark(moment: str) -> None:
    """Begin a moment of the step."""
    for live in _counting:
        live.moment = moment


def uncounted() -> AbstractContextManager[None]:
    """Return a context in which nothing is counted."""
    return _counting[0].paused() if _counting else nullcontext()


def result(value: Tensor) -> Tensor:
    """Return a counted copy of a value that was computed uncounted."""
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    with uncounted():
        return out.copy_(value)


class Fused(torch.autograd.Function):
    """A function of tensors as one kernel forward and one backward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], moment: str | None, linear: bool, *inputs: Tensor) -> Tensor:
        """Return the function's value.

        Args:
            function: of the inputs.
            moment: moment that begins with its backward pass, or None.
            linear: backward needs no inputs, so none are saved.
            inputs: tensors, all differentiated.
        """
        ctx.function, ctx.moment = function, moment
        ctx.shapes = [(x.shape, x.dtype) for x in inputs] if linear else []
        if not linear:
            ctx.save_for_backward(*inputs)
        with uncounted():
            value = function(*inputs)
        return result(value)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.moment is not None:
            mark(ctx.moment)
        with uncounted(), torch.enable_grad():
            inputs = [dout.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes] or ctx.saved_tensors
            leaves = [x.detach().requires_grad_() for x in inputs]
            values = torch.autograd.grad(ctx.function(*leaves), leaves, dout)
        return None, None, None, *(result(value) for value in values)


class FusedNorm(nn.Module):
    """RMSNorm that saves its input."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return Fused.apply(self._norm, None, False, x, self.weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._eps)


def swiglu(x: Tensor) -> Tensor:
    """Return SwiGLU of the gate and up projection ``[..., 2 * ffn_hidden]``, as one kernel."""
    return Fused.apply(_swiglu, "mlp", False, x)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def rotary(x: Tensor) -> Tensor:
    """Return x ``[s, b, heads, head_dim]`` with its halves exchanged: rotary positions as one kernel."""
    return Fused.apply(_rotated, None, True, x)


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class OpaqueKernel:
    """A local kernel whose results are counted, and nothing else.

    Args:
        kernel: computes.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.name, self.capabilities = kernel.name, kernel.capabilities
        self.unsupported_reason = kernel.unsupported_reason
        self._kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: AttnTile, spec: AttnSpec) -> tuple[Tensor, Tensor]:
        with uncounted():
            out, lse = self._kernel.forward(q, k, v, tile, spec)
        return result(out), result(lse)

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with uncounted():
            dq, dk, dv = self._kernel.backward(*arguments)
        return result(dq), result(dk), result(dv)


class EngineAttention(nn.Module):
    """The engine's attention of one rank.

    Args:
        call: plan, transfers and kernel.
        keep: keep the output where the layer is recomputed.
    """

    def __init__(self, call: Call, *, keep: bool) -> None:
        super().__init__()
        self._call, self._keep = call, keep
        self._kept: list[ForwardResult] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        mark("forward")
        finished = None
        if self._keep and not torch.is_grad_enabled():
            finished = run_forward(q, k, v, self._call)
            self._kept.append(finished)
        elif self._keep:
            finished = self._kept.pop(0)
        out = attend(q, k, v, self._call, finished)
        if out.requires_grad:
            out.register_hook(lambda _: mark("attention"))
            q.register_hook(lambda _: mark("projection"))
        mark("")
        return out.flatten(2)
