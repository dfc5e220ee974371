"""Rows are saved as they are measured; what fails or does not fit the budget is a row too."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.gpu import (
    accuracy,
    efficiency,
    exact,
    gaps,
    jobs,
    loss_tiles,
    memory,
    on_host,
    parity,
    peers,
    settings,
    step,
    tiles,
    traffic,
)
from benchmarks.gpu.ranks import Ranks
from benchmarks.gpu.rows import LeftOut, Rows
from benchmarks.gpu.tables import markdown_table, table_rows
from megatron_wallfacer.errors import OptionError, WallfacerError


def options(out: Path | None, budget: float | None = None) -> argparse.Namespace:
    return argparse.Namespace(out=out, budget=budget)


class Clock:
    """Seconds that only tests advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float):
        def run():
            self.now += seconds
            return [("1", "ok")]

        return run


def failing(error: Exception):
    def run():
        raise error

    return run


def test_a_row_is_on_disk_before_the_next_one_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Rows("table", ("setting",), ("value",), options(tmp_path))
    rows.measure(("first",), lambda: [("1", "ok")])

    def second():
        saved = table_rows(tmp_path / "table.csv")
        assert saved == [{"setting": "first", "value": "1", "verdict": "ok"}]
        return [("2", "")]

    assert rows.measure(("second",), second)
    assert "| first | 1 | ok |" in capsys.readouterr().out
    assert rows.close() == 0


def test_what_fails_is_a_row_with_its_error_and_the_rest_goes_on(tmp_path: Path) -> None:
    rows = Rows("table", ("setting",), ("value",), options(tmp_path))
    rows.measure(("library",), failing(RuntimeError("\n cuDNN says no\n at line 3")))
    training = "training on 4 ranks ended with exit code 1; see a.log:\nTraceback\n  File\nValueError: 7 heads\n"
    rows.measure(("training",), failing(WallfacerError(training)))
    rows.measure(("absent",), failing(LeftOut("te is not installed")))
    rows.measure(("grid",), failing(OptionError("team", 3, "2")))
    rows.measure(("after",), lambda: [("1", "ok")])
    verdicts = [row["verdict"] for row in table_rows(tmp_path / "table.csv")]
    assert verdicts == [
        "failed: RuntimeError: cuDNN says no",
        "failed: WallfacerError: training on 4 ranks ended with exit code 1; see a.log: ValueError: 7 heads",
        "left out: te is not installed",
        "left out: team=3: must be 2",
        "ok",
    ]
    assert rows.close() == 1


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("", 0), ("wrong", 1), ("below", 1), ("over", 1)])
def test_the_exit_code_is_that_of_the_worst_row(verdict: str, code: int) -> None:
    rows = Rows("table", ("setting",), ("value",), options(None))
    rows.measure(("one",), lambda: [("1", verdict)])
    assert rows.close() == code


def test_no_row_begins_that_would_end_after_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    rows = Rows("table", ("setting",), ("value",), options(tmp_path, 10.0), clock=clock)
    assert rows.measure(("4 s",), clock.work(4), cost=1)
    # Twice the cost would take 8 s, and 6 are left.
    assert not rows.measure(("twice",), clock.work(8), cost=2)
    assert rows.measure(("again",), clock.work(4), cost=1)
    assert not rows.measure(("late",), clock.work(4), cost=1)
    assert [row["verdict"] for row in table_rows(tmp_path / "table.csv")] == [
        "ok",
        "not measured: the budget of 10 s",
        "ok",
        "not measured: the budget of 10 s",
    ]
    assert rows.close() == 0
    assert "2 of 4 rows not measured: budget 10 s" in capsys.readouterr().err


def test_a_rank_that_fails_fails_the_row_of_all(tmp_path: Path) -> None:
    class Second(Ranks):
        def all(self, answer):
            return [answer, "failed: RuntimeError: on rank 1" if answer == "" else answer]

    rows = Rows("table", ("setting",), ("value",), options(tmp_path), ranks=Second())
    rows.measure(("one",), lambda: [("1", "ok")])
    assert [row["verdict"] for row in table_rows(tmp_path / "table.csv")] == ["failed: RuntimeError: on rank 1"]


def test_a_table_that_was_cut_off_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('setting,value,verdict\none,1,ok\ntwo,"2')
    assert markdown_table(path).splitlines()[2:] == ["| one | 1 | ok |", "| two | 2 |"]


def test_what_most_runs_are_comes_first() -> None:
    every = settings.settings(None, None, settings.HEADS)
    assert {(one.cp_size, one.tokens // one.cp_size) for one in every[:9]} == {
        (cp_size, shard) for cp_size in (2, 4, 8) for shard in (2048, 4096, 8192)
    }
    assert [one.cp_size for one in every[9:12]] == [64, 64, 512]
    assert {one.heads for one in every[:17]} == {(32, 8)}
    assert len(set(every)) == len(every)


MODULES = accuracy, efficiency, exact, gaps, jobs, loss_tiles, memory, on_host, parity, peers, step, tiles, traffic


@pytest.mark.parametrize("module", MODULES)
def test_every_measurement_takes_a_budget(module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options that the acceptance passes; nothing runs."""
    parsed = []
    parse = argparse.ArgumentParser.parse_args

    def stop(self, argv):
        parsed.append(parse(self, argv))
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    device = [] if module is traffic else ["--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        module.main(["--out", "x", "--smoke", "--budget", "30", *device])
    assert (parsed[0].smoke, parsed[0].budget, parsed[0].out) == (True, 30.0, Path("x"))
