"""Passes inside captures of another owner, as Megatron's graphs of layers are: the same results."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_wallfacer.engine import connections
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.foreign import ForeignCaptures
from megatron_wallfacer.engine.graphed import EAGER_PASSES
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.pass_cache import PassCache
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.tape import Tape, TapeCapture, TapedTransfers, recording
from tests.engine.test_graphed import PLANS, inputs, make_call, unwaited
from tests.support.pool import Pool

#: Forward keeps the gathered queries for backward; attention is recomputed in backward.
KEPT, RECOMPUTED = "team, queries kept", "ring, recomputed"
CASES = {**PLANS, KEPT: PLANS["team"], RECOMPUTED: PLANS["ring"]}


def make_foreign(case: str, free: Callable[[], None] = lambda: None) -> Call:
    plan = CASES.get(case, Plan(Grid()))
    transfers = TapedTransfers(connect(None, plan.grid))
    transfers.graphs = ForeignCaptures(free, recording)
    runtime = Runtime(transfers, TorchCpuKernel(), 0.3, graphs=transfers.graphs)
    return Call(plan, runtime, keep_gathered_q=case == KEPT)


def layer(call: Call, tensors: list[Tensor], *, recomputed: bool) -> Tensor:
    """Attention as a layer has it: what it reads and returns is made by other operators of the graph."""
    doubled = [2 * x for x in tensors]
    if recomputed:
        return 0.5 * checkpoint(attend, *doubled, call, use_reentrant=False)
    return 0.5 * attend(*doubled, call)


def run_layer(call: Call, case: str, seed: int, rank: int) -> list[Tensor]:
    """out, dq, dk, dv, eagerly."""
    tensors, dout = inputs(seed, rank)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = layer(call, leaves, recomputed=case == RECOMPUTED)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


class CapturedLayer:
    """One graph forward and one backward on static tensors, as Megatron's runner has them."""

    def __init__(self, call: Call, case: str, rank: int) -> None:
        tensors, self._dout = inputs(90, rank)
        self._leaves = [x.detach().requires_grad_() for x in tensors]
        self._results: list[Tensor] = []

        def forward() -> None:
            self._results.append(layer(call, self._leaves, recomputed=case == RECOMPUTED))

        def backward() -> None:
            self._results += torch.autograd.grad(self._results[0], self._leaves, self._dout)

        self.tapes: list[Tape] = [TapeCapture()(run) for run in (forward, backward)]

    def replay(self, seed: int, rank: int) -> list[Tensor]:
        tensors, dout = inputs(seed, rank)
        for static, x in zip((*self._leaves, self._dout), (*tensors, dout), strict=True):
            static.data.copy_(x)
        for tape in self.tapes:
            tape.replay()
        return [x.detach().clone() for x in self._results]


def captured_beside_eager(rank: int, case: str) -> dict[str, Any]:
    """On a worker: replays of a layer on other tensors, and the same eagerly."""
    call = make_foreign(case)
    expected = [run_layer(call, case, seed, rank) for seed in range(3)]
    captured = CapturedLayer(call, case, rank)
    found = [captured.replay(seed, rank) for seed in range(3)]
    report = {
        "same": all(torch.equal(a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True)),
        # Where attention is recomputed, a graph of backward has a forward pass, too.
        "waits": [unwaited(tape, passes=1 + (case == RECOMPUTED)) for tape in captured.tapes],
        "messages": [any(one.name.startswith("start") for one in tape.calls) for tape in captured.tapes],
    }
    call.runtime.transfers.groups.close()
    return report


@pytest.mark.parametrize("case", CASES)
def test_replays_equal_eager_passes(pools: Callable[[int], Pool], case: str) -> None:
    for report in pools(2).run(captured_beside_eager, case):
        assert report["same"], "a replay differs from an eager pass"
        assert report["waits"] == [[], []]
        assert report["messages"] == [True, True]


def test_a_pass_is_not_captured_before_it_has_run() -> None:
    call = make_foreign("one rank")
    with pytest.raises(WallfacerError, match="a CUDA graph captures a forward pass of shapes that have not run before"):
        CapturedLayer(call, "one rank", 0)


def test_the_plugins_own_graphs_step_aside() -> None:
    """``--wallfacer-cuda-graphs`` beside Megatron's: passes that have a graph are recorded in the other one."""
    call, own = make_call(Plan(Grid()))
    expected = [run_layer(call, "", seed, 0) for seed in range(EAGER_PASSES + 1)]
    captured = CapturedLayer(call, "", 0)
    assert all(torch.equal(a, b) for a, b in zip(expected[1], captured.replay(1, 0), strict=True))
    assert [tape.replays for tape in own.tapes] == [1, 1]


def test_what_a_replay_reads_is_held_until_the_groups_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[str] = []
    call = make_foreign("one rank", lambda: freed.append("graphs"))
    run_layer(call, "", 0, 0)
    CapturedLayer(call, "", 0)
    transfers, kernel = call.runtime.transfers, call.runtime.kernel
    held = weakref.WeakSet(transfers.graphs._held.values())
    # Both passes, and the prepared call of each.
    assert len(held) == 4
    transfers.passes.clear()
    kernel._forward_call.cache_clear()
    kernel._backward_call.cache_clear()
    gc.collect()
    assert len(held) == 4
    groups = SimpleNamespace(close=lambda: freed.append("groups"))
    made = SimpleNamespace(graphs=transfers.graphs, passes=PassCache(), groups=groups)
    monkeypatch.setattr(connections, "_made", {(None, Grid(), "direct", "cpu"): made})
    connections.close_groups()
    gc.collect()
    assert freed == ["graphs", "groups"]
    assert not held


def test_graphs_of_others_stay_where_nothing_was_captured() -> None:
    freed: list[str] = []
    call = make_foreign("one rank", lambda: freed.append("graphs"))
    run_layer(call, "", 0, 0)
    call.runtime.transfers.graphs.drop()
    assert not freed
