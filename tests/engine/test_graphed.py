"""Passes as graphs, with a graph for CPUs: the same calls and results as eager passes, on all ranks or on none."""

from __future__ import annotations

import contextlib
import gc
import io
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine import connections
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.compiled import CompiledPass
from megatron_wallfacer.engine.execute import execute, run_steps
from megatron_wallfacer.engine.graphed import EAGER_PASSES, LIMIT, CudaCapture, Graphs, contiguous_strides
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.pass_cache import PassCache
from megatron_wallfacer.engine.timeline import Timeline, no_observer
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.megatron.keep import Keeper
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.memory import graph_bytes
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.tape import Tape, TapeCapture, TapedTransfers, _Operators
from tests.support.pool import Pool

RUNS = 5
TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM = 8, 4, 2, 8
#: Two ranks: hops, gathers with results that travel, an exchange whose result is kept for backward.
PLANS = {
    "ring": Plan(Grid(ring_outer=2)),
    "team": Plan(Grid(team=2)),
    "ulysses": Plan(Grid(head=2)),
    "tokenring": Plan(Grid(ring_outer=2), forward="pass-q", backward="pass-q"),
}


def inputs(seed: int, rank: int, tokens: int = TOKENS) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output; k and v as views of one tensor, as Megatron has them."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    q, dout = torch.randn(2, tokens, 2, Q_HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    kv = torch.randn(tokens, 2, KV_HEADS, 2 * HEAD_DIM, generator=generator, dtype=torch.float64)
    return [q, *kv.split(HEAD_DIM, dim=-1)], dout


def both_passes(call: Call, seed: int, rank: int = 0, tokens: int = TOKENS) -> list[Tensor]:
    """out, dq, dk, dv of one layer."""
    tensors, dout = inputs(seed, rank, tokens)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attend(*leaves, call)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def make_call(plan: Plan, *, graphs: bool = True, failing: bool = False, **options: Any) -> tuple[Call, TapeCapture]:
    transfers, capture = TapedTransfers(connect(None, plan.grid)), TapeCapture(failing=failing)
    if graphs:
        transfers.graphs = Graphs(transfers.groups, capture)
    observer, mask = options.pop("observer", no_observer), options.pop("mask", Mask(right=0))
    runtime = Runtime(transfers, TorchCpuKernel(), 0.3, observer, graphs=transfers.graphs)
    return Call(plan, runtime, mask=mask), capture


@pytest.fixture
def one() -> tuple[Call, TapeCapture]:
    return make_call(Plan(Grid()))


# --- on two ranks ---


def graphed_beside_eager(rank: int, plan: Plan) -> dict[str, Any]:
    """On a worker: layers of different tensors, eagerly and by graphs."""
    eager, _ = make_call(plan, graphs=False)
    graphed, capture = make_call(plan)
    expected = [both_passes(eager, seed, rank) for seed in range(RUNS)]
    found = [both_passes(graphed, seed, rank) for seed in range(RUNS)]
    once_more = both_passes(graphed, 3, rank)
    counted = eager.runtime.transfers.received, graphed.runtime.transfers.received
    same = all(torch.equal(a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True))
    # Results of one replay stay as they are when the graph runs again.
    same &= all(torch.equal(a, b) for a, b in zip(expected[3], once_more, strict=True))
    report = {
        "same": same,
        "replays": [tape.replays for tape in capture.tapes],
        "waits": [unwaited(tape) for tape in capture.tapes],
        "calls": [captured_alike(*item, capture) for item in graphed.runtime.graphs._passes.items()],
        "bytes": held(graphed),
        "received": {key: n * (RUNS + 1) == counted[1][key] * RUNS for key, n in counted[0].items()},
    }
    for call in (eager, graphed):
        call.runtime.transfers.groups.close()
    return report


def held(call: Call) -> list[tuple[int, int]]:
    """Bytes of the buffers of each captured pass, and what the counter says."""
    return [
        (
            sum(x.nbytes for x in (*static.inputs, *static.results, *static.kept, static.workspace)),
            graph_bytes(compiled.program.schedule, compiled.program.shape),
        )
        for compiled, static in call.runtime.graphs._passes.items()
    ]


def unwaited(tape: Tape, passes: int = 1) -> list[str]:
    """What is wrong with the transfers of a capture: each is started, and waited for once after that.

    Numbers of transfers begin anew in each of the ``passes`` in the capture.
    """
    order: dict[str, list[str]] = {}
    for call in tape.calls:
        kind, _, number = call.name.partition(" ")
        if kind in ("post", "start", "wait"):
            order.setdefault(number, []).append(kind)
    return [
        f"{number}: {kinds}"
        for number, kinds in order.items()
        if [k for k in kinds if k != "post"] not in [["start", "wait"] * times for times in range(1, passes + 1)]
    ]


