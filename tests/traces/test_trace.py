"""``wallfacer trace``: files of ranks become one trace, one picture and one table, or one line says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from matplotlib.colors import to_rgba

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.engine.origin import Origin
from megatron_wallfacer.engine.timeline import ROWS, Event, trace_events, write_trace
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.plots import timeline as picture
from megatron_wallfacer.traces.clocks import on_one_clock
from megatron_wallfacer.traces.timelines import RankLine, ranks_named, read_lines
from tests.engine.test_timeline import check_trace
from tests.plots.test_plots import check_png, check_texts

RANKS, RING, TEAM = 4, "ring_outer inputs", "team results"


def events(rank: int, start: float = 1000.0) -> tuple[Event, ...]:
    """Two forward passes of 1 s and a backward of 2 s, a second apart; rank r waits r * 0.1 s in each."""
    found: list[Event] = []
    for number, (name, seconds) in enumerate((("forward", 1.0), ("forward", 1.0), ("backward", 2.0))):
        begin, wait = start + 2 * number, 0.1 * rank
        end = begin + seconds
        found += [
            Event("copy", "Load", begin, begin + 0.1),
            Event("compute", "own.q x own.kv", begin + 0.1, end - wait),
            Event(RING, "block", begin + 0.05, end),
            Event("wait", "block", end - wait, end),
            Event("pass", name, begin, end),
        ]
    # Between passes, where other layers run: no pass has it.
    return (*found, Event(TEAM, "part", start + 1.2, start + 1.8))


def line(rank: int, host: str = "node", wall_s: float = 0.0, **changes: float) -> RankLine:
    return RankLine(rank, events(rank, **changes), Origin(rank, RANKS, "a run", "cpu", host, wall_s))


def write(folder: Path, lines: list[RankLine]) -> Path:
    for one in lines:
        about = one.origin and one.origin.as_dict()
        write_trace(trace_events(one.rank, one.events, ROWS), folder / f"rank-{one.rank}.json", about)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four ranks on one host."""
    return write(tmp_path / "run", [line(rank) for rank in range(RANKS)])


Told = Callable[..., dict]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """The JSON that a command prints."""

    def ask(*words: object) -> dict:
        assert main(["trace", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


# --- what comes out ---


def test_the_table_says_what_each_rank_did(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(run)]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == "rank passes attention s computing s exposed s exposed".split()
    assert rows[0].split() == "0 3 4.0000 3.7000 0.0000 0.0%".split()
    assert rows[3].split() == "3 3 4.0000 2.8000 0.9000 22.5%".split()
    assert rows[4].startswith("slowest: rank ")
    assert rows[5] == "waits least, so that others wait for it: rank 0, 0.0000 s exposed"
    assert rows[6] == "clocks: one host, one clock"
    assert rows[7] == f"written: {run}/timeline.json (open it in ui.perfetto.dev), {run}/timeline.png"


def test_the_slowest_rank_is_named(tmp_path: Path, told: Told) -> None:
    late = line(2)
    last = late.events[-2]
    assert last.row == "pass"
    late = replace(late, events=(*late.events[:-2], replace(last, end=last.end + 1.0), late.events[-1]))
    found = told(write(tmp_path, [late if rank == 2 else line(rank) for rank in range(RANKS)]))
    assert (found["slowest"], found["waits_least"]) == (2, 0)
    assert found["ranks"][2]["attention_s"] == pytest.approx(5.0)


def test_one_file_has_every_rank(run: Path, told: Told, tmp_path: Path) -> None:
    found = told(run, "--out", tmp_path / "made" / "here")
    trace = json.loads(Path(found["files"][0]).read_text())
    assert trace["otherData"]["clocks"] == "one host, one clock"
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
    again = read_lines(Path(found["files"][0]))
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
    assert ranks_named(text) == ranks


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-", "-1", "0;1"])
def test_ranks_that_are_not_written_so(text: str) -> None:
    with pytest.raises(OptionError, match="must be ranks such as 0-7"):
        ranks_named(text)


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


def test_ranks_of_a_host_are_not_moved_against_each_other() -> None:
    """Their offsets differ by how long it took to read two clocks."""
    lines, told = on_one_clock([line(0, wall_s=5.0), line(1, wall_s=5.0 + 1e-4)])
    assert [one.events[0].start for one in lines] == [0.0, 0.0]
    assert told == "one host, one clock"


def test_hosts_are_put_together_by_their_wall_clocks() -> None:
    """The same moment, told by machines that started at different times."""
    lines, told = on_one_clock(
        [
            line(0, "a", wall_s=500.0),
            line(1, "b", wall_s=1400.25, start=100.0),
            line(2, "b", wall_s=1400.3, start=100.5),
        ]
    )
    assert [one.events[0].start for one in lines] == pytest.approx([0.0, 0.25, 0.75])
    assert told.startswith("2 hosts, put together by their wall clocks, which NTP keeps within milliseconds")
    assert "wrong" not in told


def test_a_wall_clock_that_is_wrong_is_noticed() -> None:
    _, told = on_one_clock([line(0, "a"), line(1, "b", wall_s=3600.0)])
    assert told.endswith("even so b did nothing while a did: its wall clock is wrong")


def test_files_that_do_not_name_their_host_are_said_to(tmp_path: Path, told: Told) -> None:
    """As the benchmarks write them."""
    found = told(write(tmp_path, [replace(line(rank), origin=None) for rank in range(2)]))
    assert found["clocks"] == "taken as one clock: the time lines do not say which host they are from"


def test_hosts_stand_in_the_table_where_there_are_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(write(tmp_path, [line(rank, f"node-{rank // 2}") for rank in range(RANKS)]))]) == 0
    assert capsys.readouterr().out.splitlines()[4].split()[:3] == ["3", "node-1", "3"]


