"""Steps: rows of an accumulator that hold nothing are written, not read; others are merged or added to."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine.steps import Binding, bind
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.schedule import program
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.ops import DKV, DQ, PARTIAL_OUT
from megatron_wallfacer.schedule.program import Piece
from megatron_wallfacer.schedule.rows import Accumulator, Rows

CHUNKS, CHUNK = 4, 2
NOTHING = float("-inf")
TILE, SPEC = AttnTile((0, 1), (0, 1)), AttnSpec(1.0)


class Sum:
    """An accumulator as a program has it: which rows hold something is settled when steps are made.

    Its rows are NaN at first: whatever is read before it is written shows.
    """

    def __init__(self, payload: tuple[str, ...], dtype: torch.dtype = torch.float64) -> None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        heads = {name: 2 if name in DKV else 4 for name in payload}
        shapes = {name: (CHUNKS * CHUNK, 2, heads[name], *([] if name == "lse" else [8])) for name in payload}
        self.tensors = {name: torch.full(shape, float("nan"), dtype=wide) for name, shape in shapes.items()}
        self._held = Accumulator(Rows({}, tuple(range(CHUNKS))), CHUNKS * CHUNK)
        self._operands: list[Tensor] = [torch.empty(0)]

    def add(self, chunks: tuple[int, int], parts: Mapping[str, Tensor]) -> None:
        """A kernel's results for a range of chunks."""
        first = chunks[0] * CHUNK
        pieces = tuple(
            Piece((a - first, b - first), tuple(self._number(name, (a, b)) for name in parts), held)
            for (a, b), held in self._held.write((first, chunks[1] * CHUNK))
        )
        if len(pieces) == 1:
            pieces = (pieces[0]._replace(rows=None),)
        results = tuple(parts.values())
        if "lse" in parts:
            kernel = SimpleNamespace(forward=lambda *_: results)
            step = program.AttendForward(0, 0, 0, TILE, pieces)
        else:
            side = {"q_pieces": pieces, "kv_pieces": ()} if "dq" in parts else {"q_pieces": (), "kv_pieces": pieces}
            gradients = (*results, None, None) if "dq" in parts else (None, *results)
            kernel = SimpleNamespace(backward=lambda *_: gradients)
            step = program.AttendBackward(0, 0, 0, 0, 0, 0, TILE, **side)
        bind(step, Binding(kernel, SPEC, ()))(self._operands, [])

    def settle(self) -> dict[str, Tensor]:
        """The rows, complete: those that nothing reached are filled."""
        empty = [
            (self._number(name, rows), NOTHING if name == "lse" else 0.0)
            for rows in self._held.unwritten()
            for name in self.tensors
        ]
        bind(program.Fill(tuple(empty)), Binding(None, SPEC, ()))(self._operands, [])
        return self.tensors

    def _number(self, name: str, rows: tuple[int, int]) -> int:
        self._operands.append(self.tensors[name][rows[0] : rows[1]])
        return len(self._operands) - 1