def captured_alike(compiled: CompiledPass, static: Any, capture: TapeCapture) -> bool:
    """Whether two more captures of a pass, on its static buffers, have the calls and addresses of the first one.

    Addresses of what kernels allocate are left out.
    """
    buffers = [*static.inputs, *static.results, *static.kept, static.workspace]
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in buffers]

    def inside(tape: Tape) -> list[tuple[str, list[int]]]:
        return [(c.name, [p for p in c.addresses if any(a <= p < b for a, b in spans)]) for c in tape.calls]

    again = [TapeCapture()(lambda: run_steps(compiled, buffers, no_observer)) for _ in range(2)]
    first = next(tape for tape in capture.tapes if tape is static.graph)
    assert sum(map(len, dict(inside(first)).values())), "no call has a static address"
    return all(inside(tape) == inside(first) for tape in again)


@pytest.mark.parametrize("name", PLANS)
def test_replays_equal_eager_passes(pools: Callable[[int], Pool], name: str) -> None:
    for report in pools(2).run(graphed_beside_eager, PLANS[name]):
        assert report["same"], "a replay differs from an eager pass"
        # One graph forward and one backward serve every layer.
        assert report["replays"] == [RUNS + 1 - EAGER_PASSES] * 2
        assert report["waits"] == [[], []]
        assert report["calls"] == [True, True], "captures of one pass differ"
        assert all(holds == counted for holds, counted in report["bytes"])
        assert report["received"]
        assert all(report["received"].values()), "received bytes of replays are not counted"


def one_rank_fails(rank: int, plan: Plan, failing: int) -> dict[str, Any]:
    """On a worker: captures fail on one rank."""
    eager, _ = make_call(plan, graphs=False)
    graphed, capture = make_call(plan, failing=rank == failing)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = [both_passes(graphed, seed, rank) for seed in range(RUNS)]
    same = all(
        torch.equal(a, b)
        for seed, x in enumerate(found)
        for a, b in zip(both_passes(eager, seed, rank), x, strict=True)
    )
    for call in (eager, graphed):
        call.runtime.transfers.groups.close()
    return {
        "same": same,
        "printed": printed.getvalue().splitlines(),
        "tapes": [(tape.replays, tape.resets) for tape in capture.tapes],
    }


def test_where_one_rank_cannot_capture_all_run_eagerly(pools: Callable[[int], Pool]) -> None:
    other, failing = pools(2).run(one_rank_fails, PLANS["ring"], 1)
    assert other["same"]
    assert failing["same"]
    # The other rank captured both passes, ran neither graph, and freed them.
    assert (other["tapes"], failing["tapes"]) == ([(0, 1), (0, 1)], [])
    why = "RuntimeError: operation not permitted when stream is capturing"
    assert failing["printed"] == [
        f"wallfacer: context-parallel rank 1: no CUDA graph of a {name} pass, which all ranks of the group run "
        f"without one: {why}"
        for name in ("forward", "backward")
    ]
    assert other["printed"] == []


# --- on one rank ---


def test_the_third_pass_is_captured(one: tuple[Call, TapeCapture]) -> None:
    call, capture = one
    taped = []
    for seed in range(4):
        both_passes(call, seed)
        taped.append([tape.replays for tape in capture.tapes])
    assert taped == [[], [], [1, 1], [2, 2]]


def test_passes_of_other_strides_share_a_graph(one: tuple[Call, TapeCapture]) -> None:
    """Static inputs are contiguous; k and v of ``inputs`` are not."""
    call, capture = one
    (q, k, v), _ = inputs(0, 0)
    eager, _ = make_call(call.plan, graphs=False)
    expected = attend(q, k, v, eager)
    for tensors in ((q, k, v), (q, k.contiguous(), v), (q, k.clone(), v.contiguous()), (q.expand_as(q), k, v)):
        assert torch.equal(attend(*tensors, call), expected)
    assert [tape.replays for tape in capture.tapes] == [2]


def test_contiguous_strides_are_those_of_torch() -> None:
    for shape in ((4, 3, 2, 5), (1, 7), (3,)):
        assert contiguous_strides(torch.empty(shape)) == torch.empty(shape).stride()


def test_an_observed_pass_runs_eagerly() -> None:
    timeline = Timeline(0)
    call, capture = make_call(Plan(Grid()), observer=timeline)
    for seed in range(RUNS):
        both_passes(call, seed)
    assert capture.tapes == []
    assert Counter(event.name for event in timeline.events if event.row == "pass") == {"forward": 5, "backward": 5}


def test_a_pass_inside_another_capture_is_recorded_there(one: tuple[Call, TapeCapture]) -> None:
    call, capture = one
    both_passes(call, 0)
    capture.others = True
    for seed in range(RUNS):
        both_passes(call, seed)
    assert capture.tapes == []
    capture.others = False
    for seed in range(EAGER_PASSES - 1):
        both_passes(call, seed)
    assert capture.tapes == [], "passes of another capture are no warm-up"


