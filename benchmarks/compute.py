"""Stand-ins for the attention kernel: the modelled time of one, or PyTorch's own on the CPU."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.config import Compute, Shape
from megatron_wallfacer.kernels.protocol import AttnSpec, Capabilities, Inputs, Kernel, accumulation_dtype
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.attn_tile import AttnTile

#: Floating-point operations a (query, key, channel): two products of two operations forward, five backward.
FORWARD, BACKWARD = 4, 10
_SINGLE_CALLS = 3


class SleepKernel:
    """Takes as long as a kernel of a stated rate would, and no processor: the other ranks have it meanwhile.

    Results are zeros of the right shape and dtype, kept from call to call: writing them anew would be processor
    time that a device does not take from its network. Values are never looked at in such a run.

    Attributes:
        late_s: seconds by which sleeps have ended too late so far; the processor was not free then.
    """

    name = "sleep"
    capabilities = Capabilities(v_head_dim=True)

    def __init__(self, gflops: float) -> None:
        """For a rate in 1e9 operations a second."""
        self._rate = gflops * 1e9
        self._zeros: dict[tuple[object, ...], Tensor] = {}
        self.late_s = 0.0

    def unsupported_reason(self, inputs: Inputs) -> str | None:
        return self.capabilities.unsupported_reason(inputs)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: AttnTile, spec: AttnSpec) -> tuple[Tensor, Tensor]:
        begin = time.monotonic()
        out = self._result("out", (*q.shape[:3], v.shape[-1]), q.dtype)
        lse = self._result("lse", q.shape[:3], accumulation_dtype(q.dtype))
        self._sleep(begin, FORWARD, q, k, tile.causal)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: AttnTile,
        spec: AttnSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        begin = time.monotonic()
        grads = tuple(self._result(name, x.shape, x.dtype) for name, x in (("dq", q), ("dk", k), ("dv", v)))
        self._sleep(begin, BACKWARD, q, k, tile.causal)
        return grads

    def _result(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        key = (name, tuple(shape), dtype)
        if key not in self._zeros:
            self._zeros[key] = torch.zeros(shape, dtype=dtype)
        return self._zeros[key]

    def _sleep(self, begin: float, operations: int, q: Tensor, k: Tensor, causal: bool) -> None:
        end = begin + flops(operations, q, k, causal) / self._rate
        # time.sleep lets go of the interpreter's lock, and the kernel's timer wakes it: nothing spins.
        while (left := end - time.monotonic()) > 0:
            time.sleep(left)
        self.late_s += time.monotonic() - end


def flops(operations: int, q: Tensor, k: Tensor, causal: bool) -> float:
    """Operations of a tile (sbhd), given those a (query, key, channel)."""
    rows, batch, heads, head_dim = q.shape
    return operations * batch * heads * head_dim * rows * k.shape[0] * (0.5 if causal else 1.0)


def make_kernel(compute: Compute) -> Kernel:
    """The kernel of a mode."""
    return SleepKernel(compute.gflops_per_rank) if compute.mode == "sleep" else TorchCpuKernel()


@dataclass(frozen=True)
class Alone:
    """The same work where nothing has to be moved.

    Attributes:
        rank_s: seconds that forward + backward take a rank. With ``real`` kernels: those of one single-process call
            over the whole sequence, divided by the cores that the ranks share.
        single_s: processor seconds of that call; None where kernels are modelled.
    """

    rank_s: float
    single_s: float | None = None


def alone(compute: Compute, shape: Shape, ranks: int) -> Alone:
    """Compute without communication."""
    if compute.mode == "sleep":
        work = (FORWARD + BACKWARD) * shape.heads * shape.head_dim * shape.tokens**2 / 2
        return Alone(work / ranks / (compute.gflops_per_rank * 1e9))
    single_s = min(_single_process_s(shape) for _ in range(_SINGLE_CALLS))
    return Alone(single_s / min(ranks, os.cpu_count() or 1), single_s)


def _single_process_s(shape: Shape) -> float:
    kernel, dtype = TorchCpuKernel(), getattr(torch, shape.dtype)
    call = AttnTile((0, shape.tokens), (0, shape.tokens), causal=True), AttnSpec(shape.head_dim**-0.5)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    q, k, v, dout = (torch.randn(shape.tokens, 1, h, shape.head_dim).to(dtype) for h in heads)
    begin = time.process_time()
    out, lse = kernel.forward(q, k, v, *call)
    kernel.backward(dout, q, k, v, out, lse, *call)
    return time.process_time() - begin
