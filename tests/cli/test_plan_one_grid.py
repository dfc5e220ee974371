"""``wallfacer plan --scheme``: the prediction of one grid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_wallfacer.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["plan", *flags]) == 0
    return capsys.readouterr().out


def test_any_grid_is_predicted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = "--cluster h100-8x8 --nodes 2 --seq 128K --tp 2 --scheme team-ring --team-size 4".split()
    files = ["--trace", str(tmp_path / "a" / "trace.json"), "--save", str(tmp_path / "flags.yaml")]
    found = json.loads(run(capsys, *flags, "--json", *files))
    assert (found["tokens"], found["ranks"], found["grid"]) == (131072, 16, "team 4 x ring_outer 2")
    assert found["sizes"] == {"tp": 2, "pp": 1, "cp": 8, "dp": 1, "microbatches": 1}
    assert 0.1 < found["step"]["mfu"] < 0.6
    assert found["of_bound"] >= 1
    assert json.loads((tmp_path / "a" / "trace.json").read_text())["traceEvents"]
    saved = yaml.safe_load((tmp_path / "flags.yaml").read_text())["MODEL_ARGS"]
    assert (saved["--wallfacer-cp-size"], saved["--wallfacer-team-size"]) == (8, 4)
    text = run(capsys, *flags)
    assert "tokens/s, MFU" in text
    assert "tp 2, cp 8" in text


def test_options_change_the_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    """Each option of one grid reaches the simulation."""
    flags = "--nodes 2 --seq 128K --scheme team-ring --team-size 4 --json".split()

    def predicted(*more: str) -> dict:
        return json.loads(run(capsys, *flags, *more))

    plain = predicted()
    assert predicted("--microbatches", "2")["step"]["seconds"] > 1.9 * plain["step"]["seconds"]
    assert predicted("--recompute", "full")["step"]["seconds"] > plain["step"]["seconds"]
    assert predicted("--recompute", "full")["step"]["memory_gb"] < plain["step"]["memory_gb"]
    assert predicted("--keep-gathered-q")["step"]["memory_gb"] > plain["step"]["memory_gb"]
    assert predicted("--ring-inner-size", "2")["grid"] == "team 4 x ring_outer 2 x ring_inner 2"
    assert predicted("--placement", "rings-adjacent")["placement"] == ["ring_outer", "team"]
    assert predicted("--cuda-graphs")["step"]["memory_gb"] > plain["step"]["memory_gb"]
    assert not predicted("--memory", "40")["step"]["fits"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nodes 16 --scheme wallfacer", "cp=128: must be at most 64 with scheme wallfacer"),
        ("--nodes 64 --scheme ring", "scheme=ring: must be one with axes of at most 256 ranks, not ring_outer 512"),
        ("--scheme auto --recompute some", "recompute=some: must be one of none, keep-attention, full"),
        ("--scheme auto --model gpt-5", "model=gpt-5: must be one of"),
        ("--scheme auto --seq 1x", "seq=1x: must be a number of tokens"),
        ("--scheme wallfacer --team-size 3", "team_size=3: must be one of 1, 2, 4, 8"),
        ("--team-size 3", "--team-size 3: must be used with --scheme, because --scheme predicts one grid"),
        ("--keep-gathered-q", "--keep-gathered-q: must be used with --scheme"),
        ("--scheme ring --max-seq", "--max-seq: must be used without --scheme, because --scheme predicts one grid"),
        ("--scheme ring --plot x.png", "--plot x.png: must be used without --scheme"),
    ],
)
def test_impossible_requests_are_one_line(
    capsys: pytest.CaptureFixture[str], flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *flags.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"wallfacer: error: {message}")
    assert printed.err.count("\n") == 1
