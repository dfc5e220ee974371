"""Row sums and ``out_proxy`` on a GPU, each as one Triton kernel that reads and writes every row once.

PyTorch's operators would read and write every row several times. For ``out_proxy`` they would move 60 bytes per element
instead of 4. With few tokens per rank, PyTorch's operators would need a third of the time of the attention kernels
(``python -m benchmarks.gpu.traffic``). :mod:`megatron_wallfacer.engine.merge` defines row sums and ``out_proxy``, and
implements them for a CPU. Tests compare the kernels in Triton's interpreter with the CPU implementations.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_wallfacer.engine.triton_launch import Launch

#: Rows per Triton program.
_ROWS = 8


def row_sums(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`megatron_wallfacer.engine.merge.row_sums`."""
    delta = torch.empty(dout.shape[:3], dtype=dtype, device=dout.device)
    _launch(_row_sums, (dout, out, delta))
    return delta


def out_proxy(dout: Tensor, delta: Tensor, proxy: Tensor) -> None:
    """See :func:`megatron_wallfacer.engine.merge.out_proxy`."""
    _launch(_out_proxy, (dout, delta, proxy))


def _launch(kernel: triton.JITFunction, tensors: tuple[Tensor, ...]) -> None:
    """Run a kernel over all rows and heads of ``tensors``. The first tensor must have the most channels."""
    if not tensors[0].numel():
        return
    # Triton compiles a separate kernel for addresses that are multiples of 16.
    layouts = tuple([(x.stride(), x.dtype, x.data_ptr() % 16 == 0) for x in tensors])
    launch, sizes = _prepared(kernel, tuple(tensors[0].shape), layouts, tensors[0].device)
    launch.run(*tensors, *sizes)


@lru_cache(maxsize=64)
def _prepared(
    kernel: triton.JITFunction,
    shape: tuple[int, ...],
    layouts: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...],
    device: torch.device,
) -> tuple[Launch, tuple[int, ...]]:
    rows, batch, heads, channels = shape
    total = rows * batch * heads
    by_row = tuple(stride for strides, _, _ in layouts for stride in strides[:3])
    sizes = (*by_row, total, batch, heads, channels, _ROWS, triton.next_power_of_2(channels))
    return Launch(kernel, (triton.cdiv(total, _ROWS),)), sizes


# Triton's interpreter cannot run tl.sum and tl.max, which are compiled when Triton is imported.
@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _rows(total, batch, heads, ROWS: tl.constexpr):
    """Return the indices of token, sequence and head for each row of this program, and whether the row is in range."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = index // heads
    return pair // batch, pair % batch, index % heads, index < total


@triton.jit
def _at(row, sequence, head, by_row, by_sequence, by_head):
    return row * by_row + sequence * by_sequence + head * by_head


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
    # Elements are first divided by the largest one, because squares of small gradients underflow.
    largest = tl.reduce(tl.abs(wide), 1, _larger)
    direction = wide / tl.where(largest > 0, largest, 1.0)[:, None]
    length = tl.reduce(direction * direction, 1, _add) * largest
    scaled = direction * (wanted / tl.where(length > 0, length, 1.0))[:, None]
    to = proxy + _at(row, sequence, head, to_r, to_b, to_h)[:, None] + channel
    tl.store(to, scaled.to(given.dtype), inside)
