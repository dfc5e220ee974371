"""The preset that the tutorial lets a reader write is one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_wallfacer.cli.main import main
from tests.docs.pages import ROOT

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
PLAN = re.search(r"^    wallfacer (plan .* --save best.yaml)$", TUTORIAL, re.MULTILINE)[1]
JOB = re.search(r"^```yaml\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)[1]


def test_the_planned_row_and_the_model_make_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "job.yaml").write_text(JOB)
    assert main(PLAN.split()) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if re.match(r" *\d+ +\w", line)).split("  ")
    assert first[0].strip() == "4"
    # What the page says of the row.
    assert {"64.2", "2.66"} <= {word.strip() for word in first}
    assert main(["config", "show", "job.yaml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    words = json.dumps(shown)
    for flag in ("--num-layers", "--wallfacer-ring-inner-size", "--tensor-model-parallel-size", "--nnodes", "--lr"):
        assert flag in words, flag
