"""Row operations of a pass: copy, permute, add and merge, safe where a row has seen no key yet (lse = -inf).

On a GPU merges, row sums and proxies are one Triton kernel each (:mod:`megatron_wallfacer.engine.fused`), elsewhere
operators of PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_wallfacer.kernels.optional import TRITON

#: Least length of a row of a gradient by which a proxy is divided; fp32 has it, and its square is no zero in fp64.
_SHORTEST = 2.0**-126


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    TRITON.load()
    # Only where there is a GPU: PyTorch's wheels for CPUs bring no Triton.
    from megatron_wallfacer.engine import fused

    return fused


def check_rows(device: torch.device) -> None:
    """Check that this module can serve a device.

    Raises:
        UnavailableError: the device is a GPU, and Triton is not installed.
    """
    if device.type == "cuda":
        _kernels()


def copy_rows(into: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into the tensor of the same shape at its place, in that tensor's dtype."""
    torch._foreach_copy_(into, sources)


def permute_rows(into: Tensor, source: Tensor, index: Tensor) -> None:
    """Copy row ``index[i]`` of ``source`` into row i of ``into``; both ``[rows, elements]``, of one dtype."""
    torch.index_select(source, 0, index, out=into)


def add_rows(into: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Add each source to the tensor of the same shape at its place, in that tensor's dtype."""
    torch._foreach_add_(into, sources)


def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a partial result of the same rows over other keys, in place.

    The weights of the two add up to one, so this is an interpolation: one pass over the outputs, which are
    read once and written once.

    Args:
        out, part_out: ``[rows, batch, heads, v_head_dim]``, normalised over the keys that each has seen, zero where
            that is none.
        lse, part_lse: ``[rows, batch, heads]``, -inf where no key has been seen.
    """
    if out.is_cuda:
        _kernels().merge_into(out, lse, part_out, part_lse)
        return
    # exp(part - total) is the logistic function of part - lse. With -inf replaced in lse, the weight is 0 where neither
    # has seen a key, and a NaN stays one.
    weight = torch.sub(part_lse, lse.clamp_min(torch.finfo(lse.dtype).min)).sigmoid_()
    out.lerp_(part_out.to(out.dtype), weight.unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)


def row_sums(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return delta of the rows, rowsum(dout * out), contiguous and in ``dtype``.

    Args:
        dout, out: ``[rows, batch, heads, v_head_dim]``.
        dtype: of the sums, ``[rows, batch, heads]``.
    """
    return _kernels().row_sums(dout, out, dtype) if dout.is_cuda else (dout.to(dtype) * out).sum(-1).contiguous()


def out_proxy(dout: Tensor, delta: Tensor, proxy: Tensor) -> None:
    """Fill a proxy for the forward output: a tensor with rowsum(dout * proxy) = delta.

    Flash kernels take the forward output in backward, but use nothing of it beyond that row sum. So a rank
    that has dO and delta of a query block needs no copy of its O: one tensor less on the wire. Of all such
    proxies this is the shortest, never longer than the true output, so it cannot overflow where that did not.

    Args:
        dout: ``[rows, batch, heads, v_head_dim]``.
        delta: ``[rows, batch, heads]``, rowsum(dout * out) in the accumulation dtype.
        proxy: shape and dtype of dout; written.
    """
    if dout.is_cuda:
        _kernels().out_proxy(dout, delta, proxy)
        return
    # The length in fp64: gradients are small, and their squares would underflow. Divided by twice, once each: the ratio
    # of the row sum to the square could overflow. Where the gradient is zero so is the row sum, and the proxy.
    length = torch.linalg.vector_norm(dout, dim=-1, keepdim=True, dtype=torch.float64).clamp_min_(_SHORTEST)
    length = length.to(delta.dtype)
    torch.mul(dout / length, delta.unsqueeze(-1) / length, out=proxy)


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Merge a logit that every row sees beside its keys, with a value of zero, in place: once, when all keys are in.

    Args:
        out: ``[rows, batch, heads, v_head_dim]``.
        lse: ``[rows, batch, heads]``.
        sinks: ``[heads]``.
    """
    total = torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))
    out.mul_(_weight(lse, total))
    lse.copy_(total)


def sinks_gradient(lse: Tensor, delta: Tensor, sinks: Tensor) -> Tensor:
    """Gradient of ``sinks``, ``[heads]``: the part of softmax that each row gave its sink, times -delta.

    Args:
        lse: ``[rows, batch, heads]``, the sinks among the logits.
        delta: ``[rows, batch, heads]``, rowsum(dout * out).
        sinks: ``[heads]``.
    """
    return -(torch.exp(sinks.to(lse.dtype) - lse) * delta).sum((0, 1)).to(sinks.dtype)


def _weight(part: Tensor, total: Tensor) -> Tensor:
    """exp(part - total) with a last dimension to broadcast; 0 where nothing has been seen at all."""
    return torch.exp(part - torch.where(total == float("-inf"), 0.0, total)).unsqueeze(-1)
