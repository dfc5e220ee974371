"""``wallfacer simulate``: one configuration on a modelled cluster."""

from __future__ import annotations

import argparse
import json

import pytest

from megatron_wallfacer.cli import simulate
from megatron_wallfacer.errors import OptionError


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    parser = argparse.ArgumentParser()
    simulate.add_parser(parser.add_subparsers())
    assert simulate.run_simulate(parser.parse_args(["simulate", *flags])) == 0
    return capsys.readouterr().out


def test_the_command_plays_any_configuration(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    flags = "--cluster h100-8x8 --nodes 2 --seq 128K --tp 2 --scheme team-ring --team-size 4".split()
    found = json.loads(run(capsys, *flags, "--json", "--trace", str(tmp_path / "a" / "trace.json")))
    assert (found["tokens"], found["ranks"], found["grid"]) == (131072, 16, "team 4 x ring_outer 2")
    assert found["spread"] == {"tp": 2, "pp": 1, "cp": 8, "dp": 1, "microbatches": 1}
    assert 0.1 < found["step"]["mfu"] < 0.6
    assert found["of_bound"] >= 1
    assert json.loads((tmp_path / "a" / "trace.json").read_text())["traceEvents"]
    text = run(capsys, *flags)
    assert "tokens/s, MFU" in text
    assert "tp 2, cp 8" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nodes 16 --scheme wallfacer", "cp=128: must be at most 64 with scheme wallfacer"),
        ("--nodes 64 --scheme ring", "scheme=ring: must be a grid with no axis above 256, unlike ring_outer 512"),
        ("--recompute some", "recompute=some: must be one of none, keep-attention, full"),
        ("--model gpt-5", "model=gpt-5: must be one of"),
        ("--seq 1x", "seq=1x: must be a number of tokens"),
        ("--scheme wallfacer --team-size 3", "team_size=3: must be one of 1, 2, 4, 8"),
    ],
)
def test_impossible_requests_are_one_line(capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as refused:
        run(capsys, *flags.split())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "tokens"), [("65536", 65536), ("128K", 131072), ("1m", 2**20), ("2G", 2**31)])
def test_lengths(text: str, tokens: int) -> None:
    assert simulate.token_count(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5M", "1T", "K"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(OptionError, match="must be a number of tokens such as"):
        simulate.token_count(text)
