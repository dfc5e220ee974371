"""--wallfacer-log-metrics: what is written of each step is what was done, and nothing is timed without the flag."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from math import isfinite
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.training import global_vars

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.timeline import Pass, Timeline, no_observer
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.flags import Flags
from megatron_wallfacer.megatron.hooks import metrics as hook
from megatron_wallfacer.megatron.metrics import HostEvent, StepSums, log_step, step_sums
from megatron_wallfacer.megatron.outputs import Output
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ops import Message, Transfer, View
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape, received_bytes
from tests.engine.passes import Case, call_of, leaves
from tests.megatron.test_arguments import Parse, names_of, parse  # noqa: F401
from tests.megatron.test_core_attention import build, q
from tests.megatron.training import arguments
from tests.support.dense import Problem
from tests.support.megatron_runs import train
from tests.support.pool import Pool

RANKS, ITERATIONS = 4, 3
PLAN = make_plan("team-ring", RANKS, team_size=2, q_heads=4, kv_heads=2)
SHAPE = Shape(tokens=256 // RANKS, q_heads=4, kv_heads=2, head_dim=16, itemsize=4, accumulate_itemsize=4)
MOVE = Transfer("ring_outer", ("k", "v"), (), (Message(1, "block", (0,), 0),))


# --- a training run ---


def test_tensorboard_has_what_the_last_rank_did(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ("--wallfacer-cp-size", str(RANKS), "--wallfacer-scheme", "team-ring", "--wallfacer-team-size", "2")
    logged = (
        "--wallfacer-log-metrics",
        "--tensorboard-dir",
        str(tmp_path),
        "--eval-interval",
        "2",
        "--eval-iters",
        "1",
    )
    train(RANKS, arguments(*flags, *logged, iterations=ITERATIONS)).check()
    found = accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    ours = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"] if tag.startswith("wallfacer/")}
    times = {f"wallfacer/{name}" for name in ("attention-forward-s", "attention-backward-s", "exposed-s")}
    sizes = {
        "wallfacer/forward-bytes-per-layer": forward_schedule,
        "wallfacer/backward-bytes-per-layer": backward_schedule,
    }
    assert set(ours) == times | set(sizes) | {"wallfacer/exposed-share"}
    for tag, values in ours.items():
        assert [value.step for value in values] == [1, 2, 3], tag
        assert all(isfinite(value.value) and value.value > 0 for value in values), tag
    assert all(value.value < 1 for value in ours["wallfacer/exposed-share"])
    for tag, schedule in sizes.items():
        counted = sum(received_bytes(schedule(PLAN, RANKS - 1, groups=2), SHAPE).values())
        assert {value.value for value in ours[tag]} == {counted}, tag


# --- bytes ---


def run_counted(rank: int, case: Case) -> list[tuple[int, dict[str, float]]]:
    """On a worker: of a forward and of a backward, what torch.distributed handed over, and what was recorded."""
    transfers, sums = Transfers(connect(None, case.plan.grid)), StepSums(HostEvent)
    q, k, v, dout = leaves(rank, case.problem)
    results, counted = [], 0
    out = attend(q, k, v, call_of(case, transfers, observer=sums))
    for step in (lambda: None, lambda: out.backward(dout)):
        step()
        sums.end_step()
        results.append((transfers.received.total() - counted, sums.take()))
        counted = transfers.received.total()
    transfers.groups.close()
    return results


@pytest.mark.parametrize(
    ("grid", "choices"),
    [
        (Grid(ring_outer=4), {}),
        (Grid(ring_outer=4), {"backward": "pass-q"}),
        (Grid(team=2, ring_outer=2), {}),
        (Grid(head=2, kv_team=2), {}),
        (Grid(team=2, kv_team=2), {"kv_order": "paper", "backward": "pass-q"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_that_arrived(
    pools: Callable[[int], Pool], grid: Grid, choices: dict[str, str], dtype: torch.dtype
) -> None:
    case = Case(Plan(grid, **choices), Problem(4, chunk=16, q_heads=4, kv_heads=2, dtype=dtype))
    for (forward, first), (backward, second) in pools(4).run(run_counted, case):
        assert first["wallfacer/forward-bytes-per-layer"] == forward > 0
        assert "wallfacer/backward-bytes-per-layer" not in first
        assert second["wallfacer/backward-bytes-per-layer"] == backward > 0


# --- sums ---


class FakeClock:
    """Seconds that pass when told to, on a device that may be behind. A call makes an event."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, float("inf")

    def __call__(self) -> FakeEvent:
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock

    def record(self) -> None:
        self._at = self._clock.now

    def query(self) -> bool:
        return self._at <= self._clock.done

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.query(), "read before the device was there"
        return 1000 * (end._at - self._at)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def sums(clock: FakeClock) -> StepSums:
    return StepSums(clock)


def play(sums: StepSums, clock: FakeClock, *, backward: bool, seconds: float, wait: float) -> None:
    """A pass that waits once."""
    schedule = (backward_schedule if backward else forward_schedule)(PLAN, 0)
    with sums(Pass(schedule, SHAPE)):
        with sums(View("q")):
            clock.now += seconds - wait
        with sums(MOVE):
            clock.now += wait


