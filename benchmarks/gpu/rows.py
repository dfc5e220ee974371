"""A table whose rows are printed and saved as each is measured, so that a time limit loses one row at most."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ranks import ALONE, Ranks
from benchmarks.gpu.tables import ERROR, GOOD, VERDICT, markdown_line
from megatron_wallfacer.errors import OptionError, WallfacerError


class LeftOut(WallfacerError):
    """A setting cannot be measured here, and that is no failure."""


class Rows:
    """Rows of one table: columns that name a setting, columns of measured values, and a verdict.

    Args:
        name: name of the table; ``NAME.csv`` in ``options.out``.
        setting: columns that name what is measured.
        values: columns of measured values.
        options: ``out`` (folder or None) and ``budget`` (seconds from now, or None for no limit).
        ranks: ranks that measure together; rank 0 decides about the budget, prints and saves.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        setting: Sequence[str],
        values: Sequence[str],
        options: argparse.Namespace,
        *,
        ranks: Ranks = ALONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setting, self._values, self._ranks, self._clock = tuple(setting), tuple(values), ranks, clock
        self._budget: float | None = options.budget
        self._begin = clock()
        self._longest, self._largest_cost = 0.0, 0.0
        self._path: Path | None = options.out / f"{name}.csv" if options.out is not None else None
        self.verdicts: list[str] = []
        if ranks.rank == 0:
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.write_text("", encoding="utf-8")
            heading = (*self._setting, *self._values, VERDICT)
            self._put(heading)
            print(markdown_line(("---",) * len(heading)), flush=True)

    def measure(
        self, setting: Sequence[object], work: Callable[[], Iterable[Sequence[object]]], cost: float = 1.0
    ) -> bool:
        """Measure one setting; save its rows, why it failed, or that there was no time. Collective over the ranks.

        Args:
            setting: as many values as there are such columns.
            work: gives rows of measured values, each with its verdict last.
            cost: expected time relative to other settings of this table, to stop before the budget ends.

        Returns:
            Whether it was measured.
        """
        if self._ranks.first(not self._fits(cost)):
            self.add(setting, f"not measured: the budget of {self._budget:g} s")
            return False
        begin = self._clock()
        if self._ranks.rank == 0:
            print(f"measuring {' '.join(map(str, setting))}", file=sys.stderr, flush=True)
        measured, reason = _attempt(work)
        reasons = [one for one in self._ranks.all(reason) if one]
        self._longest = max(self._longest, self._clock() - begin)
        self._largest_cost = max(self._largest_cost, cost)
        if reasons:
            self.add(setting, reasons[0])
            return False
        for *values, verdict in measured:
            self.add(setting, verdict, values)
        return True

    def add(self, setting: Sequence[object], verdict: object, values: Sequence[object] = ()) -> None:
        """Print and save a row that was measured elsewhere. Not collective."""
        self.verdicts.append(str(verdict))
        if self._ranks.rank == 0:
            self._put((*setting, *(values or ("-",) * len(self._values)), verdict))

    def _fits(self, cost: float) -> bool:
        """Whether a setting will end within the budget, by the longest so far."""
        if self._budget is None:
            return True
        growth = max(1.0, cost / self._largest_cost) if self._largest_cost else 1.0
        return self._clock() - self._begin + self._longest * growth <= self._budget

    def _put(self, cells: Sequence[object]) -> None:
        print(markdown_line(cells), flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file).writerow(cells)
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> int:
        """Name the settings that were not measured.

        Returns:
            An exit code: 1 if a setting failed or is not as it must be.
        """
        missing = sum(verdict.startswith("not measured: the budget") for verdict in self.verdicts)
        if missing and self._ranks.rank == 0:
            print(f"{missing} of {len(self.verdicts)} rows not measured: budget {self._budget:g} s", file=sys.stderr)
        return int(any(verdict and not verdict.startswith(GOOD) for verdict in self.verdicts))


def _attempt(work: Callable[[], Iterable[Sequence[Any]]]) -> tuple[list[Sequence[Any]], str]:
    """Measured rows, and why there are none."""
    try:
        return list(work()), ""
    except (OptionError, LeftOut) as error:
        return [], f"left out: {first_line(error)}"
    except Exception as error:  # a library's own; the other settings are still worth their time
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [], f"failed: {type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Return an error's first line, and the first line below it that names another error."""
    first, *rest = [line.strip()[:200] for line in str(error).splitlines() if line.strip()] or ["no message"]
    cause = next((line for line in rest if ERROR.search(line)), "")
    return f"{first} {cause}".strip()
