"""The page of results: written anew after every command, so that it is whole whenever the run is cut off."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.parts import Command, Part
from benchmarks.gpu.tables import ERROR, GOOD, VERDICT, markdown_line, markdown_table, table_rows

_TAIL = 15


@dataclass
class Outcome:
    """How one command went.

    Attributes:
        command: the measurement.
        typed: its command line.
        folder: folder of its tables.
        log: its log.
        limit_s: its time limit.
        seconds: time that it took; None until it has run.
        code: exit code; None if it was killed at its limit.
    """

    command: Command
    typed: str
    folder: Path
    log: Path
    limit_s: float = 0.0
    seconds: float | None = None
    code: int | None = None

    @property
    def verdict(self) -> str:
        """One phrase for the table of parts."""
        if self.seconds is None:
            return "not run"
        if self.code is None:
            return f"killed after {self.limit_s:.0f} s"
        return "ok" if self.code == 0 else f"exit code {self.code}"

    @property
    def counts(self) -> str:
        """How many rows there are of each kind of verdict."""
        counts: dict[str, int] = {}
        for path in self.tables:
            for row in table_rows(path):
                verdict = row.get(VERDICT) or ""
                kind = next((good for good in GOOD if verdict.startswith(good)), verdict.partition(":")[0])
                counts[kind or "measured"] = counts.get(kind or "measured", 0) + 1
        return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "-"

    @property
    def tables(self) -> list[Path]:
        """Its tables so far."""
        return sorted(self.folder.glob("*.csv")) if self.folder.is_dir() else []

    def tail(self) -> list[str]:
        """The first line of the log that names an error, and the last lines."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        first = next((line for line in lines if ERROR.search(line)), None)
        last = lines[-_TAIL:]
        return last if first is None or first in last else [first, "...", *last]


@dataclass
class Results:
    """All outcomes, by part.

    Attributes:
        page: file to write.
        title: heading.
        notes: lines under the heading, such as versions.
        outcomes: (part, its commands' outcomes) in order.
    """

    page: Path
    title: str
    notes: list[str] = field(default_factory=list)
    outcomes: list[tuple[Part, list[Outcome]]] = field(default_factory=list)

    def write(self) -> None:
        """Replace the page in one step."""
        new = self.page.with_suffix(".new")
        new.write_text(self._text(), encoding="utf-8")
        os.replace(new, self.page)

    def _text(self) -> str:
        heading = ("part", "command", "result", "rows", "seconds", "limit s", "log")
        lines = [f"# {self.title}", "", *self.notes, "", markdown_line(heading), markdown_line(("---",) * len(heading))]
        for part, outcomes in self.outcomes:
            for one in outcomes:
                seconds = "-" if one.seconds is None else f"{one.seconds:.0f}"
                limit, log = f"{one.limit_s:.0f}" if one.limit_s else "-", one.log.relative_to(self.page.parent)
                name = one.command.name
                lines.append(markdown_line((part.name, name, one.verdict, one.counts, seconds, limit, log)))
        for part, outcomes in self.outcomes:
            lines += ["", f"## {part.title}"]
            for one in outcomes:
                lines += _section(one)
        return "\n".join(lines) + "\n"


def _section(one: Outcome) -> Sequence[str]:
    """Command line, tables, and the end of the log where something went wrong."""
    lines = ["", f"    {one.typed}"]
    for path in one.tables:
        lines += ["", f"`{path.name}`", "", markdown_table(path)]
    if one.seconds is not None and one.code != 0:
        lines += ["", f"**{one.verdict}.** End of the log:", "", *(f"    {line}" for line in one.tail())]
    return lines
