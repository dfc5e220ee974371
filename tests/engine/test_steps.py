"""Steps: rows of an accumulator that hold nothing are written, not read; others are merged or added to."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine.memory import Memory
from megatron_wallfacer.engine.merge import merge_rows, sum_rows
from megatron_wallfacer.engine.steps import Binding, bind
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.schedule import program
from megatron_wallfacer.schedule.accumulator import Accumulator, Part
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.ops import DKV, DQ, PARTIAL_OUT
from megatron_wallfacer.schedule.program import KernelRows
from megatron_wallfacer.schedule.rows import Rows

CHUNKS, CHUNK = 4, 2
NOTHING = float("-inf")
TILE, SPEC = AttnTile((0, 1), (0, 1)), AttnSpec(1.0)


class Total:
    """An accumulator as a program has it: which rows hold something is settled when steps are made.

    Its rows are NaN at first: whatever is read before it is written shows.
    """

    def __init__(self, payload: tuple[str, ...], dtype: torch.dtype = torch.float64) -> None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        heads = {name: 2 if name in DKV else 4 for name in payload}
        shapes = {name: (CHUNKS * CHUNK, 2, heads[name], *([] if name == "lse" else [8])) for name in payload}
        self.tensors = {name: torch.full(shape, float("nan"), dtype=wide) for name, shape in shapes.items()}
        self._held = Accumulator(Rows({}, tuple(range(CHUNKS))), CHUNKS * CHUNK)
        self._parts: list[tuple[Tensor, ...]] = []

    def hold(self, chunks: tuple[int, int], parts: Mapping[str, Tensor]) -> None:
        """A kernel's results for a range of chunks, which are added with others."""
        first, number = chunks[0] * CHUNK, len(self._parts)
        self._parts.append(tuple(parts.values()))

        def some(wanted: tuple[int, int]) -> tuple[KernelRows, ...]:
            return tuple(KernelRows(number, one, (wanted[0] - first, wanted[1] - first)) for one in range(len(parts)))

        self._held.parts.append(Part((first, chunks[1] * CHUNK), some))

    def add(self, chunks: tuple[int, int], parts: Mapping[str, Tensor]) -> None:
        """A kernel's results for a range of chunks."""
        self.hold(chunks, parts)
        self.accumulate()

    def accumulate(self) -> None:
        """Add what is held."""
        operands: list[object] = []
        rows = []
        for some, held, parts in self._held.take():
            into = tuple(range(len(operands), len(operands) + len(self.tensors)))
            operands += [tensor[slice(*some)] for tensor in self.tensors.values()]
            rows.append((into, (*((into,) if held else ()), *(part.sources(some) for part in parts))))
        frees = tuple(range(len(self._parts)))
        if "lse" in self.tensors:
            step = program.Merge(tuple(rows), frees)
        else:
            each = (pair for into, sources in rows for pair in zip(into, zip(*sources, strict=True), strict=True))
            step = program.Sum(tuple(each), frees)
        operands += self._parts
        slots = len(operands) - len(self._parts)
        bind(step, Binding(None, SPEC, (), Memory(slots=slots)))(operands, [])
        assert operands[slots:] == [None] * len(self._parts)
        self._parts = []

    def settle(self) -> dict[str, Tensor]:
        """The rows, complete: those that nothing reached are filled."""
        empty = [
            (tensor[slice(*rows)], NOTHING if name == "lse" else 0.0)
            for rows in self._held.unwritten((0, CHUNKS * CHUNK))
            for name, tensor in self.tensors.items()
        ]
        fill = program.Fill(tuple((number, value) for number, (_, value) in enumerate(empty)))
        bind(fill, Binding(None, SPEC, ()))([tensor for tensor, _ in empty], [])
        return self.tensors


