"""Accumulators: what has not been written is not read, what has been is merged or added to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine.blocks import Block, Sizes
from megatron_wallfacer.engine.sums import Sum
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.ops import DKV, DQ, PARTIAL_OUT

CHUNKS, CHUNK = (0, 3, 4, 7), 2
SIZES = Sizes(CHUNK, 2, 4, 2, 8, 8, 1, torch.float64, torch.device("cpu"))
NOTHING = float("-inf")


def garbage(payload: tuple[str, ...], sizes: Sizes = SIZES) -> Block:
    """A block of NaN: whatever is read before it is written shows."""
    block = sizes.empty(payload, CHUNKS, 0)
    for tensor in block.tensors.values():
        tensor.fill_(float("nan"))
    return block


def randn(chunks: int, heads: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(chunks * CHUNK, 2, heads, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(rows: slice, cols: slice) -> dict[str, Tensor]:
    """Attention of some of eight query rows to some of ten key rows."""
    q, k, v = randn(4)[rows], randn(5, seed=1)[cols], randn(5, seed=2)[cols]
    tile = AttnTile((0, len(q)), (0, len(k)))
    return dict(zip(PARTIAL_OUT, ReferenceKernel().forward(q, k, v, tile, AttnSpec(0.5)), strict=True))


ALL = slice(None)


def test_a_sum_is_of_the_blocks_own_memory() -> None:
    block = garbage(DQ)
    total = Sum(block, SIZES)
    total.add((0, 4), {"dq": randn(4)})
    assert total.settle() is block
    assert torch.equal(block.tensors["dq"], randn(4))


def test_gradients_are_added_where_there_are_some_and_written_where_not() -> None:
    total = Sum(garbage(DQ), SIZES)
    total.add((1, 3), {"dq": randn(2)})
    total.add((0, 4), {"dq": randn(4, seed=1)})
    want = randn(4, seed=1)
    want[2:6] += randn(2)
    assert torch.equal(total.settle().tensors["dq"], want)


def test_every_tensor_of_a_block_is_summed() -> None:
    total = Sum(garbage(DKV), SIZES)
    for _ in range(2):
        total.add((0, 4), {"dk": randn(4, 2, seed=1), "dv": randn(4, 2, seed=2)})
    settled = total.settle().tensors
    assert torch.equal(settled["dk"], 2 * randn(4, 2, seed=1))
    assert torch.equal(settled["dv"], 2 * randn(4, 2, seed=2))


def test_rows_to_which_no_gradient_came_are_zero() -> None:
    total = Sum(garbage(DQ), SIZES)
    total.add((1, 2), {"dq": randn(1)})
    want = torch.zeros(8, 2, 4, 8, dtype=torch.float64)
    want[2:4] = randn(1)
    assert torch.equal(total.settle().tensors["dq"], want)


def test_rows_that_saw_no_key_are_empty() -> None:
    total = Sum(garbage(PARTIAL_OUT), SIZES)
    total.add((2, 3), attention(slice(4, 6), ALL))
    settled = total.settle().tensors
    seen = torch.tensor([False, False, False, False, True, True, False, False])
    assert not settled["out"][~seen].any()
    assert (settled["lse"][~seen] == NOTHING).all()
    assert torch.equal(settled["out"][seen], attention(slice(4, 6), ALL)["out"])


@pytest.mark.parametrize("payload", [DQ, DKV, PARTIAL_OUT])
def test_a_sum_of_nothing_is_empty(payload: tuple[str, ...]) -> None:
    for name, rows in Sum(garbage(payload), SIZES).settle().tensors.items():
        assert (rows == (NOTHING if name == "lse" else 0)).all()


def test_partial_outputs_of_overlapping_rows_are_merged() -> None:
    """Rows 2 to 6 see the keys in three parts, the others in one."""
    total = Sum(garbage(PARTIAL_OUT), SIZES)
    total.add((1, 3), attention(slice(2, 6), slice(0, 3)))
    total.add((1, 2), attention(slice(2, 4), slice(3, 7)))
    total.add((2, 3), attention(slice(4, 6), slice(3, 7)))
    total.add((1, 3), attention(slice(2, 6), slice(7, 10)))
    total.add((0, 1), attention(slice(0, 2), ALL))
    total.add((3, 4), attention(slice(6, 8), ALL))
    settled, want = total.settle().tensors, attention(ALL, ALL)
    for name in PARTIAL_OUT:
        torch.testing.assert_close(settled[name], want[name], rtol=0, atol=1e-14)


def test_one_part_over_written_and_unwritten_rows() -> None:
    total = Sum(garbage(PARTIAL_OUT), SIZES)
    total.add((0, 1), attention(slice(0, 2), slice(0, 4)))
    total.add((3, 4), attention(slice(6, 8), slice(0, 4)))
    total.add((0, 4), attention(ALL, slice(4, 10)))
    settled = total.settle().tensors
    whole, late = attention(ALL, ALL), attention(ALL, slice(4, 10))
    for name in PARTIAL_OUT:
        torch.testing.assert_close(settled[name][[0, 1, 6, 7]], whole[name][[0, 1, 6, 7]], rtol=0, atol=1e-14)
        assert torch.equal(settled[name][2:6], late[name][2:6])


def test_a_part_that_saw_nothing_leaves_rows_as_they_were() -> None:
    total = Sum(garbage(PARTIAL_OUT), SIZES)
    nothing = {"out": torch.zeros(8, 2, 4, 8, dtype=torch.float64), "lse": torch.full((8, 2, 4), NOTHING).double()}
    total.add((0, 4), nothing)
    total.add((0, 2), attention(slice(0, 4), ALL))
    total.add((0, 4), nothing)
    settled = total.settle().tensors
    assert torch.equal(settled["out"][:4], attention(slice(0, 4), ALL)["out"])
    assert not settled["out"][4:].any()
    assert (settled["lse"][4:] == NOTHING).all()


def test_narrow_parts_are_added_in_the_accumulation_dtype() -> None:
    sizes = Sizes(CHUNK, 2, 4, 2, 8, 8, 1, torch.bfloat16, torch.device("cpu"))
    total = Sum(garbage(DQ, sizes), sizes)
    ones = torch.ones(8, 2, 4, 8, dtype=torch.bfloat16)
    for part in (256 * ones, ones, ones):
        total.add((0, 4), {"dq": part})
    settled = total.settle().tensors["dq"]
    assert settled.dtype == torch.float32
    assert (settled == 258).all()  # In bfloat16 256 + 1 is 256.


def test_settling_twice_changes_nothing_and_more_may_be_added_after() -> None:
    total = Sum(garbage(DQ), SIZES)
    total.add((0, 2), {"dq": randn(2)})
    once = total.settle().tensors["dq"].clone()
    assert torch.equal(total.settle().tensors["dq"], once)
    total.add((0, 4), {"dq": randn(4, seed=1)})
    assert torch.equal(total.settle().tensors["dq"], once + randn(4, seed=1))
