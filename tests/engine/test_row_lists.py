"""Lists of row operations as one launch, by Triton's interpreter, held against PyTorch's operators on lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine import row_lists
from megatron_wallfacer.engine.memory import Memory
from megatron_wallfacer.engine.row_lists import row_list
from megatron_wallfacer.engine.row_table import BASES, Place, RowOperation, RowTable, make_table
from megatron_wallfacer.engine.steps import Binding, bind
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.schedule.program import WORKSPACE, Copy, Fill, KernelRows, Merge, Operand, ProgramStep, Sum
from megatron_wallfacer.schedule.rows import contiguous

CPU = torch.device("cpu")
NOTHING = float("-inf")


@pytest.fixture(scope="module")
def rows() -> Iterator[ModuleType]:
    from tests.engine.triton_copies import kernels

    with kernels("triton_rows", interpreted=True) as copy:
        yield copy


@pytest.fixture
def launched(rows: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches, which run in the interpreter."""
    found: list[str] = []

    def launch(table: RowTable, *, merges: bool) -> Callable[[Sequence[Tensor]], None]:
        run = rows.RowLaunch(table, merges=merges)
        return lambda tensors: (found.append("merges" if merges else "sums"), run(tensors))

    monkeypatch.setattr(row_lists, "kernels", lambda: SimpleNamespace(RowLaunch=launch))
    return found


