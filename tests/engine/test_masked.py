"""Tiles that a mask cuts: one kernel call for documents that follow one another, and the same results."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine.compiled import compile_pass
from megatron_wallfacer.engine.execute import execute
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.timeline import no_observer
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.lower import lower
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.ops import Accumulate, Attend, Schedule, Value
from megatron_wallfacer.schedule.tiles import Tile
from megatron_wallfacer.schedule.volume import Shape

SCALE = 0.4
CP_SIZE, CHUNK = 2, 12
MASKS = {
    "causal": Mask(documents=(0, 5, 6, 17, 30, 48)),
    "full": Mask(right=None, documents=(0, 5, 6, 17, 30, 48)),
    "padding": Mask(documents=(0, 4, 11, 20)),
    "per document": Mask(documents=(0, 8, 16, 48), shard_mode="per_document"),
    "per document, full": Mask(right=None, documents=(0, 8, 16, 48), shard_mode="per_document"),
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
    tensors = {"q": q, "k": k, "v": v}
    found = one_pass(kernel, mask, (q_chunks, k_chunks), tensors, varlen=varlen)
    delta = (dout * found["out"]).sum(-1)
    tensors |= {"dout": dout, "lse": found["lse"], "delta": delta}
    return found | one_pass(kernel, mask, (q_chunks, k_chunks), tensors, varlen=varlen)


def one_pass(
    kernel: object,
    mask: Mask,
    chunks: tuple[tuple[int, ...], tuple[int, ...]],
    tensors: dict[str, Tensor],
    *,
    varlen: bool,
) -> dict[str, Tensor]:
    """A schedule of one tile of which some pairs are unmasked, lowered and run; its sums are what it keeps."""
    backward = "dout" in tensors
    rows = {"q": ("q", "dout", "lse", "delta") if backward else ("q",), "kv": ("k", "v")}
    sums = {"dq": ("dq",), "dkv": ("dk", "dv")} if backward else {"partial": ("out", "lse")}
    sides = {"q": chunks[0], "kv": chunks[1], "dq": chunks[0], "dkv": chunks[1], "partial": chunks[0]}
    values = {name: Value(payload, sides[name], 0) for name, payload in (rows | sums).items()}
    whole = Tile((0, len(chunks[0])), (0, len(chunks[1])), partial=True)
    into, *others = sums
    attend = Attend(("q",), ("kv",), into, *(others or [None]), (whole,))
    accumulate = [Accumulate(name, f"{name} kept") for name in sums]
    values |= {f"{name} kept": Value(payload, sides[name], 0) for name, payload in sums.items()}
    keeps = tuple(f"{name} kept" for name in sums)
    schedule = Schedule(0, CP_SIZE, 1, backward, values, (attend, *accumulate), given=tuple(rows), keeps=keeps)
    shape = Shape(2 * CHUNK, 4, 2, 8, itemsize=8, accumulate_itemsize=8)
    program = lower(schedule, shape, mask, {}, varlen=varlen)
    transfers = Transfers(connect(None, Grid()))
    device, dtype = torch.device("cpu"), torch.float64
    compiled = compile_pass(program, kernel, AttnSpec(SCALE), transfers, device, dtype)
    given = [torch.cat([tensors[name].flatten() for name in rows[side]]).view(torch.uint8) for side in rows]
    _, kept = execute(compiled, (), given, transfers, no_observer)
    found = {}
    for name, message in zip(sums, kept, strict=True):
        likes = {"out": "q", "lse": "lse", "dq": "q", "dk": "k", "dv": "v"}
        shapes = [tensors["q"].shape[:3] if one == "lse" else tensors[likes[one]].shape for one in sums[name]]
        pieces = message.view(torch.float64).split([shape.numel() for shape in shapes])
        found |= {one: piece.view(shape) for one, piece, shape in zip(sums[name], pieces, shapes, strict=True)}
    return found


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("mask", MASKS)
def test_packed_calls_and_single_ones_give_the_same(mask: str, tile: str) -> None:
    packed = passes(ReferenceKernel(), MASKS[mask], tile, varlen=True)
    single = passes(TorchCpuKernel(), MASKS[mask], tile, varlen=False)
    for name, want in single.items():
        torch.testing.assert_close(packed[name], want, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "mask", [Mask(documents=(0, 3, 7, 48)), Mask(documents=(0, 8, 16, 48), shard_mode="per_document")]
)
def test_documents_of_a_tile_are_one_call(mask: Mask) -> None:
    for varlen, told in ((True, [True]), (False, [False] * 3)):
        kernel = Mock(wraps=ReferenceKernel())
        passes(kernel, mask, "chunk", varlen=varlen)
        for function in (kernel.forward, kernel.backward):
            assert [call.args[-2].cu_seqlens is not None for call in function.call_args_list] == told
