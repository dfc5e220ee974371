"""The path of a GPU on CPU ranks: every list of row operations is one launch over a table, read here by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from megatron_wallfacer.attention import forget_groups
from megatron_wallfacer.engine import compiled, row_lists
from megatron_wallfacer.engine.merge import merge_rows
from megatron_wallfacer.engine.row_table import ABSENT, CONSTANTS, RowTable
from megatron_wallfacer.schedule.schemes import make_plan
from tests.engine.passes import Case, errors, run_cases
from tests.support.dense import Problem
from tests.support.pool import Pool

HEADS = {"q_heads": 4, "kv_heads": 4}
PROBLEM = Problem(4, batch=1, **HEADS, causal=True)
SCHEMES = ("ring", "team-ring", "wallfacer", "ulysses", "usp", "tokenring")
CASES = [Case(make_plan(scheme, 4, **HEADS), PROBLEM) for scheme in SCHEMES]


class TableLaunch:
    """What a kernel of ``engine.triton_rows`` does, one row of its table after the other."""

    made = 0

    def __init__(self, table: RowTable, *, merges: bool) -> None:
        self.table, self.tensors = table, 2 if merges else 1
        TableLaunch.made += 1

    def __call__(self, bases: Sequence[Tensor]) -> None:
        for entry in self.table.values.tolist():
            into, *sources = self._places(entry, bases)
            if self.tensors == 2:
                merge_rows([tuple(into)], [[tuple(one) for one in sources]])
            else:
                total = sources[0][0].clone()
                for (one,) in sources[1:]:
                    total += one
                into[0].copy_(total)

    def _places(self, entry: list[int], bases: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The tensors that are written, and those of each source."""
        total, middle, inner, width = entry[:4]
        outer = total // (middle * inner), middle, inner
        places = [entry[first : first + 6] for first in range(4, len(entry), 6)]
        for first in range(0, len(places), self.tensors):
            some = places[first : first + self.tensors]
            if some[0][0] == ABSENT:
                continue
            yield [
                self._tensor(place, (*outer, width) if number == 0 else outer, bases)
                for number, place in enumerate(some)
            ]

    def _tensor(self, place: list[int], shape: tuple[int, ...], bases: Sequence[Tensor]) -> Tensor:
        base, wide, offset, *strides = place
        dtype = self.table.wide if wide else self.table.dtype
        constants = {number: value for value, number in CONSTANTS.items()}
        if base in constants:
            return torch.full(shape, constants[base], dtype=dtype)
        whole = bases[base] if bases[base].dtype == dtype else bases[base].view(dtype)
        return whole.as_strided(shape, (*strides, 1)[: len(shape)], whole.storage_offset() + offset)


def launched(rank: int, cases: Sequence[Case]) -> tuple[list[list[np.ndarray]], int]:
    """On a worker: the results of each case, and the number of launches that were made."""
    forget_groups()
    TableLaunch.made = 0
    with (
        mock.patch.object(row_lists, "kernels", return_value=SimpleNamespace(RowLaunch=TableLaunch)),
        mock.patch.object(compiled, "rows_in_one_launch", return_value=True),
    ):
        return run_cases(rank, cases), TableLaunch.made


def test_passes_whose_rows_are_moved_by_launches_are_exact(pools: Callable[[int], Pool]) -> None:
    ranks = pools(4).run(launched, CASES)
    for index, case in enumerate(CASES):
        worst = errors(case.problem, [found[index] for found, _ in ranks])
        assert max(worst.values()) <= 1e-12, (case, worst)
    assert min(number for _, number in ranks) >= 4 * len(CASES)
