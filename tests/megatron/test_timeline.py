"""--wallfacer-timeline: what the attention of one step did, for each rank, and nothing without the flag."""

from __future__ import annotations

import atexit
import errno
import json
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_wallfacer.chrome_trace import TraceSource
from megatron_wallfacer.engine.timeline import Pass, no_observer
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import plugin_state
from megatron_wallfacer.megatron.flags import Flags
from megatron_wallfacer.megatron.outputs import Output, check_folder
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.megatron.timeline import StepObserver
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape
from tests.megatron.test_arguments import Parse, parse  # noqa: F401
from tests.megatron.training import arguments
from tests.support.megatron_runs import train

LAYERS, MICRO_BATCHES = 2, 2
#: Per rank, of the sequence of 256 that 4 ranks train.
TOKENS = 64


def begin_and_end(trace: list[dict]) -> None:
    """Of each asynchronous event one begins and one ends, not before."""
    for key in {(event["cat"], event["id"]) for event in trace if event["ph"] in "be"}:
        pair = [event for event in trace if event["ph"] in "be" and (event["cat"], event["id"]) == key]
        assert [event["ph"] for event in pair] == ["b", "e"]
        assert pair[0]["ts"] <= pair[1]["ts"]


def test_a_run_leaves_a_trace_for_each_rank(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    flags = ("--wallfacer-cp-size", "4", "--wallfacer-scheme", "team-ring", "--wallfacer-team-size", "2")
    flags = (*flags, "--wallfacer-head-groups", "2")
    run = train(4, arguments(*flags, "--wallfacer-timeline", str(folder), iterations=3)).check()
    assert sorted(path.name for path in folder.iterdir()) == [f"rank-{rank}.json" for rank in range(4)]
    plan = make_plan("team-ring", 4, team_size=2, q_heads=4, kv_heads=2, tokens=TOKENS)
    files = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(4)]
    origins = [TraceSource.read(file["otherData"]) for file in files]
    assert [(one.rank, one.ranks, one.device) for one in origins] == [(rank, 4, "cpu") for rank in range(4)]
    assert len({one.run for one in origins}) == len({one.host for one in origins}) == 1
    # The clocks of a host are one.
    assert max(one.wall_s for one in origins) - min(one.wall_s for one in origins) < 1
    for rank, trace in enumerate(file["traceEvents"] for file in files):
        assert {event["pid"] for event in trace} == {rank}
        assert all(event["dur"] >= 0 for event in trace if event["ph"] == "X")
        begin_and_end(trace)
        rows = {event["tid"]: event["args"]["name"] for event in trace if event["name"] == "thread_name"}
        assert {"compute", "wait", "copy", "team inputs", "team results", "ring_outer inputs"} <= set(rows.values())
        # Every layer and micro-batch of one step, and of no other.
        attends = sum(
            len(schedule.attends)
            for schedule in (forward_schedule(plan, rank, groups=2), backward_schedule(plan, rank, groups=2))
        )
        computed = [event for event in trace if event["ph"] == "X" and rows[event["tid"]] == "compute"]
        assert len(computed) == LAYERS * MICRO_BATCHES * attends
    (line,) = re.findall("^wallfacer: timeline of step 2 .*$", run.output, flags=re.MULTILINE)
    share = rf"\d+\.\d{{3}} s in {LAYERS * MICRO_BATCHES} calls, \d+% exposed"
    assert re.search(f"in {re.escape(str(folder))}: attention forward {share}; backward {share}$", line)
    assert line in run.ranks[0].output


def test_nobody_looks_on_without_the_flag() -> None:
    state = PluginState((0, 19, 2), torch.device("cpu"), settings=Settings(make_plan("ring", 1)))
    assert state.observer is no_observer


def play(observer: StepObserver, schedule: Schedule) -> None:
    """What the engine tells of a pass, moves left out."""
    with observer(Pass(schedule, Shape(2, 2, 2, 1))):
        for op in schedule.ops:
            with observer(op):
                pass


@pytest.fixture
def observer(tmp_path: Path) -> Iterator[StepObserver]:
    made = StepObserver(tmp_path, TraceSource.here(0, 2, "a run", "cpu"))
    yield made
    atexit.unregister(made.say_if_cut_short)


@pytest.fixture
def step() -> object:
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    return torch.optim.SGD([weight], lr=0.1).step