def randn(chunks: int, heads: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(chunks * CHUNK, 2, heads, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(rows: slice, cols: slice) -> dict[str, Tensor]:
    """Attention of some of eight query rows to some of ten key rows."""
    q, k, v = randn(4)[rows], randn(5, seed=1)[cols], randn(5, seed=2)[cols]
    tile = AttnTile((0, len(q)), (0, len(k)))
    return dict(zip(PARTIAL_OUT, ReferenceKernel().forward(q, k, v, tile, AttnSpec(0.5)), strict=True))


ALL = slice(None)


def test_gradients_are_added_where_there_are_some_and_written_where_not() -> None:
    total = Total(DQ)
    total.add((1, 3), {"dq": randn(2)})
    total.add((0, 4), {"dq": randn(4, seed=1)})
    want = randn(4, seed=1)
    want[2:6] += randn(2)
    assert torch.equal(total.settle()["dq"], want)


def test_every_tensor_of_a_block_is_summed() -> None:
    total = Total(DKV)
    for _ in range(2):
        total.add((0, 4), {"dk": randn(4, 2, seed=1), "dv": randn(4, 2, seed=2)})
    settled = total.settle()
    assert torch.equal(settled["dk"], 2 * randn(4, 2, seed=1))
    assert torch.equal(settled["dv"], 2 * randn(4, 2, seed=2))


def test_rows_to_which_no_gradient_came_are_zero() -> None:
    total = Total(DQ)
    total.add((1, 2), {"dq": randn(1)})
    want = torch.zeros(8, 2, 4, 8, dtype=torch.float64)
    want[2:4] = randn(1)
    assert torch.equal(total.settle()["dq"], want)


def test_rows_that_saw_no_key_are_empty() -> None:
    total = Total(PARTIAL_OUT)
    total.add((2, 3), attention(slice(4, 6), ALL))
    settled = total.settle()
    seen = torch.tensor([False, False, False, False, True, True, False, False])
    assert not settled["out"][~seen].any()
    assert (settled["lse"][~seen] == NOTHING).all()
    assert torch.equal(settled["out"][seen], attention(slice(4, 6), ALL)["out"])


@pytest.mark.parametrize("payload", [DQ, DKV, PARTIAL_OUT])
def test_a_sum_of_nothing_is_empty(payload: tuple[str, ...]) -> None:
    for name, rows in Total(payload).settle().items():
        assert (rows == (NOTHING if name == "lse" else 0)).all()


def test_partial_outputs_of_overlapping_rows_are_merged() -> None:
    """Rows 2 to 6 see the keys in three parts, the others in one."""
    total = Total(PARTIAL_OUT)
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
    total = Total(PARTIAL_OUT)
    total.add((0, 1), attention(slice(0, 2), slice(0, 4)))
    total.add((3, 4), attention(slice(6, 8), slice(0, 4)))
    total.add((0, 4), attention(ALL, slice(4, 10)))
    settled = total.settle()
    whole, late = attention(ALL, ALL), attention(ALL, slice(4, 10))
    for name in PARTIAL_OUT:
        torch.testing.assert_close(settled[name][[0, 1, 6, 7]], whole[name][[0, 1, 6, 7]], rtol=0, atol=1e-14)
        assert torch.equal(settled[name][2:6], late[name][2:6])


def test_a_part_that_saw_nothing_leaves_rows_as_they_were() -> None:
    total = Total(PARTIAL_OUT)
    nothing = {"out": torch.zeros(8, 2, 4, 8, dtype=torch.float64), "lse": torch.full((8, 2, 4), NOTHING).double()}
    total.add((0, 4), nothing)
    total.add((0, 2), attention(slice(0, 4), ALL))
    total.add((0, 4), nothing)
    settled = total.settle()
    assert torch.equal(settled["out"][:4], attention(slice(0, 4), ALL)["out"])
    assert not settled["out"][4:].any()
    assert (settled["lse"][4:] == NOTHING).all()


def test_narrow_parts_are_added_in_the_accumulation_dtype() -> None:
    total = Total(DQ, torch.bfloat16)
    ones = torch.ones(8, 2, 4, 8, dtype=torch.bfloat16)
    for part in (256 * ones, ones, ones):
        total.add((0, 4), {"dq": part})
    settled = total.settle()["dq"]
    assert settled.dtype == torch.float32
    assert (settled == 258).all()  # In bfloat16 256 + 1 is 256.


def test_settling_twice_changes_nothing_and_more_may_be_added_after() -> None:
    total = Total(DQ)
    total.add((0, 2), {"dq": randn(2)})
    once = total.settle()["dq"].clone()
    assert torch.equal(total.settle()["dq"], once)
    total.add((0, 4), {"dq": randn(4, seed=1)})
    assert torch.equal(total.settle()["dq"], once + randn(4, seed=1))


# --- parts that are added together ---


def test_parts_that_are_held_are_added_together() -> None:
    total, one_by_one = Total(PARTIAL_OUT), Total(PARTIAL_OUT)
    pieces = [
        ((1, 3), attention(slice(2, 6), slice(0, 3))),
        ((0, 2), attention(slice(0, 4), slice(3, 7))),
        ((1, 4), attention(slice(2, 8), slice(7, 10))),
    ]
    for chunks, part in pieces:
        total.hold(chunks, part)
        one_by_one.add(chunks, part)
    total.accumulate()
    settled, want = total.settle(), one_by_one.settle()
    for name in PARTIAL_OUT:
        torch.testing.assert_close(settled[name], want[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_results_are_rounded_once(dtype: torch.dtype) -> None:
    """Sums and merges that go straight into bf16 are added up in fp32."""
    into, ones = torch.empty(2, 1, 1, 8, dtype=dtype), torch.ones(2, 1, 1, 8)
    sum_rows([into], [[256 * ones, ones.to(dtype), ones.to(dtype), ones.to(dtype)]])
    assert torch.equal(into, torch.full_like(into, 259.0))  # In bfloat16 256 + 1 is 256; 259 is 260.
    lse = torch.zeros(2, 1, 1)
    merge_rows([(into, torch.empty_like(lse))], [[(256 * ones, lse), (ones * 260, lse), (ones * 258, lse)]])
    assert torch.equal(into, torch.full_like(into, 258.0))


# --- copies, sums and merges of a list of rows ---


def test_lists_of_rows_are_copied_and_added_each_to_its_own() -> None:
    into, sources = [torch.full((2, 3), 10.0 * n) for n in range(3)], [torch.full((2, 3), 1.0 * n) for n in range(3)]
    operands = [*into, *sources]
    bind(program.Copy(((0, 3), (2, 5))), Binding(None, SPEC, ()))(operands, [])
    assert [one[0, 0].item() for one in into] == [0, 10, 2]
    bind(program.Sum(((0, (0, 3)), (2, (2, 5, 4)))), Binding(None, SPEC, ()))(operands, [])
    assert [one[0, 0].item() for one in into] == [0, 10, 5]


def test_blocks_are_permuted() -> None:
    source, into = torch.arange(12.0).view(4, 3), torch.zeros(3, 3)
    bind(program.Permute(0, 1, (2, 0, 2)), Binding(None, SPEC, ()))([into, source], [])
    assert torch.equal(into, source[[2, 0, 2]])


def test_partial_outputs_of_a_list_are_merged() -> None:
    parts = [attention(slice(0, 4), slice(0, 3)), attention(slice(0, 4), slice(3, 10))]
    operands = [one[name] for one in parts for name in PARTIAL_OUT]
    bind(program.Merge((((0, 1), ((0, 1), (2, 3))),)), Binding(None, SPEC, ()))(operands, [])
    want = attention(slice(0, 4), ALL)
    for got, name in zip(operands[:2], PARTIAL_OUT, strict=True):
        torch.testing.assert_close(got, want[name], rtol=0, atol=1e-14)


def test_a_call_leaves_its_results_in_its_slot() -> None:
    kernel = SimpleNamespace(forward=lambda *args: ("forward", args), backward=lambda *args: ("backward", args))
    to = Binding(kernel, SPEC, (), Memory(slots=6))
    x: list[object] = [*"abcdef", None, None]
    bind(program.AttendForward(0, 1, 2, TILE, 1), to)(x, [])
    bind(program.AttendBackward(0, 1, 2, 3, 4, 5, TILE, 0), to)(x, [])
    assert x[6:] == [("backward", (*"abcdef", TILE, SPEC)), ("forward", (*"abc", TILE, SPEC))]
