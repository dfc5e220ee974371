"""Two checkouts by turns: what runs where, and the table of their samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import paired

STUB = """#!/bin/sh
echo "$PWD $*" >>{log}
while [ $# -gt 0 ]; do [ "$1" = --out ] && out=$2; shift; done
mkdir -p "$out"
echo '{{"machine": "two cores", "versions": {{"repository": "{name}"}}}}' >"$out/run.json"
printf 'scheme,turn,seconds\\nring,0,{first}\\nring,1,{second}\\n' >"$out/samples.csv"
exit {code}
"""


def checkout(folder: Path, log: Path, first: float, second: float, code: int = 0) -> Path:
    """Root of a checkout whose interpreter only notes how it was started, and leaves two samples."""
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB.format(log=log, name=folder.name, first=first, second=second, code=code))
    python.chmod(0o755)
    return folder


def test_both_run_by_turns_and_ratios_are_this_over_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (checkout(tmp_path / name, tmp_path / "log", *times) for name, times in (("a", (2, 4)), ("b", (3, 6))))
    monkeypatch.setattr(paired, "ROOT", new)
    assert paired.main([str(old), "c-2x4", "--schemes", "ring", "--turns", "2", "--out", str(tmp_path / "out")]) == 0
    runs = (tmp_path / "log").read_text().splitlines()
    assert [Path(run.split()[0]).name for run in runs] == ["a", "b", "b", "a"]
    assert "-m benchmarks.emulated benchmarks/configs/c-2x4.yaml --schemes ring --repeats 2" in runs[0]
    printed = capsys.readouterr().out
    assert "two cores; {'repository': 'a'}" in printed
    assert "| c-2x4 | ring | 3.000 | 4.500 | 1.500 | 1.500, 1.500 |" in printed


def test_a_run_that_fails_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paired, "ROOT", checkout(tmp_path / "b", tmp_path / "log", 1, 1))
    old = checkout(tmp_path / "a", tmp_path / "log", 1, 1, code=3)
    assert paired.main([str(old), "c-2x4", "--schemes", "ring", "--out", str(tmp_path / "out")]) == 3
    assert f"c-2x4 in {old} ended with exit code 3" in capsys.readouterr().err
