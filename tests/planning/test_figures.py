"""What holds of the paper's evaluation and of the field's. What does not hold is in ``docs/paper.md``."""

from __future__ import annotations

import argparse
import json
from functools import cache

import pytest

from megatron_wallfacer.cli import simulate
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning import paper
from megatron_wallfacer.planning.field import Measured, pairs_in_order, replay_field
from megatron_wallfacer.planning.figures import Case, better, replay, summary
from megatron_wallfacer.planning.usp import PUBLISHED_MFU, usp_steps

#: Bars whose sign comes out wrong where each C stands at its better placement: C = 2 across slow Ethernet.
WRONG_SIGNS = {("A100_8", 65536, "wallfacer-2"), ("A100_8", 131072, "wallfacer-2")}


@cache
def cases(figure: int, reading: str) -> tuple[Case, ...]:
    return tuple(replay(figure, reading))


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    parser = argparse.ArgumentParser()
    simulate.add_parser(parser.add_subparsers())
    assert simulate.run_simulate(parser.parse_args(["simulate", *flags])) == 0
    return capsys.readouterr().out


def test_the_data_is_the_papers() -> None:
    points = paper.published(7)
    assert len(points) == 18
    assert len(paper.published(9)) == 8
    headline = {p.scheme: p.k_tokens_s for p in points if p.cluster.name == "H100_8" and p.tokens == 65536}
    assert headline["wallfacer-4"] / headline["ring"] == pytest.approx(1.7712, abs=0.005)


def test_there_is_one_calibration_for_each_cluster_and_one_program_for_all() -> None:
    assert paper.A100_8.device == paper.A100_16.device
    assert paper.A100_8.inter == paper.A100_16.inter
    assert {p.cluster.device for p in paper.published(9)} == {paper.H100_8.device}


@pytest.mark.parametrize("reading", ["each", "cluster", "teams-adjacent"])
def test_best_team_sizes_and_gains_of_figure_7(reading: str) -> None:
    found = summary(cases(7, reading))
    assert (found.best_right, found.cases, found.gains) == (6, 6, 12)
    assert found.error_points <= 15
    assert found.throughput_error <= 15


@pytest.mark.parametrize("reading", ["cluster", "teams-adjacent"])
def test_every_sign_with_one_placement_for_a_cluster(reading: str) -> None:
    assert summary(cases(7, reading)).signs_right == 12


def test_signs_with_each_team_size_at_its_better_placement() -> None:
    wrong = {
        (case.cluster.name, case.tokens, name)
        for case in cases(7, "each")
        for name in case.placements
        if (case.gain(name, paper=True) > 0) != (case.gain(name, paper=False) > 0)
    }
    assert wrong <= WRONG_SIGNS


def test_figure_9_crosses_after_one_node() -> None:
    gains = {case.cluster.ranks: case.gain("wallfacer-best", paper=False) for case in cases(9, "each")}
    assert list(gains) == [8, 16, 32, 64]
    assert gains[8] < 0 < gains[16] < gains[32] < gains[64]
    assert summary(cases(9, "each")).error_points <= 15


def test_a_best_team_size_that_is_wrong_is_told() -> None:
    case = cases(7, "each")[0]
    swapped = Case(
        7,
        case.cluster,
        case.model,
        case.tokens,
        case.paper,
        {"ring": 3.0, "wallfacer-2": 3.0, "wallfacer-4": 5.0},
        case.placements,
    )
    assert case.best_is_right
    assert not swapped.best_is_right
    assert summary([swapped]).best_right == 0


def test_the_planner_beats_the_papers_best_where_cards_are_slow() -> None:
    case = next(one for one in cases(7, "each") if one.cluster.name == "A100_8")
    found = better(case)
    assert found.paper_s / found.ours_s > 1.5
    assert found.ours_k_tokens_s > 1.2 * found.paper_k_tokens_s
    assert found.reason.startswith("bound by network cards")


def test_the_order_of_the_field_with_nothing_fitted() -> None:
    found = replay_field()
    right, pairs = pairs_in_order(found)
    assert pairs == 29
    assert right >= 27
    at_128k = sorted((one for one in found if one.tokens == 131072), key=lambda one: -one.predicted)
    assert [one.scheme for one in at_128k] == ["usp-head-first", "burst", "double-ring", "usp-ring-first", "ring"]
    # Bound by one card, a single ring is predicted in absolute terms too.
    for one in found:
        if one.scheme == "ring":
            assert one.predicted == pytest.approx(one.published, rel=0.1)


def test_the_training_step_of_usp_with_nothing_fitted() -> None:
    """Published 47 % MFU; what backward recomputes is not said, and without any the step does not fit."""
    found = {one.recompute: one for one in usp_steps()}
    assert [one.fits for one in found.values()] == [False, True, True]
    assert found["full"].mfu < PUBLISHED_MFU < found["none"].mfu
    assert found["keep-attention"].mfu == pytest.approx(PUBLISHED_MFU, rel=0.05)


def test_a_wrong_order_is_counted() -> None:
    found = [Measured(1, "a", 100, 1), Measured(1, "b", 50, 2), Measured(1, "c", 49, 3), Measured(2, "d", 1, 1)]
    assert pairs_in_order(found) == (1, 3)


def test_figures_that_are_not_replayed_are_refused() -> None:
    with pytest.raises(OptionError, match="figure=8: must be 7 or 9"):
        replay(8)
    with pytest.raises(OptionError, match="reading=all: must be one of each, cluster"):
        replay(7, "all")


def test_the_command_prints_the_summary_and_the_wrong_orders(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--figure", "9")
    assert "sign of the gain right 4 of 4" in text
    assert "best C right" not in text
    text = run(capsys, "--field")
    assert "order right for 27 of 29 pairs" in text
    assert "published 4, ours 5" in text
    assert "keep-attention               47             47.6" in text


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