def test_figures_are_those_of_a_step(sums: StepSums, clock: FakeClock) -> None:
    for seconds in (1.0, 3.0):
        for _ in range(2):
            play(sums, clock, backward=False, seconds=seconds, wait=0.5)
        play(sums, clock, backward=True, seconds=4 * seconds, wait=1.0)
        clock.now += 100
        sums.end_step()
    sizes = [
        sum(received_bytes(schedule(PLAN, 0), SHAPE).values()) for schedule in (forward_schedule, backward_schedule)
    ]
    assert sums.take() == {
        "wallfacer/attention-forward-s": 4.0,
        "wallfacer/attention-backward-s": 8.0,
        "wallfacer/exposed-s": 2.0,
        "wallfacer/exposed-share": 2.0 / 12.0,
        "wallfacer/forward-bytes-per-layer": sizes[0],
        "wallfacer/backward-bytes-per-layer": sizes[1],
    }
    assert sums.take() == {}


def test_a_device_that_is_behind_is_read_later(sums: StepSums, clock: FakeClock) -> None:
    clock.done = 0.0
    for _ in range(2):
        play(sums, clock, backward=False, seconds=2.0, wait=0.5)
        sums.end_step()
    assert sums.take() == {}
    clock.done = 2.0
    sums.end_step()
    assert sums.take()["wallfacer/attention-forward-s"] == 2.0
    clock.done = 4.0
    sums.end_step()
    # The second step, and two in which no attention ran.
    assert sums.take()["wallfacer/attention-forward-s"] == pytest.approx(2.0 / 3)


def test_nothing_is_kept_of_steps_that_were_summed_up(sums: StepSums, clock: FakeClock) -> None:
    for _ in range(200):
        with sums(Pass(forward_schedule(PLAN, 0), SHAPE)):
            clock.now += 1
        sums.end_step()
    assert (len(sums._over), len(sums._step.marks)) == (0, 0)
    assert len(sums._known) <= 64


def test_a_step_without_attention_tells_nothing(sums: StepSums) -> None:
    sums.end_step()
    assert sums.take() == {}


def test_on_cuda_events_are_recorded_and_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """No more of torch.cuda.Event than what does not block."""

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.at: float | None = None

        def record(self) -> None:
            self.at = 5.0

        def query(self) -> bool:
            return self.at is not None

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at + 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", Writer())
    sums = step_sums(torch.device("cuda"))
    play(sums, FakeClock(), backward=False, seconds=1.0, wait=0.5)
    sums.end_step()
    found = sums.take()
    assert (found["wallfacer/attention-forward-s"], found["wallfacer/exposed-s"]) == (1.5, 1.5)


# --- where it is written, and when ---


class Writer:
    """Megatron's TensorBoard writer, or its wandb module."""

    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written.append((tag, value, step))

    def log(self, figures: dict[str, float], step: int) -> None:
        self.written += [(tag, value, step) for tag, value in figures.items()]


def test_both_writers_get_the_mean_of_an_interval(
    sums: StepSums, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorboard, wandb = Writer(), Writer()
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", tensorboard)
    monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", wandb)
    for iteration, seconds in enumerate((1.0, 2.0, 3.0, 5.0), start=1):
        play(sums, clock, backward=False, seconds=seconds, wait=0.5)
        log_step(sums, iteration, 2)
    forward = [(value, step) for tag, value, step in tensorboard.written if tag == "wallfacer/attention-forward-s"]
    assert forward == [(1.5, 2), (4.0, 4)]
    assert wandb.written == tensorboard.written


def test_metrics_that_cannot_be_written_leave_the_training_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron's own line of each step goes on; one warning."""
    written = []

    def fail(*_: object) -> None:
        written.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hook, "log_step", fail)
    state = SimpleNamespace(
        sums=object(), args=SimpleNamespace(tensorboard_log_interval=1), log_output=Output("--wallfacer-log-metrics")
    )
    training_log = partial(hook.metrics_hook.run, state, lambda iteration: iteration)
    assert [training_log(iteration) for iteration in range(1, 4)] == [1, 2, 3]
    assert len(written) == 1
    said = capsys.readouterr().out
    assert said == "wallfacer: warning: --wallfacer-log-metrics is switched off: No space left on device\n"


def test_only_ranks_with_a_writer_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def state(*, log_metrics: bool) -> PluginState:
        settings = Settings(make_plan("ring", 1), Flags(log_metrics=log_metrics))
        return PluginState((0, 19, 2), torch.device("cpu"), settings=settings)

    assert state(log_metrics=True).observer is no_observer
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", Writer())
    assert state(log_metrics=False).observer is no_observer
    writing = state(log_metrics=True)
    assert isinstance(writing.observer, StepSums)
    assert writing.observer is writing.sums


def test_evaluation_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Timeline(0)
    monkeypatch.setattr(PluginState, "observer", line)
    layer = build().eval()
    layer(q(), q(), q(), None)
    assert not line.events
    layer.train()(q(), q(), q(), None)
    assert [event.name for event in line.events if event.row == "pass"] == ["forward"]


def test_the_flag_brings_its_hook_and_needs_a_writer(parse: Parse, tmp_path: Path) -> None:  # noqa: F811
    on = ("--wallfacer-cp-size", "8")
    assert "training log" not in names_of(parse(*on, "--tensorboard-dir", str(tmp_path)))
    with pytest.raises(WallfacerError, match="--wallfacer-log-metrics: needs --tensorboard-dir DIR or --wandb-project"):
        parse(*on, "--wallfacer-log-metrics")
    for writer in ("--tensorboard-dir", "--wandb-project"):
        assert names_of(parse(*on, "--wallfacer-log-metrics", writer, "here"))[-1] == "training log"
