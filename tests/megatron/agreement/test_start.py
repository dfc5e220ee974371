"""Ranks of Megatron that disagree end before they make groups, and say in what."""

from __future__ import annotations

import json

import pytest

from megatron_wallfacer.engine.agreement.compare import ranks_text
from tests.megatron.training import arguments
from tests.support.megatron_runs import REPOSITORY, RunResult, train

LIMIT_S = 30
DISAGREEING = REPOSITORY / "tests" / "support" / "disagreeing.py"
CP = ("--wallfacer-cp-size", "2")


def run(own: dict[int, dict], *flags: str, ranks: int = 2) -> RunResult:
    """One run in which some ranks change their command line."""
    variables = {"DISAGREE": json.dumps(own)}
    return train(ranks, arguments(*flags, iterations=1), script=DISAGREEING, env=variables, timeout_s=LIMIT_S)


def errors(run: RunResult) -> list[list[str]]:
    """The error lines of each rank, each of which ended by itself."""
    assert all((rank.end, rank.exit_code) == ("ended", 2) for rank in run.ranks), run.ranks
    return [[line for line in rank.output.splitlines() if "wallfacer: error: " in line] for rank in run.ranks]


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ({1: {"flags": ["--window-size", "200,0"]}}, "rank 1 has --window-size 200,0, rank 0 has 100,0"),
        ({0: {"flags": ["--wallfacer-head-groups", "2"]}}, "rank 1 has no --wallfacer-head-groups, rank 0 has 2"),
        ({1: {"without": ["--wallfacer-cp-size"]}}, "rank 1 has no --wallfacer-cp-size, rank 0 has 2"),
    ],
    ids=["window", "head groups on rank 0", "plugin off"],
)
def test_every_rank_ends_with_a_line_for_the_setting(own: dict, line: str) -> None:
    result = run(own, *CP, "--window-size", "100,0")
    assert result.seconds < LIMIT_S
    for lines in errors(result):
        assert [one.partition("wallfacer: error: ")[2].removeprefix("rank 0: ") for one in lines] == [line]


#: Flags that each of four ranks adds, with the value that the others have.
FOUR = {
    0: {"--lr 0.001": "0.002", "--seed 5": "1234", "--clip-grad 0.5": "1.0"},
    1: {"--window-size 200,0": "100,0", "--wallfacer-head-groups 2": "none", "--adam-beta1 0.8": "0.9"},
    2: {"--wallfacer-scheme ulysses": "auto", "--wallfacer-verify-every 3": "none", "--weight-decay 0.5": "0.01"},
    3: {"--init-method-std 0.1": "0.02", "--rotary-base 5000": "10000", "--distributed-timeout-minutes 20": "10"},
}


def test_twelve_settings_on_four_ranks_have_a_line_each() -> None:
    own = {rank: {"flags": " ".join(flags).split(), "poll": LIMIT_S} for rank, flags in FOUR.items()}
    result = run(own, "--wallfacer-cp-size", "4", "--window-size", "100,0", ranks=4)
    assert result.seconds < LIMIT_S
    wanted = {
        f"wallfacer: error: rank {rank} has {flag}, {ranks_text({0, 1, 2, 3} - {rank})} have {usual}"
        for rank, flags in FOUR.items()
        for flag, usual in flags.items()
    }
    assert len(wanted) == 12
    for lines in errors(result):
        assert set(lines) == wanted


def test_paths_may_differ_and_a_late_rank_is_waited_for() -> None:
    result = run(
        {1: {"flags": ["--titles-data-path", "/tmp/b"], "sleep": 1}}, *CP, "--titles-data-path", "/tmp/a"
    ).check()
    assert len(result.losses) == 1
    assert "wallfacer: warning: rank 1 has --titles-data-path /tmp/b, rank 0 has /tmp/a" in result.ranks[0].output


def test_without_the_plugin_on_any_rank_nothing_is_compared() -> None:
    result = run({1: {"flags": ["--log-interval", "2"]}}, ranks=2).check()
    assert "wallfacer: error" not in result.ranks[0].output
