"""Launches of Triton kernels without Triton's search for the compiled kernel, on a device that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from benchmarks.host.fake_triton import BEFORE_ARGUMENTS, fake_device
from megatron_wallfacer.engine import triton_launch, triton_proxy
from megatron_wallfacer.engine.row_table import Place, RowOperation, make_table
from megatron_wallfacer.engine.triton_rows import RowLaunch


@pytest.fixture
def launches() -> Iterator[list[tuple[Any, ...]]]:
    """Grid and arguments of each launch."""
    found: list[tuple[Any, ...]] = []
    with fake_device(lambda *given: found.append((*given[:3], *given[BEFORE_ARGUMENTS:]))):
        yield found


@pytest.fixture
def searches() -> Iterator[mock.Mock]:
    """Calls by which Triton finds a kernel."""
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run:
        yield run


def copy(rows: int) -> RowLaunch:
    into, source = (Place(base, False, 0, (8, 8, 1)) for base in (0, 1))
    table = make_table(
        [RowOperation((rows, 1, 8), (into,), ((source,),))], torch.bfloat16, torch.float32, torch.device("cpu")
    )
    return RowLaunch(table, merges=False)


def test_a_kernel_is_searched_once_and_launched_with_the_same_arguments(
    launches: list[tuple[Any, ...]], searches: mock.Mock
) -> None:
    run, tensors = copy(16), [torch.empty(16, 1, 8, dtype=torch.bfloat16) for _ in range(2)]
    for _ in range(3):
        run(tensors)
    assert searches.call_count == 1
    assert len(launches) == 3
    assert launches[1:] == launches[:1] * 2
    assert launches[0][:3] == (2, 1, 1)
    assert list(launches[0][4:6]) == [x.data_ptr() for x in tensors]


def test_addresses_that_are_no_multiples_of_16_are_another_kernel(
    launches: list[tuple[Any, ...]], searches: mock.Mock
) -> None:
    run, tensors = copy(16), [torch.empty(17 * 8, dtype=torch.bfloat16) for _ in range(2)]
    for first in (0, 4, 0, 4):
        run([x[first:] for x in tensors])
    assert searches.call_count == 2
    assert [one[-1] for one in launches] == [True, False, True, False]


def test_a_triton_whose_compiled_kernels_take_no_constants_searches_each_time(
    launches: list[tuple[Any, ...]], searches: mock.Mock
) -> None:
    run, tensors = copy(8), [torch.empty(8, 1, 8, dtype=torch.bfloat16) for _ in range(2)]
    with mock.patch.object(triton_launch, "_release", return_value=(3, 2)):
        run(tensors)
        run(tensors)
    assert searches.call_count == 2
    assert launches[0] == launches[1]


def test_tensors_of_the_same_layout_are_one_kernel(launches: list[tuple[Any, ...]], searches: mock.Mock) -> None:
    dout, out = (torch.empty(4, 1, 2, 8, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(2):
        triton_proxy.row_sums(dout, out, torch.float32)
    triton_proxy.row_sums(dout[:2], out[:2], torch.float32)
    assert searches.call_count == 2
    assert [one[0] for one in launches] == [1, 1, 1]
    assert launches[0][4] is out
    assert launches[0][6:] != launches[2][6:]
