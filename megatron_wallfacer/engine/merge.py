"""Row operations of a pass: copy, permute, sum and merge, correct for rows that have seen no key (lse = -inf).

On a GPU each is one launch of a Triton kernel (:func:`kernels`). Lists of copies, sums and merges
become one launch in :mod:`megatron_wallfacer.engine.row_lists`. On a CPU they are operators of PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_wallfacer.kernels.optional import TRITON
from megatron_wallfacer.kernels.protocol import accumulation_dtype

#: Least length of a row of a gradient by which a proxy is divided; fp32 has it, and its square is no zero in fp64.
_SHORTEST = 2.0**-126


@lru_cache(maxsize=1)
def kernels() -> SimpleNamespace:
    """Return the kernels by name: ``RowLaunch``, ``merge_into``, ``row_sums`` and ``out_proxy``.

    Raises:
        UnavailableError: Triton is not installed.
    """
    TRITON.load()
    # Imported only where there is a GPU.
    from megatron_wallfacer.engine.triton_proxy import out_proxy, row_sums
    from megatron_wallfacer.engine.triton_rows import RowLaunch, merge_into

    return SimpleNamespace(RowLaunch=RowLaunch, merge_into=merge_into, row_sums=row_sums, out_proxy=out_proxy)


def check_rows(device: torch.device) -> None:
    """Check that the row operations can run on a device.

    Raises:
        UnavailableError: the device is a GPU, and Triton is not installed.
    """
    if device.type == "cuda":
        kernels()


def copy_rows(into: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into the tensor of the same shape at its place, in that tensor's dtype."""
    torch._foreach_copy_(into, sources)


def permute_rows(into: Tensor, source: Tensor, index: Tensor) -> None:
    """Copy row ``index[i]`` of ``source`` into row i of ``into``; both ``[rows, elements]``, of one dtype."""
    torch.index_select(source, 0, index, out=into)


def sum_rows(into: Sequence[Tensor], sources: Sequence[Sequence[Tensor]]) -> None:
    """Write into each tensor the sum of its sources, added up in their order in the accumulation dtype.

    Args:
        into: what is written.
        sources: of each, of its shape. The first may be the tensor itself, which is then added to.
    """
    totals = [_total(to, of[0], len(of)) for to, of in zip(into, sources, strict=True)]
    started = [(total, of[0]) for total, of in zip(totals, sources, strict=True) if total is not of[0]]
    if started:
        copy_rows(*zip(*started, strict=True))
    for number in range(1, max(map(len, sources))):
        added = [(total, of[number]) for total, of in zip(totals, sources, strict=True) if len(of) > number]
        torch._foreach_add_(*zip(*added, strict=True))
    _finish(into, totals)


def merge_rows(into: Sequence[tuple[Tensor, Tensor]], sources: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> None:
    """Write into each (out, lse) its parts merged by log-sum-exp, in their order, in the accumulation dtype.

    Args:
        into: what is written.
        sources: (out, lse) of the parts of each, of its shape. The first may be the tensors themselves.
    """
    totals = [_total(out, of[0][0], len(of)) for (out, _), of in zip(into, sources, strict=True)]
    started = [(total, of[0][0]) for total, of in zip(totals, sources, strict=True) if total is not of[0][0]]
    started += [(lse, of[0][1]) for (_, lse), of in zip(into, sources, strict=True) if lse is not of[0][1]]
    if started:
        copy_rows(*zip(*started, strict=True))
    for total, (_, lse), (_, *parts) in zip(totals, into, sources, strict=True):
        for part_out, part_lse in parts:
            merge_into(total, lse, part_out, part_lse)
    _finish([out for out, _ in into], totals)


def _total(into: Tensor, first: Tensor, parts: int) -> Tensor:
    """The tensor in which parts are added up: that which is written, unless it is narrow."""
    wide = accumulation_dtype(into.dtype)
    return into if parts == 1 or into is first or into.dtype == wide else torch.empty_like(into, dtype=wide)


def _finish(into: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
    narrowed = [(to, total) for to, total in zip(into, totals, strict=True) if to is not total]
    if narrowed:
        copy_rows(*zip(*narrowed, strict=True))


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
        kernels().merge_into(out, lse, part_out, part_lse)
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
    return kernels().row_sums(dout, out, dtype) if dout.is_cuda else (dout.to(dtype) * out).sum(-1).contiguous()


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
        kernels().out_proxy(dout, delta, proxy)
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