class Pass:
    """Operands in a workspace and in buffers of their own, and held results, all of them random numbers.

    Args:
        dtype: of the inputs.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16, slots: int = 0) -> None:
        self.dtype, self.wide = dtype, torch.float64 if dtype == torch.float64 else torch.float32
        self.operands: list[Operand] = []
        self.buffers: dict[str, Tensor] = {WORKSPACE: self._random(4096, self.wide).view(torch.uint8)}
        self.wide_names: set[str] = set()
        self.results: list[tuple[Tensor, ...]] = [()] * slots
        self._end = 0

    def _random(self, size: int, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(size)
        # Small whole numbers: exact in every dtype, sums too.
        return torch.randint(-8, 9, (size,), generator=generator).to(dtype)

    def put(self, *shape: int, wide: bool = False, spread: int = 1) -> int:
        """An operand in the workspace, ``spread`` times as far apart as it need be."""
        strides = tuple(spread * step for step in contiguous(shape[:-1])) if spread > 1 else ()
        strides = (*(step * shape[-1] for step in strides), 1) if strides else contiguous(shape)
        size = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        itemsize = (self.wide if wide else self.dtype).itemsize
        first = -(-self._end // self.wide.itemsize) * self.wide.itemsize
        self._end = first + size * itemsize
        assert self._end <= self.buffers[WORKSPACE].numel()
        return self._add(Operand(WORKSPACE, "wide" if wide else "input", shape, strides, first // itemsize))

    def own(self, name: str, *shape: int, wide: bool = False) -> int:
        """An operand that is a buffer of its own: another order of dimensions, from the middle of a storage."""
        turned = self._random(3 + torch.Size(shape).numel(), self.wide if wide else self.dtype)[3:]
        self.buffers[name] = turned.view(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        self.wide_names |= {name} if wide else set()
        return self._add(Operand(name, "own", shape, self.buffers[name].stride(), 0))

    def _add(self, operand: Operand) -> int:
        self.operands.append(operand)
        return len(self.operands) - 1

    @property
    def memory(self) -> Memory:
        """Where its numbers point."""
        first = len(self.operands) + len(self.results)
        numbers = {name: first + number for number, name in enumerate(self.buffers)}
        return Memory(self.operands, len(self.operands), numbers, frozenset(self.wide_names), self.dtype)

    def run(self, step: ProgramStep, *, as_one: bool) -> list[Tensor]:
        """All buffers after a step, which runs on copies of them."""
        # One storage each, from the same place in it.
        copies = []
        for x in self.buffers.values():
            whole = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0).clone()
            copies.append(whole.as_strided(x.shape, x.stride(), x.storage_offset()))
        views = []
        for operand in self.operands:
            base = copies[list(self.buffers).index(operand.buffer)]
            dtype = {"wide": self.wide, "input": self.dtype}.get(operand.view, base.dtype)
            base = base if dtype == base.dtype else base.view(dtype)
            start = base.storage_offset() + operand.offset
            views.append(base.as_strided(operand.shape, operand.strides, start))
        memory = self.memory
        action = row_list(step, memory, CPU) if as_one else bind(step, Binding(None, AttnSpec(1.0), (), memory))
        x = [*views, *self.results, *copies]
        action(x, [])
        return copies


def check(made: Pass, step: ProgramStep, launched: list[str], launches: int = 1) -> None:
    """As one launch it gives what lists of tensors give."""
    for got, want in zip(made.run(step, as_one=True), made.run(step, as_one=False), strict=True):
        dtype = made.wide if got.dtype == torch.uint8 else got.dtype
        torch.testing.assert_close(got.view(dtype), want.view(dtype), equal_nan=True)
    assert len(launched) == launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_copies_of_any_dtypes_and_strides_are_one_launch(launched: list[str], dtype: torch.dtype) -> None:
    made = Pass(dtype)
    pairs = (
        (made.put(3, 2, 4, 8), made.own("q", 3, 2, 4, 8)),
        (made.own("out", 3, 2, 4, 8), made.put(3, 2, 4, 8, wide=True)),
        (made.put(3, 2, 4, wide=True), made.put(3, 2, 4, wide=True, spread=2)),
        (made.put(2, 2, 2, 3, 5, spread=2), made.put(2, 2, 2, 3, 5)),
        (made.put(40, wide=True), made.put(40, wide=True)),
    )
    check(made, Copy(pairs), launched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sums_of_held_results_and_rows_are_one_launch(launched: list[str], dtype: torch.dtype) -> None:
    made = Pass(dtype, slots=2)
    shape = (6, 1, 2, 8)
    for slot in range(2):
        results = [torch.full(shape, 1.0 + number + 3 * slot) for number in range(3)]
        # One library gives [b, s, h, d].
        made.results[slot] = tuple(x.to(dtype).transpose(0, 1).contiguous().transpose(0, 1) for x in results)
    total, half, first, received = (made.put(*shape, wide=True), made.put(2, 1, 2, 8, wide=True),
                                    made.put(*shape, wide=True), made.put(*shape, wide=True))  # fmt: skip
    out = made.own("dq", *shape)
    rows = (
        (total, (total, KernelRows(0, 0, None), KernelRows(1, 0, None))),
        (half, (half, KernelRows(0, 1, (2, 4)))),
        (first, (KernelRows(1, 1, None),)),
        (out, (received, KernelRows(0, 2, None), KernelRows(1, 2, None))),
    )
    check(made, Sum(rows, (0, 1)), launched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_merges_of_a_list_are_one_launch(launched: list[str], dtype: torch.dtype) -> None:
    made = Pass(dtype, slots=1)
    shape = (4, 1, 2, 8)
    made.results[0] = torch.ones(shape, dtype=dtype), torch.full(shape[:3], NOTHING, dtype=made.wide)
    made.results[0][1][:2] = 0.5
    pairs = [(made.put(*shape, wide=True), made.put(*shape[:3], wide=True)) for _ in range(4)]
    held = KernelRows(0, 0, None), KernelRows(0, 1, None)
    own = made.own("out", *shape), made.own("lse", *shape[:3], wide=True)
    rows = (
        (pairs[0], (pairs[0], held, pairs[1])),
        (pairs[2], (held,)),
        (own, (pairs[3], held)),
    )
    check(made, Merge(rows, (0,)), launched)
    assert launched == ["merges"]


def test_rows_that_nothing_reached_are_filled_in_one_launch(launched: list[str]) -> None:
    made = Pass()
    check(made, Fill(((made.put(3, 1, 2, 8, wide=True), 0.0), (made.put(3, 1, 2, wide=True), NOTHING))), launched)


def test_a_list_of_more_buffers_than_a_kernel_takes_is_two_launches(launched: list[str]) -> None:
    made = Pass()
    pairs = tuple((made.put(2, 2, 8), made.own(f"own{number}", 2, 2, 8)) for number in range(BASES))
    check(made, Copy(pairs), launched, launches=2)


def test_no_rows(rows: ModuleType, launched: list[str]) -> None:
    made = Pass()
    check(made, Copy(((made.put(0, 2, 8), made.put(0, 2, 8)), (made.put(2, 2, 8), made.put(2, 2, 8)))), launched)
    empty = make_table([], torch.bfloat16, torch.float32, CPU)
    rows.RowLaunch(empty, merges=False)([])
    nothing = Place(0, False, 0, (16, 8, 1))
    empty = make_table([RowOperation((0, 2, 8), (nothing,), ((nothing,),))], torch.bfloat16, torch.float32, CPU)
    rows.RowLaunch(empty, merges=False)([torch.empty(0)])


def test_a_table_is_made_once_and_again_for_other_strides(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tables = []
    monkeypatch.setattr(row_lists, "make_table", lambda *args: tables.append(make_table(*args)) or tables[-1])
    made = Pass(torch.float32, slots=1)
    into = made.put(2, 2, 1, 8, wide=True)
    action = row_list(Sum(((into, (KernelRows(0, 0, None),)),), (0,)), made.memory, CPU)
    buffer = made.buffers[WORKSPACE]
    for result in (torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8), torch.arange(32.0).view(2, 2, 1, 8).transpose(0, 1)):
        x = [None, (result,), buffer]
        action(x, [])
        assert x[1] is None
        assert torch.equal(buffer.view(torch.float32)[:32].view(2, 2, 1, 8), result)
    assert len(tables) == 2
    assert len(launched) == 3
