"""The thread that explains waits: with a store and a progress of its own, and on real ranks that hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_wallfacer.engine.waits.progress import Label, Progress
from megatron_wallfacer.engine.waits.watch import MISSED, VARIABLE, Watch, wait_limit
from megatron_wallfacer.errors import OptionError

ROOT = Path(__file__).parents[3]
LIMIT = 0.6
FROM_1 = Label.of(("k", "v"), (1,), "ring_outer")


class FakeWork:
    """A work of NCCL.

    Attributes:
        done: what it answers; None to raise, as the work of an aborted communicator does.
    """

    def __init__(self, done: bool | None) -> None:
        self.done = done

    def is_completed(self) -> bool:
        if self.done is None:
            raise RuntimeError("aborted")
        return self.done


def beats(watch: Watch, number: int, *, requested: bool = False) -> None:
    """Let some time pass, as the thread does."""
    for _ in range(number):
        watch._beat(requested=requested)
        time.sleep(LIMIT / 6)


def watched(store: dist.Store, rank: int, label: Label | None = None) -> tuple[Watch, Progress, list[str]]:
    progress, said = Progress(), []
    progress.label, progress.passes = label, 1
    return Watch(store, rank, LIMIT, progress, said.append), progress, said


def test_a_long_wait_is_explained_once_with_its_cause() -> None:
    store = dist.HashStore()
    waits, progress, said = watched(store, 0, FROM_1)
    busy, _, quiet = watched(store, 1)
    for _ in range(9):
        beats(busy, 1)
        waits._beat(requested=False)
    first, second = said
    assert first.startswith("rank 0, forward: no K, V from rank 1 (ring_outer) for ")
    assert second.startswith("rank 0 waits for rank 1 on ")
    assert "waits for no message of attention" in second
    assert "test_watch.py" in second
    assert not quiet
    progress.waits += 1  # the same label, but another wait
    beats(waits, 3)
    assert len(said) == 2


def test_a_rank_that_publishes_no_more_is_silent() -> None:
    store = dist.HashStore()
    waits, _, said = watched(store, 0, FROM_1)
    beats(watched(store, 1)[0], 1)
    beats(waits, 9)
    assert MISSED < 6
    assert "which has given no sign of life for " in said[1]


def test_a_short_wait_says_nothing_and_a_request_is_answered() -> None:
    waits, _, said = watched(dist.HashStore(), 0, FROM_1)
    beats(waits, 2)
    assert not said
    beats(waits, 1, requested=True)
    assert said[0].startswith("rank 0, forward: no K, V from rank 1")
    idle, _, said = watched(dist.HashStore(), 0)
    beats(idle, 1, requested=True)
    assert "waits for no message of attention, at " in said[0]


@pytest.mark.parametrize(("done", "lines"), [(False, 2), (True, 0), (None, 0)])
def test_of_nccl_the_last_work_is_asked(done: bool | None, lines: int) -> None:
    waits, progress, said = watched(dist.HashStore(), 0)
    progress.posted = FROM_1, FakeWork(done)
    beats(waits, 8)
    assert len(said) == lines


@pytest.mark.parametrize(("text", "limit"), [("", 60.0), ("0", 0.0), ("2.5", 2.5)])
def test_the_variable(monkeypatch: pytest.MonkeyPatch, text: str, limit: float) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert wait_limit() == limit


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_a_bad_value_of_the_variable(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(OptionError, match=rf"{VARIABLE}={text}: must be a number of seconds"):
        wait_limit()


def test_ranks_name_the_one_that_is_late_and_the_one_that_is_stopped(tmp_path: Path) -> None:
    """Three ranks of a ring. Rank 0 sleeps in front of a call, then rank 1 is stopped; both are named by rank 2."""
    ranks = []
    for rank in range(3):
        log = (tmp_path / f"{rank}.log").open("w")
        command = [sys.executable, "-m", "tests.engine.waits.ring", str(tmp_path), str(rank)]
        environment = os.environ | {VARIABLE: "1.2"}
        ranks.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment))
    try:
        _until(tmp_path, 2, "which waits for no message of attention")
        assert "at an earlier pass" not in (tmp_path / "2.log").read_text()
        assert "ring.py" in (tmp_path / "2.log").read_text()
        before = (tmp_path / "2.log").read_text().count("(ring_outer) for")
        ranks[2].send_signal(signal.SIGQUIT)  # while it waits in C++
        _until(tmp_path, 2, "(ring_outer) for", before + 1)
        (tmp_path / "go").touch()
        _until(tmp_path, 1, "stopping")
        ranks[1].send_signal(signal.SIGSTOP)
        _until(tmp_path, 2, "rank 1 on")
        _until(tmp_path, 2, "which has given no sign of life")
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _until(folder: Path, rank: int, text: str, times: int = 1, seconds: float = 150.0) -> None:
    """Wait until a rank's log has a text so many times."""
    end = time.monotonic() + seconds
    while (log := (folder / f"{rank}.log").read_text()).count(text) < times:
        assert time.monotonic() < end, log
        time.sleep(0.1)
