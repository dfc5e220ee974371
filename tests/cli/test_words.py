"""The command prints what the schedules count."""

import json

import pytest

from megatron_wallfacer.cli.main import main

NAMED = {"team-ring": 1.00, "wallfacer": 1.57, "ring": 4.50, "all-gather": 4.50}


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["words", *flags]) == 0
    return capsys.readouterr().out


def test_json_has_the_known_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--cp-size", "64", "--group", "1", "--json"))
    assert {row["scheme"]: round(row["forward_ratio"], 2) for row in found} == NAMED


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "--cp-size", "64", "--group", "1").splitlines()[2:]
    assert {line.split()[2]: float(line.split()[-3]) for line in lines} == NAMED


def test_the_best_team_ring_is_within_a_tenth_of_the_bound_to_two_digits(capsys: pytest.CaptureFixture[str]) -> None:
    best = [row for row in json.loads(run(capsys, "--json")) if row["scheme"] == "team-ring"]
    assert len(best) == 12
    assert all(round(row["forward_ratio"], 2) <= 1.10 for row in best)
    assert all(round(row["backward_ratio"], 2) <= 1.10 for row in best)


def test_a_size_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["words", "--cp-size", "0"]) == 2
    assert capsys.readouterr().err.startswith("wallfacer: error: cp_size=0: must be")
