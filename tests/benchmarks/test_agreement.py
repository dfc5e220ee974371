"""The timing of the comparison at start."""

from __future__ import annotations

import pytest

from benchmarks.agreement import ARGUMENTS, main


def test_both_times_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--ranks", "6"])
    agree, differ = capsys.readouterr().out.splitlines()
    assert agree.startswith(f"6 ranks, {ARGUMENTS} arguments: ")
    assert agree.endswith("; all agree")
    assert differ.endswith("; rank 0 has --argument-number-7 8, ranks 1-5 have 7")
