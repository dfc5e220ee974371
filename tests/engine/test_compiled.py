"""Compiled passes: made once for all that is alike, bounded, gone with their groups; one workspace per pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_wallfacer.attention import attention, forget_groups
from megatron_wallfacer.engine import call as call_module
from megatron_wallfacer.engine import connections, operators
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.pass_cache import PassCache
from megatron_wallfacer.engine.timeline import Timeline
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan


@pytest.fixture
def lowered() -> Iterator[list[object]]:
    """Programs that are lowered."""
    found: list[object] = []
    lower = call_module.lower

    def noted(*args: Any, **options: Any) -> object:
        found.append(lower(*args, **options))
        return found[-1]

    with patch.object(call_module, "lower", noted):
        yield found


@pytest.fixture
def call() -> Call:
    return Call(Plan(Grid()), Runtime(Transfers(connect(None, Grid())), TorchCpuKernel(), 0.3))


def qkv(tokens: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(tokens, 2, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]


def run(call: Call, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    out = attend(*tensors, call)
    return out, *torch.autograd.grad(out.square().sum(), tensors)


# --- the cache ---


def test_a_warm_call_compiles_nothing(call: Call, lowered: list[object]) -> None:
    for _ in range(3):
        run(call, qkv())
    assert len(lowered) == 2


def test_calls_that_are_alike_share_their_passes(call: Call, lowered: list[object]) -> None:
    run(call, qkv())
    observed = replace(call, runtime=replace(call.runtime, observer=Timeline(0)))
    run(observed, qkv())
    run(replace(call), qkv())
    assert len(lowered) == 2
    run(replace(call, runtime=replace(call.runtime, scale=0.4)), qkv())
    assert len(lowered) == 4


def test_other_sizes_are_compiled_again(call: Call, lowered: list[object]) -> None:
    run(call, qkv())
    run(call, qkv(tokens=12))
    assert len(lowered) == 4


def test_the_oldest_entry_goes_first() -> None:
    cache = PassCache(capacity=2)
    for key in "abc":
        assert cache.add(key, key.upper()) == key.upper()
    assert [cache.get(key) for key in "abc"] == [None, "B", "C"]
    assert len(cache) == 2


def test_equal_values_have_one_number_as_long_as_they_are_kept() -> None:
    cache = PassCache(capacity=2)
    first = cache.number_of(("plan", 1))
    assert cache.number_of(("plan", 1)) == first
    others = {cache.number_of(("plan", index)) for index in (2, 3)}
    assert first not in others
    # A number is never given twice, so that no entry of another call is found under it.
    assert cache.number_of(("plan", 1)) not in {first, *others}


def test_passes_are_bounded_by_bytes_and_the_newest_is_kept() -> None:
    cache = PassCache(limit=100)
    for key in "abc":
        cache.add(key, key.upper(), 40)
    assert [cache.get(key) for key in "abc"] == [None, "B", "C"]
    cache.add("d", "D", 200)
    assert (len(cache), cache.get("d")) == (1, "D")
    first = cache.number_of("mask 1", 60)
    cache.number_of("mask 2", 60)
    assert cache.number_of("mask 1", 60) != first


def test_passes_go_with_their_groups() -> None:
    forget_groups()
    attention(*(x.detach() for x in qkv()), plan=Grid())
    (transfers,) = connections._made.values()
    assert len(transfers.passes) == 1
    forget_groups()
    assert len(transfers.passes) == 0


# --- a pass ---


class Allocations(TorchDispatchMode):
    """Bytes of each buffer that is allocated as bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in str(func) and result.dtype == torch.uint8:
            self.found.append(result.nbytes)
        return result


def test_a_pass_allocates_one_workspace(call: Call) -> None:
    tensors = [x.detach() for x in qkv()]
    wanted = call.forward_pass(*tensors, sinks=False).program.workspace_bytes
    with Allocations() as seen:
        operators.run_attention(*tensors, None, call.number)
    assert seen.found == [wanted]


def test_own_tensors_may_lie_anywhere(call: Call) -> None:
    """Slices of one projection, as models make them, and a gradient of other strides."""
    projected = torch.randn(2, 8, 8, 4, dtype=torch.float64, requires_grad=True)
    views = [x.transpose(0, 1) for x in projected.split([4, 2, 2], dim=2)]
    assert not any(x.is_contiguous() for x in views)
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    dout = torch.randn(2, 8, 4, 4, dtype=torch.float64).transpose(0, 1)
    outs = [attend(*some, call) for some in (views, copies)]
    found, wanted = (
        torch.autograd.grad(out, some, x)
        for out, some, x in zip(outs, (views, copies), (dout, dout.contiguous()), strict=True)
    )
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
