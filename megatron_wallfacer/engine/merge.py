"""Sums, merges and ``out_proxy``: operations on rows of a tensor. Rows without an unmasked key may have lse = -inf.

Outputs and their gradients are ``[rows, batch, heads, v_head_dim]``. The statistics lse and delta are ``[rows, batch,
heads]``, and sinks ``[heads]``.

On a GPU a sum or merge is one launch of a Triton kernel (:func:`kernels`). :mod:`megatron_wallfacer.engine.row_lists`
runs a whole list of copies, sums or merges in one launch. On a CPU the operations are operators of PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_wallfacer.kernels.optional import TRITON
from megatron_wallfacer.kernels.protocol import accumulation_dtype

#: Smallest length of dO by which ``out_proxy`` divides. fp32 represents it, and its square is not zero in fp64.
_SHORTEST = 2.0**-126


@lru_cache(maxsize=1)
def kernels() -> SimpleNamespace:
    """Return the Triton kernels by name: ``RowLaunch``, ``merge_into``, ``row_sums`` and ``out_proxy``.

    Raises:
        UnavailableError: Triton is not installed.
    """
    TRITON.load()
    # Triton modules are imported only on ranks with a GPU.
    from megatron_wallfacer.engine.triton_proxy import out_proxy, row_sums
    from megatron_wallfacer.engine.triton_rows import RowLaunch, merge_into

    return SimpleNamespace(RowLaunch=RowLaunch, merge_into=merge_into, row_sums=row_sums, out_proxy=out_proxy)


def check_rows(device: torch.device) -> None:
    """Check that the row operations can run on a device.

    Raises:
        UnavailableError: The device is a GPU, and Triton is not installed.
    """
    if device.type == "cuda":
        kernels()


def sum_rows(into: Sequence[Tensor], sources: Sequence[Sequence[Tensor]]) -> None:
    """Write into each tensor of ``into`` the sum of its ``sources``, added in order and in the accumulation dtype.

    Sources have the shape of their output tensor. The first source may be the output tensor itself.
    """
    totals = [_total(to, of[0], len(of)) for to, of in zip(into, sources, strict=True)]
    started = [(total, of[0]) for total, of in zip(totals, sources, strict=True) if total is not of[0]]
    if started:
        torch._foreach_copy_(*zip(*started, strict=True))
    for number in range(1, max(map(len, sources))):
        added = [(total, of[number]) for total, of in zip(totals, sources, strict=True) if len(of) > number]
        torch._foreach_add_(*zip(*added, strict=True))
    _finish(into, totals)


def merge_rows(into: Sequence[tuple[Tensor, Tensor]], sources: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> None:
    """Merge lists of partial results (out, lse) by log-sum-exp, in order and in the accumulation dtype.

    ``into[i]`` is overwritten with the merge of ``sources[i]``. All of these have the same shapes. The first element of
    ``sources[i]`` may be ``into[i]`` itself.
    """
    totals = [_total(out, of[0][0], len(of)) for (out, _), of in zip(into, sources, strict=True)]
    started = [(total, of[0][0]) for total, of in zip(totals, sources, strict=True) if total is not of[0][0]]
    started += [(lse, of[0][1]) for (_, lse), of in zip(into, sources, strict=True) if lse is not of[0][1]]
    if started:
        torch._foreach_copy_(*zip(*started, strict=True))
    for total, (_, lse), (_, *parts) in zip(totals, into, sources, strict=True):
        for part_out, part_lse in parts:
            merge_into(total, lse, part_out, part_lse)
    _finish([out for out, _ in into], totals)


def _total(into: Tensor, first: Tensor, parts: int) -> Tensor:
    """Return the tensor that accumulates partial results: ``into``, or a new tensor in a wider dtype."""
    wide = accumulation_dtype(into.dtype)
    return into if parts == 1 or into is first or into.dtype == wide else torch.empty_like(into, dtype=wide)


def _finish(into: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
    narrowed = [(to, total) for to, total in zip(into, totals, strict=True) if to is not total]
    if narrowed:
        torch._foreach_copy_(*zip(*narrowed, strict=True))


def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a partial result of the same rows over other keys into (out, lse), in place.

    The weights of the two results add up to one, so the merge is an interpolation. The interpolation reads and writes
    each element of ``out`` once. Rows without a key have out 0 and lse -inf.
    """
    if out.is_cuda:
        kernels().merge_into(out, lse, part_out, part_lse)
        return
    # exp(part - total) is the logistic function of part - lse. Replacing -inf in lse makes the weight 0 for rows
    # without any key. A NaN stays a NaN.
    weight = torch.sub(part_lse, lse.clamp_min(torch.finfo(lse.dtype).min)).sigmoid_()
    out.lerp_(part_out.to(out.dtype), weight.unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)


def row_sums(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return delta = rowsum(dout * out), a contiguous tensor of the given dtype."""
    return kernels().row_sums(dout, out, dtype) if dout.is_cuda else (dout.to(dtype) * out).sum(-1).contiguous()


def out_proxy(dout: Tensor, delta: Tensor, proxy: Tensor) -> None:
    """Fill a proxy of the forward output: a tensor with rowsum(dout * proxy) = delta.

    The backward pass of flash kernels uses the forward output O only to compute rowsum(dout * O). So a rank with dO and
    delta of a query block does not need O, and O is not sent. The proxy is the shortest vector with rowsum(dout *
    proxy) = delta, so it is never longer than O.

    ``proxy`` has shape and dtype of ``dout``, and ``delta`` has the accumulation dtype.
    """
    if dout.is_cuda:
        kernels().out_proxy(dout, delta, proxy)
        return
    # The length is computed in fp64, because squares of small gradients underflow. dout and delta are both divided by
    # the length, because delta / length^2 can overflow. A zero gradient has a zero row sum and a zero proxy.
    length = torch.linalg.vector_norm(dout, dim=-1, keepdim=True, dtype=torch.float64).clamp_min_(_SHORTEST)
    length = length.to(delta.dtype)
    torch.mul(dout / length, delta.unsqueeze(-1) / length, out=proxy)


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Merge sinks into (out, lse) of all keys, in place. A sink is a logit whose value vector is zero."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))
    # The weight is 0 for rows without any logit.
    out.mul_(torch.exp(lse - torch.where(total == float("-inf"), 0.0, total)).unsqueeze(-1))
    lse.copy_(total)


def sinks_gradient(lse: Tensor, delta: Tensor, sinks: Tensor) -> Tensor:
    """Return the gradient of sinks: the sum over rows of -delta times the softmax weight of the sink.

    ``lse`` includes the sink.
    """
    return -(torch.exp(sinks.to(lse.dtype) - lse) * delta).sum((0, 1)).to(sinks.dtype)
