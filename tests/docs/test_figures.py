"""The pictures that need no training are drawn by one command, from committed data and from the schedules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.figures.__main__ import IMAGES, main


def test_the_command_draws_the_committed_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["figures", "--out", str(tmp_path)])
    main()
    drawn = {path.name for path in tmp_path.iterdir()}
    # The loss is drawn by `make demo`, which trains.
    assert drawn | {"loss.png"} == {path.name for path in IMAGES.iterdir()}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