def test_a_failed_capture_brings_the_callers_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.cuda.graph`` does not where the end of its capture raises."""
    streams = ["callers"]

    @contextlib.contextmanager
    def stream(chosen: str) -> Iterator[None]:
        before = streams[-1]
        streams.append(chosen)
        try:
            yield
        finally:
            streams.append(before)

    @contextlib.contextmanager
    def graph(*_: object, pool: str, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        streams.append("capture")
        yield
        raise RuntimeError("capture invalidated")

    fakes = {"stream": stream, "graph": graph, "current_stream": lambda: streams[-1], "CUDAGraph": object}
    for name, fake in (fakes | {"graph_pool_handle": lambda: "pool"}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="capture invalidated"):
        CudaCapture()(lambda: streams.append("side"))
    assert streams == ["callers", "callers", "capture", "side", "callers"]


def test_a_recorder_that_rests_hears_of_each_pass_and_stops_no_graph() -> None:
    """The timeline of a step counts steps by the passes in them."""

    class Resting:
        observing, seen = False, 0

        def __call__(self, what: object) -> Any:
            self.seen += 1
            return no_observer(what)

    observer = Resting()
    call, capture = make_call(Plan(Grid()), observer=observer)
    for seed in range(EAGER_PASSES):
        both_passes(call, seed)
    before = observer.seen
    both_passes(call, EAGER_PASSES)
    assert (observer.seen - before, [tape.replays for tape in capture.tapes]) == (2, [1, 1])


def test_packed_documents_run_eagerly() -> None:
    documents = Mask(right=0, documents=(0, 6, 8), shard_mode="sequence")
    call, capture = make_call(Plan(Grid()), mask=documents)
    assert call.run is execute
    (q, k, v), _ = inputs(0, 0)
    for _ in range(RUNS):
        attend(q[:, :1], k[:, :1], v[:, :1], call)
    assert capture.tapes == []


def test_a_limited_number_of_passes_is_captured(
    one: tuple[Call, TapeCapture], capsys: pytest.CaptureFixture[str]
) -> None:
    call, capture = one
    with torch.no_grad():
        for tokens in range(2, 2 * (LIMIT + 2), 2):
            for seed in range(EAGER_PASSES + 1):
                attend(*inputs(seed, 0, tokens)[0], call)
    assert len(capture.tapes) == LIMIT
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f"RuntimeError: {LIMIT} passes have a CUDA graph already")


def test_what_a_replay_reads_outlives_the_kernels_cache(one: tuple[Call, TapeCapture]) -> None:
    """Boundaries of documents or sequences on a device belong to prepared calls, whose cache is bounded."""
    call, _ = one
    for seed in range(EAGER_PASSES + 1):
        both_passes(call, seed)
    statics = call.runtime.graphs._passes.values()
    prepared = weakref.WeakSet(constant for static in statics for constant in static.constants)
    assert len(prepared) == 2
    call.runtime.kernel._forward_call.cache_clear()
    call.runtime.kernel._backward_call.cache_clear()
    gc.collect()
    assert len(prepared) == 2
    del statics
    call.runtime.graphs.drop()
    gc.collect()
    assert not prepared


def test_an_output_that_is_kept_is_that_of_its_own_pass(one: tuple[Call, TapeCapture]) -> None:
    """``--wallfacer-keep-attention-output``: passes stay graphs, because results are copied out of them.

    The keeper compares numbers of the device between passes, outside the graphs.
    """
    call, capture = one
    eager, _ = make_call(call.plan, graphs=False)
    keeper = Keeper("layer 1")
    for step in range(3):
        micro_batches = [[x.requires_grad_() for x in inputs(10 * step + seed, 0)[0]] for seed in range(3)]
        with torch.no_grad():
            first = [keeper.attend(*tensors, call) for tensors in micro_batches]
        for tensors, out in zip(micro_batches, first, strict=True):
            again, expected = keeper.attend(*tensors, call), attend(*tensors, eager)
            assert torch.equal(again, out)
            assert torch.equal(again, expected)
            dout = torch.ones_like(out)
            for x, y in zip(*(torch.autograd.grad(o, tensors, dout) for o in (again, expected)), strict=True):
                assert torch.equal(x, y)
    keeper.check_empty()
    # Nine forward passes and as many backward, each run once.
    assert [tape.replays for tape in capture.tapes] == [9 - EAGER_PASSES] * 2


def test_a_graph_captured_in_inference_mode_serves_training(one: tuple[Call, TapeCapture]) -> None:
    call, capture = one
    with torch.inference_mode():
        for _ in range(EAGER_PASSES + 1):
            attend(*inputs(0, 0)[0], call)
    both_passes(call, 0)
    assert [tape.replays for tape in capture.tapes] == [2]


def test_graphs_are_dropped_before_groups_are_closed(
    one: tuple[Call, TapeCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, capture = one
    for seed in range(EAGER_PASSES + 1):
        both_passes(call, seed)
    resets: list[list[int]] = []
    groups = SimpleNamespace(close=lambda: resets.append([tape.resets for tape in capture.tapes]))
    made = SimpleNamespace(graphs=call.runtime.graphs, passes=PassCache(), groups=groups)
    monkeypatch.setattr(connections, "_made", {(None, Grid(), "direct", "cpu"): made})
    connections.close_groups()
    assert resets == [[1, 1]]


def test_the_tape_notices_a_transfer_that_is_not_waited_for() -> None:
    tape = Tape()
    for name in ("post 0", "start 0", "start 1", "wait 1"):
        tape.add(name, (), lambda: None)
    assert unwaited(tape) == ["0: ['post', 'start']"]
    assert _Operators.current is None
