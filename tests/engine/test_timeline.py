"""The timeline: what is recorded of a pass, and the picture that is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_wallfacer.chrome_trace import trace_events, write_trace
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.timeline import Timeline, TimelineEvent, combined, no_observer, total
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ops import Accumulate, Attend, Message, PostRecv, SendRecv, Transfer, View, WriteResult
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.passes import Case, call_of, leaves
from tests.support.dense import Problem
from tests.support.pool import Pool

KV_MOVE = Transfer("ring_outer", ("k", "v"), (), (Message(1, "block", (0,), 0),))
OUT_MOVE = Transfer("team", ("out", "lse"), (), (Message(1, "part", (0,), 0),))
TILES = Attend(("local.q",), ("local.kv",), "sum", None, ())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in a list of one."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def record(line: Timeline, clock: list[float], what: object, seconds: float = 0.0) -> None:
    with line(what):
        clock[0] += seconds


@pytest.fixture
def line(clock: list[float]) -> Timeline:
    """Two transfers of which one is waited for: 1 s copy, 4 s compute, 2 s wait, 1 s nothing, 2 s compute."""
    made = Timeline(3)
    record(made, clock, View("local.q"), 1)
    record(made, clock, SendRecv(KV_MOVE))
    record(made, clock, SendRecv(OUT_MOVE))
    record(made, clock, TILES, 4)
    record(made, clock, KV_MOVE, 2)
    clock[0] += 1
    record(made, clock, TILES, 2)
    record(made, clock, OUT_MOVE)
    return made


def trace_of(line: Timeline) -> list[dict[str, object]]:
    return trace_events(line.rank, line.events)


# --- what is recorded ---


def test_events_of_a_pass(line: Timeline) -> None:
    assert line.events == [
        TimelineEvent("copy", "View", 100, 101),
        TimelineEvent("copy", "SendRecv", 101, 101),
        TimelineEvent("copy", "SendRecv", 101, 101),
        TimelineEvent("compute", "local.q x local.kv", 101, 105),
        TimelineEvent("wait", "block", 105, 107),
        TimelineEvent("ring_outer inputs", "block", 101, 107),
        TimelineEvent("compute", "local.q x local.kv", 108, 110),
        TimelineEvent("wait", "part", 110, 110),
        TimelineEvent("team results", "part", 101, 110),
    ]


@pytest.mark.parametrize("what", [View("x"), WriteResult(("x",)), Accumulate("x", "y"), PostRecv(KV_MOVE)])
def test_what_neither_computes_nor_waits_is_copying(clock: list[float], what: object) -> None:
    made = Timeline(0)
    record(made, clock, what, 3)
    assert made.events == [TimelineEvent("copy", type(what).__name__, 100, 103)]


def test_a_transfer_that_starts_again_in_a_later_pass_has_its_own_times(clock: list[float]) -> None:
    """Schedules are kept: a later pass has the very same transfers."""
    made = Timeline(0)
    for _ in range(2):
        record(made, clock, SendRecv(KV_MOVE), 1)
        record(made, clock, KV_MOVE, 2)
        clock[0] += 7
    assert [(e.start, e.end) for e in made.events if e.row == "ring_outer inputs"] == [(100, 103), (110, 113)]


def test_several_recorders_are_told_the_same(clock: list[float]) -> None:
    lines = [Timeline(0), Timeline(1)]
    record(combined(lines), clock, TILES, 2)
    assert lines[0].events == lines[1].events == [TimelineEvent("compute", "local.q x local.kv", 100, 102)]
    assert (combined(lines[:1]), combined([])) == (lines[0], no_observer)


def test_the_recorder_of_nothing_is_a_context() -> None:
    assert isinstance(no_observer(TILES), nullcontext)


# --- the picture ---


def test_rows_of_the_picture_are_named(line: Timeline) -> None:
    named = [event for event in trace_of(line) if event["ph"] == "M"]
    threads = {event["tid"]: event["args"]["name"] for event in named if event["name"] == "thread_name"}
    processes = {event["pid"]: event["args"]["name"] for event in named if event["name"] == "process_name"}
    assert threads == dict(enumerate(("pass", "compute", "wait", "copy", "ring_outer inputs", "team results")))
    assert processes == {3: "rank 3"}


def check_trace(trace: list[dict]) -> None:
    """What the Chrome trace format asks for: fields, an end for each beginning, no overlap of complete events."""
    rows = {event["tid"] for event in trace if event["ph"] == "M"}
    open_events: dict[tuple, dict] = {}
    complete: dict[int, list[tuple[float, float]]] = {}
    for event in trace:
        assert event["ph"] in "MXbe"
        assert isinstance(event["name"], str)
        assert event["tid"] in rows
        if event["ph"] == "X":
            assert event["dur"] >= 0
            complete.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "b":
            key = (event["cat"], event["id"], event["name"])
            assert key not in open_events
            open_events[key] = event
        if event["ph"] == "e":
            begin = open_events.pop((event["cat"], event["id"], event["name"]))
            assert event["ts"] >= begin["ts"]
            assert (event["pid"], event["tid"]) == (begin["pid"], begin["tid"])
    assert not open_events
    for spans in complete.values():
        ordered = sorted(spans)
        # Microseconds of a clock that has been running for days, as floating-point numbers.
        assert all(before[1] <= after[0] + 0.01 for before, after in pairwise(ordered))


def test_every_event_is_in_the_picture(line: Timeline) -> None:
    trace = trace_of(line)
    check_trace(trace)
    assert sum(event["ph"] in "Xb" for event in trace) == len(line.events)
    (block,) = [event for event in trace if event["ph"] == "b" and event["name"] == "block"]
    assert (block["ts"], block["cat"]) == (101e6, "ring_outer inputs")
    wait = next(event for event in trace if event["ph"] == "X" and event["name"] == "block")
    assert (wait["ts"], wait["dur"]) == (105e6, 2e6)


def test_the_file_is_json_that_perfetto_reads(line: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rank3.json"
    write_trace(trace_of(line), path)
    assert json.loads(path.read_text()) == {"traceEvents": trace_of(line), "displayTimeUnit": "ms"}
    write_trace(trace_of(line), path, {"rank": 3})
    assert json.loads(path.read_text())["otherData"] == {"rank": 3}


# --- a real pass ---


def run_recorded(rank: int, case: Case) -> list[tuple[list[TimelineEvent], list[dict], float]]:
    """On a worker: events, trace and exposed share of a forward and of a backward."""
    transfers, lines = Transfers(connect(None, case.plan.grid)), [Timeline(rank), Timeline(rank)]
    q, k, v, dout = leaves(rank, case.problem)
    out = attend(q, k, v, call_of(case, transfers, observer=lines[0]))
    out.grad_fn.call = call_of(case, transfers, observer=lines[1])
    out.backward(dout)
    transfers.groups.close()
    return [(line.events, trace_of(line), total(line.events).exposed_share) for line in lines]


@pytest.mark.parametrize(
    ("grid", "channels"),
    [
        (Grid(ring_outer=2), ({"ring_outer inputs"}, {"ring_outer inputs", "ring_outer results"})),
        (Grid(team=2), ({"team inputs", "team results"}, {"team inputs", "team results"})),
        (Grid(head=2), ({"head inputs", "head results"}, {"head inputs", "head results"})),
    ],
    ids=["ring", "team", "head"],  # a set has another order in another process, and so would the name
)
def test_a_pass_computes_waits_and_transfers(
    pools: Callable[[int], Pool], grid: Grid, channels: tuple[set[str], set[str]]
) -> None:
    case = Case(Plan(grid), Problem(2, chunk=16, dtype=torch.float32))
    for rank, passes in enumerate(pools(2).run(run_recorded, case)):
        for (events, trace, exposed), rows, schedule in zip(passes, channels, case.schedules(rank), strict=True):
            check_trace(trace)
            assert {event.row for event in events} == {"pass", "compute", "wait", "copy"} | rows
            (whole,) = [event for event in events if event.row == "pass"]
            assert whole.name == ("backward" if schedule.backward else "forward")
            assert all(whole.start <= event.start <= event.end <= whole.end for event in events)
            assert sum(event.row == "compute" for event in events) == len(schedule.attends)
            transfers = [event for event in events if event.row in rows]
            assert len(transfers) == len(schedule.transfers) == sum(event.row == "wait" for event in events)
            assert 0 <= exposed < 1
            for event in events:
                assert event.start <= event.end


def test_recording_changes_nothing() -> None:
    case = Case(Plan(Grid()), Problem(1))
    results = []
    for observer in (no_observer, Timeline(0)):
        q, k, v, dout = leaves(0, case.problem)
        out = attend(q, k, v, call_of(case, Transfers(connect(None, Grid())), observer=observer))
        out.backward(dout)
        results.append((out, q.grad, k.grad, v.grad))
    assert all(torch.equal(plain, recorded) for plain, recorded in zip(*results, strict=True))