def test_only_the_second_step_is_written(observer: StepObserver, step, tmp_path: Path, capsys) -> None:
    plan = make_plan("ulysses", 2)
    passes = forward_schedule(plan, 0, groups=2), backward_schedule(plan, 0, groups=2)
    step()  # before any attention: no step of training
    for number in range(1, 5):
        for schedule in (*passes, *passes)[: 3 if number == 2 else 4]:
            # In other steps passes may be CUDA graphs.
            assert observer.observing == (number == 2)
            play(observer, schedule)
        assert (tmp_path / "rank-0.json").exists() == (number > 2)
        step()
        step()  # of a second optimizer
    events = json.loads((tmp_path / "rank-0.json").read_text())["traceEvents"]
    (row,) = [event["tid"] for event in events if event["ph"] == "M" and event["args"]["name"] == "compute"]
    computed = [event for event in events if event["ph"] == "X" and event["tid"] == row]
    assert len(computed) == 2 * len(passes[0].attends) + len(passes[1].attends)
    assert re.search("forward .* in 2 calls, 0% exposed; backward .* in 1 calls, 0% exposed", capsys.readouterr().out)
    observer.say_if_cut_short()
    assert capsys.readouterr().out == ""


def test_a_trace_that_cannot_be_written_does_not_end_the_run(step, tmp_path: Path, capsys) -> None:
    """The disk is full at step 2."""
    made = StepObserver(tmp_path / "a file" / "folder", TraceSource.here(0, 2, "a run", "cpu"))
    atexit.unregister(made.say_if_cut_short)
    (tmp_path / "a file").touch()
    for _ in range(4):
        with made(Pass(forward_schedule(make_plan("ring", 2), 0), Shape(2, 2, 2, 1))):
            pass
        step()
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert lines == [
        f"wallfacer: warning: --wallfacer-timeline {tmp_path}/a file/folder is switched off: Not a directory"
    ]


@pytest.mark.parametrize("folder", ["/proc/wallfacer", "/dev/null/folder"])
def test_a_folder_that_cannot_be_written_is_named_at_the_start(folder: str) -> None:
    with pytest.raises(WallfacerError, match=rf"^--wallfacer-timeline {folder}: cannot be written: "):
        check_folder("--wallfacer-timeline", Path(folder))


def test_the_folder_is_checked_before_groups_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_state, "connected", lambda *_, **__: pytest.fail("groups are made"))
    monkeypatch.setattr(plugin_state.dist, "get_process_group_ranks", lambda _: [0])
    settings = Settings(make_plan("ring", 1), Flags(timeline="/proc/wallfacer"))
    args = Namespace(distributed_timeout_minutes=10)
    state = PluginState((0, 19, 2), torch.device("cpu"), settings=settings, args=args)
    with pytest.raises(WallfacerError, match=r"^--wallfacer-timeline /proc/wallfacer: cannot be written: "):
        state.connect(None)


def test_metrics_that_fail_are_switched_off_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    output, calls = Output("--wallfacer-log-metrics"), []

    def fail() -> None:
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in range(3):
        output.write(fail)
    assert len(calls) == 1
    said = capsys.readouterr().out
    assert said == "wallfacer: warning: --wallfacer-log-metrics is switched off: No space left on device\n"


def test_a_run_that_ends_too_early_says_so(observer: StepObserver, step, tmp_path: Path, capsys) -> None:
    play(observer, forward_schedule(make_plan("ulysses", 2), 0))
    step()
    observer.say_if_cut_short()
    assert capsys.readouterr().out == (
        f"wallfacer: --wallfacer-timeline {tmp_path}: nothing was written, the run ended before its step 2 did\n"
    )
    StepObserver(tmp_path, TraceSource.here(1, 2, "a run", "cpu")).say_if_cut_short()
    assert capsys.readouterr().out == ""


def test_it_says_so_when_the_process_ends(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from megatron_wallfacer.chrome_trace import TraceSource;"
        "from megatron_wallfacer.megatron.timeline import StepObserver;"
        f"StepObserver(Path({str(tmp_path)!r}), TraceSource.here(0, 1, 'a run', 'cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nothing was written" in done.stdout


def test_one_step_is_rejected(parse: Parse) -> None:  # noqa: F811
    with pytest.raises(WallfacerError, match="--wallfacer-timeline here: needs --train-iters 2 or more, not 1"):
        parse("--wallfacer-cp-size", "8", "--wallfacer-timeline", "here", "--train-iters", "1")
