"""A handful of combinations, trained: each level of each factor at least once. All: `python -m tests.composition`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.composition import matrix
from tests.composition.combination import Combination, Run, combinations_of_cover
from tests.composition.features import FACTORS
from tests.support.megatron_runs import RunResult

ITERATIONS = 4
FEW = 11
WRONG_MASK = Path(__file__).resolve().parents[1] / "support" / "wrong_mask.py"


@cache
def few() -> tuple[Combination, ...]:
    """Few combinations that together have every level: the one with most new ones, again and again.

    All of them in fp32, and one more in bf16 with gradients in bf16, the one that takes fewest runs.
    """
    every = combinations_of_cover()
    in_bf16 = [one for one in every if one.row["optimizer"] == "bf16-gradients"]
    fp32 = [Combination(one.number, one.row | {"dtype": "fp32"}) for one in every if one not in in_bf16]
    missing = {(factor, level) for factor, levels in FACTORS.items() for level in levels} - {("dtype", "bf16")}
    chosen = [min(in_bf16, key=lambda one: (one.weight, one.split.ranks))]
    missing -= set(chosen[0].row.items())
    while missing:
        best = max(fp32, key=lambda one: (len(missing & set(one.row.items())), -one.split.ranks))
        missing -= set(best.row.items())
        chosen.append(best)
    return tuple(chosen)


def plain(dtype: str = "fp32") -> Combination:
    """The first level of every factor."""
    return Combination(0, {factor: levels[0] for factor, levels in FACTORS.items()} | {"dtype": dtype})


def test_few_are_as_many_as_are_trained() -> None:
    assert len(few()) == FEW


@pytest.mark.parametrize("place", range(FEW))
def test_combination(place: int) -> None:
    outcome = matrix.run_combination(few()[place], ITERATIONS)
    assert outcome.verdict == "ok", outcome


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_mask_is_caught(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control, of the bf16 rule above all: what every run of the plugin has wrong widens no limit."""
    train = matrix._train

    def train_with_a_wrong_mask(run: Run, *args: object) -> RunResult:
        if "--wallfacer-cp-size" not in run.flags:
            return train(run, *args)
        with monkeypatch.context() as patch:
            patch.setattr(matrix, "SCRIPT", WRONG_MASK)
            return train.__wrapped__(run, *args)

    monkeypatch.setattr(matrix, "_train", train_with_a_wrong_mask)
    outcome = matrix.run_combination(plain(dtype), ITERATIONS)
    assert "differs by" in outcome.verdict
    assert outcome.loss > 1.5 * outcome.allowed


def test_the_orders_of_the_size_one_runs_are_not_the_same() -> None:
    runs = matrix._in_every_order(plain("bf16").whole, ITERATIONS, matrix.SEEDS[0])
    assert len({tuple(run.losses) for run in runs}) == len(runs)


def test_the_reason_is_that_of_the_first_rank_that_failed() -> None:
    text = "===== rank 1: exit code 1, ended\nValueError: the cause\nframe #1\n===== rank 0: x\nRuntimeError: closed"
    assert matrix._reason(text) == "ValueError: the cause"


def test_a_failed_run_leaves_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "===== rank 1: exit code 1, ended\nframe #0\nValueError: the cause\n===== rank 0: x\nRuntimeError: closed"

    def fails(*_: object) -> RunResult:
        raise AssertionError(text)

    monkeypatch.setattr(matrix, "_train", fails)
    monkeypatch.setattr(matrix, "LOGS", tmp_path / "composition")
    outcome = matrix.run_combination(Combination(7, plain().row), ITERATIONS)
    log = tmp_path / "composition" / "7.log"
    assert outcome.verdict == f"failed: ValueError: the cause; log: {log}"
    assert log.read_text() == text


def test_the_seed_is_the_first_that_is_far_from_a_tie() -> None:
    near, far = matrix.GAP / 2, matrix.GAP * 2
    assert matrix.first_far_enough((1, 2, 3), {1: near, 2: far, 3: far}.__getitem__) == 2
    assert matrix.first_far_enough((1, 2), {1: near / 2, 2: near}.__getitem__) == 2


def test_a_seed_leaves_room_below_both_tolerances() -> None:
    loss, grad_norm = matrix.STEADY * matrix.LOSS_TOLERANCE, matrix.STEADY * matrix.GRAD_NORM_TOLERANCE
    assert matrix.is_steady(loss, grad_norm)
    assert not matrix.is_steady(2 * loss, grad_norm)
    assert not matrix.is_steady(loss, 2 * grad_norm)
    assert not matrix.is_steady(loss, float("nan"))


@pytest.mark.parametrize("moving", [None, "1", "2", "3"])
def test_every_order_of_sums_must_move_little(moving: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One order may move the gradient norms little by chance, where another moves them more than is allowed."""
    monkeypatch.setattr(matrix, "_train", lambda run, iterations, seed, order=None: order)
    far = 2 * matrix.STEADY * matrix.GRAD_NORM_TOLERANCE
    monkeypatch.setattr(matrix, "_differences", lambda other, own: (0.0, far if other == moving else 0.0))
    monkeypatch.setattr(matrix, "smallest_gap", lambda run: 1.0)
    assert matrix._distance(plain().whole, ITERATIONS, 1234) == (1.0 if moving is None else 0.0)


def test_a_nan_is_not_right() -> None:
    assert matrix._verdict("fp32", float("nan"), 0.0, 1e-5) != "ok"
    assert matrix._verdict("fp32", 0.0, float("nan"), 1e-5) != "ok"
    assert matrix._verdict("fp32", 1e-6, 1e-5, 1e-5) == "ok"
