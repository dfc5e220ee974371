"""``wallfacer volume`` prints what the schedules count."""

import json

import pytest

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.schedule.schemes import SCHEMES

#: P = 64, MHA with 64 heads: forward volume divided by the lower bound, and by that for whole shards.
NAMED = {
    "team-ring": 1.00,
    "wallfacer": 1.57,
    "ring": 4.50,
    "double-ring": 4.50,
    "burst": 4.50,
    "tokenring": 4.50,
    "all-gather": 4.50,
    "lss": 4.50,
    "mesh": 1.00,
    "ulysses": 0.14,
    "usp": 0.21,
    "loongtrain": 0.35,
    "best-forward": 1.00,
    "best-backward": 1.00,
    "best-forward-head": 0.14,
    "best-backward-head": 0.14,
}


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["volume", *flags]) == 0
    return capsys.readouterr().out


def found(capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict]:
    return json.loads(run(capsys, *flags, "--json"))


def test_json_has_the_known_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    rows = found(capsys, "--cp-size", "64", "--group", "1")
    assert {row["scheme"]: round(row["forward_ratio"], 2) for row in rows} == NAMED
    assert {row["scheme"]: round(row["forward_whole"], 2) for row in rows} == NAMED


def test_the_table_has_the_known_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "--cp-size", "64", "--group", "1").splitlines()[4:]
    assert {line.split()[2]: float(line.split()[-5]) for line in lines} == NAMED


def test_columns_are_aligned_with_their_headings(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys).splitlines()[3:]
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 120


def test_every_name_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = found(capsys, "--cp-size", "16", "--group", "4")
    names = [row["scheme"] for row in rows]
    assert set(SCHEMES) - {"auto"} == {name for name in names if not name.startswith("best-")}
    assert len(names) == len(set(names))


def test_the_best_team_ring_is_within_a_tenth_of_the_bound_to_two_digits(capsys: pytest.CaptureFixture[str]) -> None:
    best = [row for row in found(capsys) if row["scheme"] == "team-ring"]
    assert len(best) == 12
    assert all(round(row["forward_ratio"], 2) <= 1.10 for row in best)
    assert all(round(row["backward_ratio"], 2) <= 1.10 for row in best)


def test_best_rows_are_no_worse_than_any_name(capsys: pytest.CaptureFixture[str]) -> None:
    rows = found(capsys, "--cp-size", "16", "24", "64", "--q-heads", "16", "--group", "1", "4", "8")
    for cp_size, group in {(row["cp_size"], row["group"]) for row in rows}:
        here = {row["scheme"]: row for row in rows if (row["cp_size"], row["group"]) == (cp_size, group)}
        for way in ("forward", "backward"):
            there = {name: row[way] for name, row in here.items() if row[way] is not None}
            undivided = [volume for name, volume in there.items() if "head" not in here[name]["grid"]]
            assert there[f"best-{way}"] == pytest.approx(min(undivided))
            assert there[f"best-{way}-head"] == pytest.approx(min(there.values()))


def test_whole_shards_explain_the_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    """16 ranks and 8 query heads a kv head: a tenth above the bound for any work, none above that for whole shards."""
    rows = found(capsys, "--cp-size", "16", "--group", "8")
    (best,) = (row for row in rows if row["scheme"] == "best-forward")
    assert best["forward_ratio"] == pytest.approx(1.1007, abs=5e-5)
    assert best["forward_whole"] == 1.0


def test_a_scheme_that_cannot_divide_the_heads_has_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--cp-size", "16", "--group", "1", "--q-heads", "8")
    (row,) = (row for row in found(capsys, *flags) if row["scheme"] == "ulysses")
    assert row["grid"] == "heads do not divide"
    assert row["forward"] is row["forward_ratio"] is row["backward"] is None
    (line,) = (line for line in run(capsys, *flags).splitlines() if "ulysses" in line)
    assert line.split()[-6:] == ["-"] * 6


def test_a_size_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Before any row, also where other sizes are good."""
    for sizes in (["0"], ["4", "0"]):
        assert main(["volume", "--cp-size", *sizes]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("wallfacer: error: cp_size=0: must be")


@pytest.mark.parametrize("flags", ["--group 0", "--group 3", "--group 1 --q-heads 0"])
def test_heads_that_cannot_be_grouped_are_one_line(capsys: pytest.CaptureFixture[str], flags: str) -> None:
    assert main(["volume", "--cp-size", "4", *flags.split()]) == 2
    assert capsys.readouterr().err.startswith("wallfacer: error: group=")