def test_times_of_a_host_that_only_launches_are_said_to_be(tmp_path: Path, told: Told) -> None:
    lines = [line(rank) for rank in range(RANKS)]
    cuda = [replace(one, origin=replace(one.origin, device="cuda")) for one in lines]
    assert told(write(tmp_path, cuda))["times"].startswith("of the host, which on CUDA launches and goes on")
    assert "times" not in told(write(tmp_path, lines))


# --- what cannot be read ---


def broken(run: Path) -> None:
    (run / "rank-2.json").write_text('{"traceEvents": [')


def no_trace(run: Path) -> None:
    (run / "rank-2.json").write_text("[]")


def foreign(run: Path) -> None:
    (run / "rank-2.json").write_text('{"traceEvents": [{"ph": "X", "pid": 2, "tid": 0, "name": "x"}]}')


def other_run(run: Path) -> None:
    other = line(2)
    write(run, [replace(other, origin=replace(other.origin, run="another"))])


def older_form(run: Path) -> None:
    write(run, [replace(line(2), origin=None)])


def no_origin(run: Path) -> None:
    trace = json.loads((run / "rank-2.json").read_text())
    del trace["otherData"]["host"]
    (run / "rank-2.json").write_text(json.dumps(trace))


def other_rank(run: Path) -> None:
    shutil.copy(run / "rank-1.json", run / "rank-2.json")


def without_passes(run: Path) -> None:
    one = line(2)
    write(run, [replace(one, events=tuple(event for event in one.events if event.row != "pass"))])


def missing(run: Path) -> None:
    (run / "rank-1.json").unlink()
    (run / "rank-3.json").unlink()


def empty(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()


SPOILT = {
    broken: "rank-2.json:1: cannot be read as JSON: ",
    no_trace: "rank-2.json:1: is not a trace: it has no list traceEvents",
    foreign: "rank-2.json:1: is not a time line of this program: KeyError",
    other_run: "rank-2.json is of another run than rank-0.json; remove the older one",
    older_form: "rank-2.json is of another run than rank-0.json; remove the older one",
    no_origin: "rank-2.json:1: what it says of its origin cannot be read: KeyError('host')",
    other_rank: "rank-2.json:1: is the time line of rank 1, not of rank 2",
    without_passes: "no pass of attention in the time line of rank 2",
    missing: "ranks 1, 3 missing; copy what other hosts wrote here, or name with --ranks those that are there: ranks 0",
    empty: "no rank-R.json in it; training writes them with --wallfacer-timeline DIR",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_read_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None]
) -> None:
    spoil(run)
    check_refused(capsys, [str(run)], SPOILT[spoil])
    assert not (run / "timeline.json").exists()


def check_refused(capsys: pytest.CaptureFixture[str], words: list[str], why: str) -> None:
    assert main(["trace", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("wallfacer: error: ")
    assert why in told
    assert told.count("\n") == 1


def test_what_was_asked_for_and_is_not_there(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(capsys, [str(tmp_path / "nowhere")], "nowhere: there is no such folder, nor such a file")
    check_refused(capsys, [str(run), "--ranks", "2-5"], "ranks 4, 5 missing")
    one = write(tmp_path / "one", [replace(line(0), events=line(0).events[:5])])
    check_refused(
        capsys, [str(one), "--pass", "backward", "--ranks", "0"], "no backward pass in the time line of rank 0"
    )


def test_what_is_read_is_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(run)]) == 0
    check_refused(capsys, [str(run / "timeline.json")], "which would be written over")


# --- the picture ---


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that were saved meanwhile."""
    figures, save = [], picture.save
    monkeypatch.setattr(picture, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


@pytest.mark.parametrize("ranks", [1, 4, 33, 80])
def test_ranks_are_drawn(tmp_path: Path, drawn: list, ranks: int) -> None:
    path = tmp_path / "made" / "line.png"
    picture.draw_trace([RankLine(rank, events(rank % 4, 0.0)) for rank in range(ranks)], path, "attention of a run")
    width, height = drawn[0].get_size_inches()
    check_png(path, round(150 * width), int(150 * height))
    check_texts(drawn[0])
    said = drawn[0].texts[0].get_text()
    assert said == "attention of a run" + ("; 64 of 80 ranks, --ranks chooses others" if ranks == 80 else "")


def test_exposed_time_has_its_own_colour_and_the_longest_wait_a_panel(tmp_path: Path, drawn: list) -> None:
    picture.draw_trace([RankLine(rank, events(rank, 0.0)) for rank in range(RANKS)], tmp_path / "line.png", "a run")
    both, zoomed = drawn[0].axes
    assert zoomed.get_title(loc="left") == "the forward pass in which a rank waited longest: rank 3"
    assert zoomed.get_xlim()[1] == pytest.approx(1060)
    exposed = to_rgba(picture.DOES["wait"])
    marked = [boxes for boxes in both.collections if tuple(boxes.get_facecolor()[0]) == exposed]
    widths = [path.get_extents().width for boxes in marked for path in boxes.get_paths()]
    assert sorted(widths) == pytest.approx(sorted(100.0 * rank for rank, _ in product(range(RANKS), range(3))))


def test_a_picture_may_be_svg(run: Path, told: Told) -> None:
    path = Path(told(run, "--picture", "svg")["files"][1])
    assert path.name == "timeline.svg"
    assert "<svg" in path.read_text()[:2000]
