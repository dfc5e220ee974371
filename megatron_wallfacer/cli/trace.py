"""Implement ``wallfacer trace``: merge the timelines of a run's ranks into one trace, one plot and one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.outputs import check_output
from megatron_wallfacer.errors import OptionError, WallfacerError

if TYPE_CHECKING:
    from megatron_wallfacer.traces.report import RankTotals
    from megatron_wallfacer.traces.timelines import RankTimeline

NAME = "timeline"
FORMATS = ("png", "svg")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``trace``."""
    parser = commands.add_parser("trace", help="merge the files of --wallfacer-timeline: trace, plot, times per rank")
    parser.add_argument("path", type=Path, metavar="DIR", help="folder of rank-R.json, or a file of plan --trace")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder for {NAME}.json and {NAME}.png (default: the input's folder)"
    )
    parser.add_argument("--ranks", metavar="LIST", help="ranks such as 0-7 or 0,2,4-6 (default: all)")
    parser.add_argument(
        "--pass", dest="pass_name", choices=("forward", "backward"), help="kind of attention pass (default: both)"
    )
    parser.add_argument("--picture", choices=FORMATS, default=FORMATS[0], help="format of the plot (default: png)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_trace)


def run_trace(arguments: argparse.Namespace) -> int:
    """Write the trace and the plot, and print the times per rank."""
    from megatron_wallfacer.traces.clocks import on_one_clock
    from megatron_wallfacer.traces.report import least_exposed, rank_totals, slowest
    from megatron_wallfacer.traces.timelines import parse_ranks, read_timelines

    path: Path = arguments.path
    files = _output_files(arguments)
    for file in files:
        check_output("--out", file)
    ranks = None if arguments.ranks is None else parse_ranks(arguments.ranks)
    timelines, clocks = on_one_clock(_select_passes(read_timelines(path, ranks), arguments.pass_name, path))
    totals = [rank_totals(timeline) for timeline in timelines]
    notes = {"clocks": clocks} | _note_on_times(timelines)
    _write(timelines, arguments, files, notes)
    if arguments.json:
        ends = {"slowest": slowest(totals).rank, "least_exposed": least_exposed(totals).rank}
        summary = {"ranks": [asdict(row) for row in totals]} | ends | notes
        print(json.dumps(summary | {"files": [str(file) for file in files]}, indent=2))
        return 0
    _print(totals)
    for name, note in notes.items():
        print(f"{name}: {note}")
    print(f"written: {files[0]} (open it in ui.perfetto.dev), {files[1]}")
    return 0


def _select_passes(timelines: Sequence[RankTimeline], name: str | None, path: Path) -> list[RankTimeline]:
    """Keep the events of the pass ``name`` (forward or backward) of each timeline, or all if ``name`` is None."""
    from megatron_wallfacer.engine.timeline import by_pass

    if name is None:
        return list(timelines)
    selected = []
    for timeline in timelines:
        passes = ((event, inside) for event, inside in by_pass(timeline.events) if event.name == name)
        events = tuple(event for first, inside in passes for event in (first, *inside))
        if not events:
            raise WallfacerError(f"{path}: contains no {name} pass of rank {timeline.rank}")
        selected.append(replace(timeline, events=events))
    return selected


def _note_on_times(timelines: Sequence[RankTimeline]) -> dict[str, str]:
    """Return a note on the times if ranks used a GPU: the host's times do not show how long GPU work takes."""
    if not any(timeline.origin and timeline.origin.device == "cuda" for timeline in timelines):
        return {}
    return {"times": "of the host, which launches CUDA work and continues; they show the order, not the duration"}


def _output_files(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Return the trace file and the plot file. The trace file must not overwrite the timeline file."""
    source: Path = arguments.path
    folder: Path = arguments.out or (source if source.is_dir() else source.parent)
    trace, plot = folder / f"{NAME}.json", folder / f"{NAME}.{arguments.picture}"
    if trace.resolve() == source.resolve():
        raise OptionError("out", folder, f"another folder than that of {source}, which would be overwritten")
    return trace, plot


def _write(
    timelines: Sequence[RankTimeline], arguments: argparse.Namespace, files: tuple[Path, Path], notes: dict[str, str]
) -> None:
    from megatron_wallfacer.chrome_trace import trace_events, write_trace
    from megatron_wallfacer.plots.timeline import draw_timelines

    trace, plot = files
    events = [event for timeline in timelines for event in trace_events(timeline.rank, timeline.events)]
    order = [
        {"ph": "M", "pid": rank, "tid": 0, "name": "process_sort_index", "args": {"sort_index": rank}}
        for rank in (timeline.rank for timeline in timelines)
    ]
    write_trace([*order, *events], trace, notes)
    kind = f"{arguments.pass_name} " if arguments.pass_name else ""
    draw_timelines(timelines, plot, f"{kind}attention of {arguments.path.name or arguments.path}")


def _print(totals: Sequence[RankTotals]) -> None:
    """Print one row per rank. Then print the rank with the longest attention time and the rank that waits least."""
    from megatron_wallfacer.cli.table import show_table
    from megatron_wallfacer.traces.report import least_exposed, slowest

    has_hosts = len({row.host for row in totals}) > 1
    headings = (">rank", *([">host"] if has_hosts else []), ">passes")
    times = (">attention s", ">computing s", ">exposed s", ">exposed")
    rows = []
    for row in totals:
        seconds = (f"{value:.4f}" for value in (row.attention_s, row.computing_s, row.exposed_s))
        host = [row.host] if has_hosts else []
        rows.append((str(row.rank), *host, str(row.passes), *seconds, f"{row.exposed_share:.1%}"))
    show_table((*headings, *times), rows)
    last, least = slowest(totals), least_exposed(totals)
    above = last.attention_s / (sum(row.attention_s for row in totals) / len(totals)) - 1
    print(f"slowest: rank {last.rank}, {last.attention_s:.4f} s of attention, {above:.1%} above the mean")
    if len(totals) > 1:
        print(f"least exposed: rank {least.rank}, {least.exposed_s:.4f} s; the other ranks wait for it")