def randn(chunks: int, heads: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(chunks * CHUNK, 2, heads, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(rows: slice, cols: slice) -> dict[str, Tensor]:
    """Attention of some of eight query rows to some of ten key rows."""
    q, k, v = randn(4)[rows], randn(5, seed=1)[cols], randn(5, seed=2)[cols]
    tile = AttnTile((0, len(q)), (0, len(k)))
    return dict(zip(PARTIAL_OUT, ReferenceKernel().forward(q, k, v, tile, AttnSpec(0.5)), strict=True))


ALL = slice(None)


def test_gradients_are_added_where_there_are_some_and_written_where_not() -> None:
    total = Sum(DQ)
    total.add((1, 3), {"dq": randn(2)})
    total.add((0, 4), {"dq": randn(4, seed=1)})
    want = randn(4, seed=1)
    want[2:6] += randn(2)
    assert torch.equal(total.settle()["dq"], want)


def test_every_tensor_of_a_block_is_summed() -> None:
    total = Sum(DKV)
    for _ in range(2):
        total.add((0, 4), {"dk": randn(4, 2, seed=1), "dv": randn(4, 2, seed=2)})
    settled = total.settle()
    assert torch.equal(settled["dk"], 2 * randn(4, 2, seed=1))
    assert torch.equal(settled["dv"], 2 * randn(4, 2, seed=2))


def test_rows_to_which_no_gradient_came_are_zero() -> None:
    total = Sum(DQ)
    total.add((1, 2), {"dq": randn(1)})
    want = torch.zeros(8, 2, 4, 8, dtype=torch.float64)
    want[2:4] = randn(1)
    assert torch.equal(total.settle()["dq"], want)


def test_rows_that_saw_no_key_are_empty() -> None:
    total = Sum(PARTIAL_OUT)
    total.add((2, 3), attention(slice(4, 6), ALL))
    settled = total.settle()
    seen = torch.tensor([False, False, False, False, True, True, False, False])
    assert not settled["out"][~seen].any()
    assert (settled["lse"][~seen] == NOTHING).all()
    assert torch.equal(settled["out"][seen], attention(slice(4, 6), ALL)["out"])


@pytest.mark.parametrize("payload", [DQ, DKV, PARTIAL_OUT])
def test_a_sum_of_nothing_is_empty(payload: tuple[str, ...]) -> None:
    for name, rows in Sum(payload).settle().items():
        assert (rows == (NOTHING if name == "lse" else 0)).all()


def test_partial_outputs_of_overlapping_rows_are_merged() -> None:
    """Rows 2 to 6 see the keys in three parts, the others in one."""
    total = Sum(PARTIAL_OUT)
    total.add((1, 3), attention(slice(2, 6), slice(0, 3)))
    total.add((1, 2), attention(slice(2, 4), slice(3, 7)))
    total.add((2, 3), attention(slice(4, 6), slice(3, 7)))
    total.add((1, 3), attention(slice(2, 6), slice(7, 10)))
    total.add((0, 1), attention(slice(0, 2), ALL))
    total.add((3, 4), attention(slice(6, 8), ALL))
    settled, want = total.settle(), attention(ALL, ALL)
    for name in PARTIAL_OUT:
        torch.testing.assert_close(settled[name], want[name], rtol=0, atol=1e-14)


def test_one_part_over_written_and_unwritten_rows() -> None:
    total = Sum(PARTIAL_OUT)
    total.add((0, 1), attention(slice(0, 2), slice(0, 4)))
    total.add((3, 4), attention(slice(6, 8), slice(0, 4)))
    total.add((0, 4), attention(ALL, slice(4, 10)))
    settled = total.settle()
    whole, late = attention(ALL, ALL), attention(ALL, slice(4, 10))
    for name in PARTIAL_OUT:
        torch.testing.assert_close(settled[name][[0, 1, 6, 7]], whole[name][[0, 1, 6, 7]], rtol=0, atol=1e-14)
        assert torch.equal(settled[name][2:6], late[name][2:6])


def test_a_part_that_saw_nothing_leaves_rows_as_they_were() -> None:
    total = Sum(PARTIAL_OUT)
    nothing = {"out": torch.zeros(8, 2, 4, 8, dtype=torch.float64), "lse": torch.full((8, 2, 4), NOTHING).double()}
    total.add((0, 4), nothing)
    total.add((0, 2), attention(slice(0, 4), ALL))
    total.add((0, 4), nothing)
    settled = total.settle()
    assert torch.equal(settled["out"][:4], attention(slice(0, 4), ALL)["out"])
    assert not settled["out"][4:].any()
    assert (settled["lse"][4:] == NOTHING).all()


def test_narrow_parts_are_added_in_the_accumulation_dtype() -> None:
    total = Sum(DQ, torch.bfloat16)
    ones = torch.ones(8, 2, 4, 8, dtype=torch.bfloat16)
    for part in (256 * ones, ones, ones):
        total.add((0, 4), {"dq": part})
    settled = total.settle()["dq"]
    assert settled.dtype == torch.float32
    assert (settled == 258).all()  # In bfloat16 256 + 1 is 256.


def test_settling_twice_changes_nothing_and_more_may_be_added_after() -> None:
    total = Sum(DQ)
    total.add((0, 2), {"dq": randn(2)})
    once = total.settle()["dq"].clone()
    assert torch.equal(total.settle()["dq"], once)
    total.add((0, 4), {"dq": randn(4, seed=1)})
    assert torch.equal(total.settle()["dq"], once + randn(4, seed=1))


# --- copies, sums and merges of a list of rows ---


def test_lists_of_rows_are_copied_and_added_each_to_its_own() -> None:
    into, sources = [torch.full((2, 3), 10.0 * n) for n in range(3)], [torch.full((2, 3), 1.0 * n) for n in range(3)]
    operands, pairs = [*into, *sources], ((0, 3), (2, 5))
    bind(program.Copy(pairs), Binding(None, SPEC, ()))(operands, [])
    assert [one[0, 0].item() for one in into] == [0, 10, 2]
    bind(program.Add(pairs), Binding(None, SPEC, ()))(operands, [])
    assert [one[0, 0].item() for one in into] == [0, 10, 4]


def test_blocks_are_permuted() -> None:
    source, into = torch.arange(12.0).view(4, 3), torch.zeros(3, 3)
    bind(program.Permute(0, 1, (2, 0, 2)), Binding(None, SPEC, ()))([into, source], [])
    assert torch.equal(into, source[[2, 0, 2]])


def test_partial_outputs_of_a_list_are_merged() -> None:
    parts = [attention(slice(0, 4), slice(0, 3)), attention(slice(0, 4), slice(3, 10))]
    operands = [one[name] for one in parts for name in PARTIAL_OUT]
    bind(program.Merge(((0, 1, 2, 3),)), Binding(None, SPEC, ()))(operands, [])
    want = attention(slice(0, 4), ALL)
    for got, name in zip(operands[:2], PARTIAL_OUT, strict=True):
        torch.testing.assert_close(got, want[name], rtol=0, atol=1e-14)
