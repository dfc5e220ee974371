"""Runs the tests of every row of docs/reliability.md: ``python -m tests.faults [--only TEXT] [--list] [--write]``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import pytest

from tests.faults.row import Row
from tests.faults.rows import ROWS
from tests.faults.table import write


class Outcomes:
    """A plugin of pytest that keeps how each test ended.

    Attributes:
        by_test: ``passed``, ``failed`` or ``skipped`` by node id.
    """

    def __init__(self) -> None:
        self.by_test: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of the call, or of a set-up that did not pass."""
        if report.when == "call" or not report.passed:
            self.by_test[report.nodeid] = report.outcome

    def of(self, row: Row) -> str:
        """Return ``ok``, ``FAILED``, ``skipped`` or ``not tried``."""
        if not row.tests:
            return "not tried"
        ends = [end for test in row.tests for node, end in self.by_test.items() if _is_part(node, test)]
        if not ends or "failed" in ends:
            return "FAILED"
        return "ok" if "passed" in ends else "skipped"


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 where no row failed."""
    options = _parse(argv)
    if options.write:
        write()
        return 0
    chosen = [row for row in ROWS if options.only in row.fault]
    if options.list:
        print("\n".join(f"{row.fault}: {', '.join(row.tests) or 'not tried'}" for row in chosen))
        return 0
    outcomes, started = Outcomes(), time.monotonic()
    tests = dict.fromkeys(test for row in chosen for test in row.tests)
    code = pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *tests], plugins=[outcomes]) if tests else 0
    ends = [(outcomes.of(row), row) for row in chosen]
    print("\n".join(f"{end:<10} {row.fault}" for end, row in ends))
    good = sum(end == "ok" for end, _ in ends)
    print(f"{good} of {len(ends)} rows ok; {(time.monotonic() - started) / 60:.1f} minutes")
    return int(not chosen or code != 0 or any(end == "FAILED" for end, _ in ends))


def _is_part(node: str, test: str) -> bool:
    """Return whether a node id is a test, one of its parameters, or in a file."""
    return node == test or node.startswith((f"{test}[", f"{test}::"))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose fault has this text")
    parser.add_argument("--list", action="store_true", help="print rows and tests, run nothing")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md, run nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
