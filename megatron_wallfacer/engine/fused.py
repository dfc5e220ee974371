"""What is done to rows beside attention, on a GPU: one Triton kernel each, which reads and writes every row once.

PyTorch's operators go over rows as wide as the output several times: merging a bf16 part takes 18 bytes an element
instead of 10, a proxy about 60 instead of 4. Where a rank holds few tokens that is a third of the time of its tiles
(``python -m benchmarks.gpu.traffic``). :mod:`megatron_wallfacer.engine.merge` says what each computes, and is what runs
on a CPU; the kernels are held against it there by Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows of a program.
_ROWS = 8


def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """See :func:`megatron_wallfacer.engine.merge.merge_into`."""
    _launch(_merge, out, (out, lse, part_out, part_lse))


def row_sums(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`megatron_wallfacer.engine.merge.row_sums`."""
    delta = torch.empty(dout.shape[:3], dtype=dtype, device=dout.device)
    _launch(_row_sums, dout, (dout, out, delta))
    return delta


def out_proxy(dout: Tensor, delta: Tensor, proxy: Tensor) -> None:
    """See :func:`megatron_wallfacer.engine.merge.out_proxy`."""
    _launch(_out_proxy, dout, (dout, delta, proxy))


def _launch(kernel: triton.JITFunction, like: Tensor, tensors: tuple[Tensor, ...]) -> None:
    """Run a kernel over all rows and heads.

    Args:
        kernel: takes the tensors, and three strides of each.
        like: ``[rows, batch, heads, channels]``, as wide as the widest.
        tensors: of the same rows, batch and heads; channels lie side by side.
    """
    rows, batch, heads, channels = like.shape
    total = rows * batch * heads
    if not total:
        return
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    grid = (triton.cdiv(total, _ROWS),)
    width = triton.next_power_of_2(channels)
    kernel[grid](*tensors, *strides, total, batch, heads, channels, ROWS=_ROWS, WIDTH=width)


# tl.sum and tl.max are compiled when Triton is imported, and so are closed to its interpreter, unlike what stands here.
@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _rows(total, batch, heads, ROWS: tl.constexpr):
    """Row, sequence and head of each of this program's rows, and whether there is such a row."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = index // heads
    return pair // batch, pair % batch, index % heads, index < total


@triton.jit
def _at(row, sequence, head, by_row, by_sequence, by_head):
    """Where rows of a tensor begin."""
    return row * by_row + sequence * by_sequence + head * by_head


@triton.jit
def _merge(
    out, lse, part_out, part_lse,
    out_r, out_b, out_h, lse_r, lse_b, lse_h, part_r, part_b, part_h, part_lse_r, part_lse_b, part_lse_h,
    total, batch, heads, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, sequence, head, live = _rows(total, batch, heads, ROWS)
    lse_at = lse + _at(row, sequence, head, lse_r, lse_b, lse_h)
    old = tl.load(lse_at, live, 0.0)
    new = tl.load(part_lse + _at(row, sequence, head, part_lse_r, part_lse_b, part_lse_h), live, 0.0)
    largest = tl.maximum(old, new)
    # Where neither has seen a key both weights are zero, not NaN.
    base = tl.where(largest == float("-inf"), 0.0, largest)
    merged = base + tl.log(tl.exp(old - base) + tl.exp(new - base))
    seen = tl.where(merged == float("-inf"), 0.0, merged)
    weight = tl.exp(new - seen)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = live[:, None] & (channel < channels)
    out_at = out + _at(row, sequence, head, out_r, out_b, out_h)[:, None] + channel
    part_at = part_out + _at(row, sequence, head, part_r, part_b, part_h)[:, None] + channel
    here = tl.load(out_at, inside, 0.0)
    apart = tl.load(part_at, inside, 0.0).to(here.dtype) - here
    # From the nearer end, as torch.lerp does: exact at both.
    between = tl.where(weight < 0.5, here + weight * apart, here + apart - apart * (1.0 - weight))
    tl.store(out_at, between.to(here.dtype), inside)
    tl.store(lse_at, merged.to(old.dtype), live)


@triton.jit
def _row_sums(
    dout, out, delta,
    dout_r, dout_b, dout_h, out_r, out_b, out_h, delta_r, delta_b, delta_h,
    total, batch, heads, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, sequence, head, live = _rows(total, batch, heads, ROWS)
    channel = tl.arange(0, WIDTH)[None, :]
    inside = live[:, None] & (channel < channels)
    wide = delta.dtype.element_ty
    left = tl.load(dout + _at(row, sequence, head, dout_r, dout_b, dout_h)[:, None] + channel, inside, 0.0).to(wide)
    right = tl.load(out + _at(row, sequence, head, out_r, out_b, out_h)[:, None] + channel, inside, 0.0).to(wide)
    tl.store(delta + _at(row, sequence, head, delta_r, delta_b, delta_h), tl.reduce(left * right, 1, _add), live)


@triton.jit
def _out_proxy(
    dout, delta, proxy,
    dout_r, dout_b, dout_h, delta_r, delta_b, delta_h, to_r, to_b, to_h,
    total, batch, heads, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, sequence, head, live = _rows(total, batch, heads, ROWS)
    channel = tl.arange(0, WIDTH)[None, :]
    inside = live[:, None] & (channel < channels)
    wanted = tl.load(delta + _at(row, sequence, head, delta_r, delta_b, delta_h), live, 0.0)
    given = tl.load(dout + _at(row, sequence, head, dout_r, dout_b, dout_h)[:, None] + channel, inside, 0.0)
    wide = given.to(wanted.dtype)
    # Scaled by the largest entry first: gradients are small, and their squares would underflow.
    largest = tl.reduce(tl.abs(wide), 1, _larger)
    direction = wide / tl.where(largest > 0, largest, 1.0)[:, None]
    length = tl.reduce(direction * direction, 1, _add) * largest
    scaled = direction * (wanted / tl.where(length > 0, length, 1.0))[:, None]
    to = proxy + _at(row, sequence, head, to_r, to_b, to_h)[:, None] + channel
    tl.store(to, scaled.to(given.dtype), inside)
