"""``wallfacer trace``: one trace, one plot and one table of the files of all ranks, or one line with the error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.engine.timeline import ROWS
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.traces.clocks import on_one_clock
from megatron_wallfacer.traces.timelines import parse_ranks, read_timelines
from tests.engine.test_timeline import check_trace
from tests.traces.recorded import RANKS, RING, TEAM, events, rank_timeline, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four ranks on one host."""
    return write_run(tmp_path / "run", [rank_timeline(rank) for rank in range(RANKS)])


Told = Callable[..., dict]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """The JSON that a command prints."""

    def ask(*words: object) -> dict:
        assert main(["trace", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


# --- what comes out ---


def test_the_table_has_the_times_of_each_rank(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(run)]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == "rank passes attention s computing s exposed s exposed".split()
    assert rows[0].split() == "0 3 4.0000 3.7000 0.0000 0.0%".split()
    assert rows[3].split() == "3 3 4.0000 2.8000 0.9000 22.5%".split()
    assert rows[4].startswith("slowest: rank ")
    assert rows[5] == "least exposed: rank 0, 0.0000 s; the other ranks wait for it"
    assert rows[6] == "clocks: one node, one clock"
    assert rows[7] == f"written: {run}/timeline.json (open it in ui.perfetto.dev), {run}/timeline.png"


def test_the_slowest_rank_is_named(tmp_path: Path, told: Told) -> None:
    late = rank_timeline(2)
    last = late.events[-2]
    assert last.row == "pass"
    late = replace(late, events=(*late.events[:-2], replace(last, end=last.end + 1.0), late.events[-1]))
    found = told(write_run(tmp_path, [late if rank == 2 else rank_timeline(rank) for rank in range(RANKS)]))
    assert (found["slowest"], found["least_exposed"]) == (2, 0)
    assert found["ranks"][2]["attention_s"] == pytest.approx(5.0)


def test_one_file_has_every_rank(run: Path, told: Told, tmp_path: Path) -> None:
    found = told(run, "--out", tmp_path / "made" / "here")
    trace = json.loads(Path(found["files"][0]).read_text())
    assert trace["otherData"]["clocks"] == "one node, one clock"
    assert {event["pid"] for event in trace["traceEvents"]} == set(range(RANKS))
    for rank in range(RANKS):
        mine = [event for event in trace["traceEvents"] if event["pid"] == rank]
        check_trace([event for event in mine if event["name"] != "process_sort_index"])
        assert sum(event["ph"] in "Xb" for event in mine) == len(events(rank))
    # Ids are of the whole file.
    begun = [(event["cat"], event["id"]) for event in trace["traceEvents"] if event["ph"] == "b"]
    assert len(begun) == len(set(begun))
    assert min(event["ts"] for event in trace["traceEvents"] if "ts" in event) == 0
    # It can be read again.
    again = read_timelines(Path(found["files"][0]))
    assert [one.rank for one in again] == list(range(RANKS))
    assert [sum(event.row == row for event in again[3].events) for row in (*ROWS, RING, TEAM)] == [3, 3, 3, 3, 3, 1]


@pytest.mark.parametrize(("name", "attention", "exposed", "passes"), [("forward", 2, 0.6, 2), ("backward", 2, 0.3, 1)])
def test_one_kind_of_pass(run: Path, told: Told, name: str, attention: float, exposed: float, passes: int) -> None:
    found = told(run, "--pass", name)
    row = found["ranks"][3]
    assert (row["passes"], row["attention_s"], row["exposed_s"]) == (
        passes,
        pytest.approx(attention),
        pytest.approx(exposed),
    )
    trace = json.loads(Path(found["files"][0]).read_text())["traceEvents"]
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    names = [e["name"] for e in trace if e["ph"] == "X" and rows[e["pid"], e["tid"]] == "pass"]
    assert names == [name] * passes * RANKS
    assert TEAM not in rows.values()


def test_some_ranks(run: Path, told: Told) -> None:
    (run / "rank-1.json").unlink()
    assert [row["rank"] for row in told(run, "--ranks", "0,2-3")["ranks"]] == [0, 2, 3]


@pytest.mark.parametrize(("text", "ranks"), [("0", {0}), ("0-3", {0, 1, 2, 3}), ("0,2, 4-5", {0, 2, 4, 5})])
def test_ranks_are_named(text: str, ranks: set[int]) -> None:
    assert parse_ranks(text) == ranks


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-", "-1", "0;1"])
def test_ranks_that_are_not_written_so(text: str) -> None:
    with pytest.raises(OptionError, match="must be ranks such as 0-7"):
        parse_ranks(text)


def test_planned_traces_are_read_too(tmp_path: Path, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    planned = tmp_path / "plan.json"
    job = "--nodes 1 --cp 4 --tp 2 --seq 8K --scheme team-ring --team-size 2"
    assert main(["plan", *job.split(), "--trace", str(planned), "--json"]) == 0
    step = json.loads(capsys.readouterr().out)["step"]
    found = told(planned, "--out", tmp_path / "out")
    for row in found["ranks"]:
        assert row["passes"] == 2
        assert row["attention_s"] == pytest.approx(step["attention_s"], rel=0.05)
        assert 0 < row["computing_s"] + row["exposed_s"] <= row["attention_s"] * 1.0001


# --- clocks ---


def test_ranks_of_one_node_keep_their_distances() -> None:
    """Their offsets differ by how long it took to read two clocks."""
    timelines, told = on_one_clock([rank_timeline(0, wall_s=5.0), rank_timeline(1, wall_s=5.0 + 1e-4)])
    assert [one.events[0].start for one in timelines] == [0.0, 0.0]
    assert told == "one node, one clock"


def test_nodes_are_aligned_by_their_wall_clocks() -> None:
    """The same moment on nodes that started at different times."""
    timelines, told = on_one_clock(
        [
            rank_timeline(0, "a", wall_s=500.0),
            rank_timeline(1, "b", wall_s=1400.25, start=100.0),
            rank_timeline(2, "b", wall_s=1400.3, start=100.5),
        ]
    )
    assert [one.events[0].start for one in timelines] == pytest.approx([0.0, 0.25, 0.75])
    assert told.startswith("2 nodes, aligned by their wall clocks, which NTP keeps within milliseconds")
    assert "wrong" not in told


def test_a_wall_clock_that_is_wrong_is_noticed() -> None:
    _, told = on_one_clock([rank_timeline(0, "a"), rank_timeline(1, "b", wall_s=3600.0)])
    assert told.endswith("b and a are never busy together: a wall clock is wrong")


def test_files_without_a_host_name_are_noted(tmp_path: Path, told: Told) -> None:
    """As the benchmarks write them."""
    found = told(write_run(tmp_path, [replace(rank_timeline(rank), origin=None) for rank in range(2)]))
    assert found["clocks"] == "treated as one clock: the files do not name their nodes"


def test_the_table_has_hosts_where_there_are_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, [rank_timeline(rank, f"node-{rank // 2}") for rank in range(RANKS)])
    assert main(["trace", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[4].split()[:3] == ["3", "node-1", "3"]


def test_times_of_a_host_that_only_launches_are_noted(tmp_path: Path, told: Told) -> None:
    timelines = [rank_timeline(rank) for rank in range(RANKS)]
    cuda = [replace(one, origin=replace(one.origin, device="cuda")) for one in timelines]
    assert told(write_run(tmp_path, cuda))["times"].startswith("of the host, which launches CUDA work and continues")
    assert "times" not in told(write_run(tmp_path, timelines))


# --- what cannot be read ---


def broken(run: Path) -> None:
    (run / "rank-2.json").write_text('{"traceEvents": [')


def no_trace(run: Path) -> None:
    (run / "rank-2.json").write_text("[]")


def foreign(run: Path) -> None:
    (run / "rank-2.json").write_text('{"traceEvents": [{"ph": "X", "pid": 2, "tid": 0, "name": "x"}]}')


def other_run(run: Path) -> None:
    other = rank_timeline(2)
    write_run(run, [replace(other, origin=replace(other.origin, run="another"))])


def older_form(run: Path) -> None:
    write_run(run, [replace(rank_timeline(2), origin=None)])


def no_origin(run: Path) -> None:
    trace = json.loads((run / "rank-2.json").read_text())
    del trace["otherData"]["host"]
    (run / "rank-2.json").write_text(json.dumps(trace))


def other_rank(run: Path) -> None:
    shutil.copy(run / "rank-1.json", run / "rank-2.json")


def without_passes(run: Path) -> None:
    one = rank_timeline(2)
    write_run(run, [replace(one, events=tuple(event for event in one.events if event.row != "pass"))])


def missing(run: Path) -> None:
    (run / "rank-1.json").unlink()
    (run / "rank-3.json").unlink()


def empty(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()


DAMAGES = {
    broken: "rank-2.json:1: cannot be read as JSON: ",
    no_trace: "rank-2.json:1: must be a trace with a list traceEvents",
    foreign: "rank-2.json:1: is not an event of --wallfacer-timeline: KeyError",
    other_run: "rank-2.json and rank-0.json belong to two runs; remove the older file",
    older_form: "rank-2.json and rank-0.json belong to two runs; remove the older file",
    no_origin: "rank-2.json:1: the fields run, node and clock cannot be read: KeyError('host')",
    other_rank: "rank-2.json:1: must contain rank 2 only, contains rank 1",
    without_passes: "contains no attention pass of rank 2",
    missing: (
        "ranks 1, 3 missing; copy the files of the other nodes into this folder, or list with --ranks only ranks "
        "that are present: ranks 0, 2"
    ),
    empty: "contains no rank-R.json; training writes these files with --wallfacer-timeline DIR",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_cannot_be_read_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    damage(run)
    check_error(capsys, [str(run)], DAMAGES[damage])
    assert not (run / "timeline.json").exists()


def check_error(capsys: pytest.CaptureFixture[str], words: list[str], why: str) -> None:
    assert main(["trace", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("wallfacer: error: ")
    assert why in told
    assert told.count("\n") == 1


def test_missing_input_is_an_error(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_error(capsys, [str(tmp_path / "nowhere")], "nowhere: must be an existing folder or file")
    check_error(capsys, [str(run), "--ranks", "2-5"], "ranks 4, 5 missing")
    one = write_run(tmp_path / "one", [replace(rank_timeline(0), events=rank_timeline(0).events[:5])])
    check_error(capsys, [str(one), "--pass", "backward", "--ranks", "0"], "contains no backward pass of rank 0")


def test_what_is_read_is_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(run)]) == 0
    check_error(capsys, [str(run / "timeline.json")], "which would be overwritten")


def test_the_plot_may_be_svg(run: Path, told: Told) -> None:
    path = Path(told(run, "--picture", "svg")["files"][1])
    assert path.name == "timeline.svg"
    assert "<svg" in path.read_text()[:2000]
