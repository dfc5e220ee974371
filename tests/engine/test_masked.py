"""Tiles that a mask cuts: one kernel call for documents that follow one another, and the same results."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine import masked
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.mask import Mask

SCALE = 0.4
CP_SIZE, CHUNK = 2, 12
MASKS = {
    "causal": Mask(documents=(0, 5, 6, 17, 30, 48)),
    "full": Mask(right=None, documents=(0, 5, 6, 17, 30, 48)),
    "padding": Mask(documents=(0, 4, 11, 20)),
    "cut": Mask(documents=(0, 8, 16, 48), cut="document"),
    "cut, full": Mask(right=None, documents=(0, 8, 16, 48), cut="document"),
    "window": Mask(left=3, documents=(0, 5, 6, 17, 30, 48)),
}
TILES = {
    "chunk": ((0,), (0,)),
    "own": ((0, 3), (0, 3)),
    "all": ((0, 1, 2, 3), (0, 1, 2, 3)),
    "others": ((2, 3), (0, 1)),
}


def passes(kernel: object, mask: Mask, tile: str, *, varlen: bool) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of a tile."""
    q_chunks, k_chunks = TILES[tile]
    generator = torch.Generator().manual_seed(0)
    rows, cols = len(q_chunks) * CHUNK, len(k_chunks) * CHUNK
    shapes = [(rows, 1, 4, 8), (cols, 1, 2, 8), (cols, 1, 2, 8), (rows, 1, 4, 8)]
    q, k, v, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    calls = masked.calls_of(mask, q_chunks, k_chunks, CP_SIZE, CHUNK, varlen)
    out, lse = masked.forward(kernel, q, k, v, calls, AttnSpec(SCALE))
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    grads = masked.backward(kernel, tensors, calls, AttnSpec(SCALE))
    return {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("mask", MASKS)
def test_packed_calls_and_single_ones_give_the_same(mask: str, tile: str) -> None:
    packed = passes(ReferenceKernel(), MASKS[mask], tile, varlen=True)
    single = passes(TorchCpuKernel(), MASKS[mask], tile, varlen=False)
    for name, want in single.items():
        torch.testing.assert_close(packed[name], want, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("mask", [Mask(documents=(0, 3, 7, 48)), Mask(documents=(0, 8, 16, 48), cut="document")])
def test_documents_of_a_tile_are_one_call(mask: Mask) -> None:
    for varlen, told in ((True, [True]), (False, [False] * 3)):
        kernel = Mock(wraps=ReferenceKernel())
        passes(kernel, mask, "chunk", varlen=varlen)
        for function in (kernel.forward, kernel.backward):
            assert [call.args[-2].cu_seqlens is not None for call in function.call_args_list] == told
