"""``wallfacer trace``: the time lines of a run's ranks as one trace, one picture and one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.outputs import check_output
from megatron_wallfacer.errors import OptionError, WallfacerError

if TYPE_CHECKING:
    from megatron_wallfacer.traces.timelines import RankLine

NAME = "timeline"
PICTURES = ("png", "svg")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``trace``."""
    parser = commands.add_parser("trace", help="what each rank of a run did, from the files of --wallfacer-timeline")
    parser.add_argument("path", type=Path, metavar="DIR", help="folder of rank-R.json; or a file of plan --trace")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"where to write {NAME}.json and {NAME}.png (default: beside them)"
    )
    parser.add_argument("--ranks", metavar="LIST", help="only these, such as 0-7 or 0,2,4-6 (default: all)")
    parser.add_argument(
        "--pass", dest="pass_name", choices=("forward", "backward"), help="only these passes (default: both)"
    )
    parser.add_argument("--picture", choices=PICTURES, default=PICTURES[0], help="its format (default: png)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_trace)


def run_trace(arguments: argparse.Namespace) -> int:
    """Write the trace and the picture, print the table."""
    from megatron_wallfacer.traces.clocks import on_one_clock
    from megatron_wallfacer.traces.report import as_dict, print_rows, row_of
    from megatron_wallfacer.traces.timelines import ranks_named, read_lines

    path: Path = arguments.path
    files = _files(arguments)
    for file in files:
        check_output("--out", file)
    ranks = None if arguments.ranks is None else ranks_named(arguments.ranks)
    lines, clocks = on_one_clock(_passes(read_lines(path, ranks), arguments.pass_name, path))
    rows = [row_of(line) for line in lines]
    notes = {"clocks": clocks} | _times_of(lines)
    _write(lines, arguments, files, notes)
    if arguments.json:
        print(json.dumps(as_dict(rows) | notes | {"files": [str(file) for file in files]}, indent=2))
        return 0
    print_rows(rows)
    for name, note in notes.items():
        print(f"{name}: {note}")
    print(f"written: {files[0]} (open it in ui.perfetto.dev), {files[1]}")
    return 0


def _passes(lines: Sequence[RankLine], name: str | None, path: Path) -> list[RankLine]:
    """Only passes of this name, with what is in them; all unless given.

    Raises:
        WallfacerError: a rank has none.
    """
    from megatron_wallfacer.engine.totals import by_pass

    if name is None:
        return list(lines)
    chosen = []
    for line in lines:
        events = tuple(x for one, inside in by_pass(line.events) if one.name == name for x in (one, *inside))
        if not events:
            raise WallfacerError(f"{path}: no {name} pass in the time line of rank {line.rank}")
        chosen.append(replace(line, events=events))
    return chosen


def _times_of(lines: Sequence[RankLine]) -> dict[str, str]:
    """What is to be known of the times, where they are not those of the work itself."""
    if not any(line.origin and line.origin.device == "cuda" for line in lines):
        return {}
    return {"times": "of the host, which on CUDA launches and goes on; they say in which order, not how long"}


def _files(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The trace and the picture to write.

    Raises:
        OptionError: the trace would take the place of what is read.
    """
    source: Path = arguments.path
    folder: Path = arguments.out or (source if source.is_dir() else source.parent)
    trace, picture = folder / f"{NAME}.json", folder / f"{NAME}.{arguments.picture}"
    if trace.resolve() == source.resolve():
        raise OptionError("out", folder, f"another folder than that of {source}, which would be written over")
    return trace, picture


def _write(
    lines: Sequence[RankLine], arguments: argparse.Namespace, files: tuple[Path, Path], notes: dict[str, str]
) -> None:
    """Write one trace and one picture."""
    from megatron_wallfacer.engine.timeline import ROWS, trace_events, write_trace
    from megatron_wallfacer.plots.timeline import draw_trace

    trace, picture = files
    events = [event for line in lines for event in trace_events(line.rank, line.events, ROWS)]
    order = [
        {"ph": "M", "pid": line.rank, "tid": 0, "name": "process_sort_index", "args": {"sort_index": line.rank}}
        for line in lines
    ]
    write_trace([*order, *events], trace, notes)
    kind = f"{arguments.pass_name} " if arguments.pass_name else ""
    draw_trace(lines, picture, f"{kind}attention of {arguments.path.name or arguments.path}")
