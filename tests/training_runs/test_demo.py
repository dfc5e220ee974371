"""The runs of the demonstration, and how their losses are judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_wallfacer.cli.demo import compare_losses
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.training_runs.demo import HEADS, KV_HEADS, demo_runs
from megatron_wallfacer.training_runs.loss_comparison import EXACT, WHOLE, compare

SPLIT = "4 ranks, ring"


def flags(gpus: int) -> dict[str, tuple[str, ...]]:
    return {run.name: run.flags for run in demo_runs(4, "auto", "ring", gpus)}


def test_a_cpu_trains_twice_in_fp32() -> None:
    assert flags(0) == {WHOLE: (), SPLIT: ("--wallfacer-cp-size", "4", "--wallfacer-scheme", "auto")}


def test_gpus_train_in_bf16_beside_one_rank_in_fp32() -> None:
    found = flags(4)
    assert list(found) == [EXACT, WHOLE, SPLIT]
    assert found[EXACT] == ("--transformer-impl", "local")
    assert [("--bf16" in words, "--wallfacer-cp-size" in words) for words in found.values()] == [
        (False, False),
        (True, False),
        (True, True),
    ]
    # How ranks share GPUs is decided where they are started.
    assert flags(3) == found


@pytest.mark.parametrize(("last", "code"), [(3.0019, True), (3.0021, False)])
def test_a_split_run_may_be_twice_as_far_from_fp32(tmp_path: Path, last: float, code: bool) -> None:
    plan = make_plan("ring", 4, q_heads=HEADS, kv_heads=KV_HEADS)
    losses = {EXACT: [4.0, 3.0], WHOLE: [4.0, 3.001], SPLIT: [4.0, last]}
    result = compare_losses(plan, losses, tmp_path)
    assert result.agree is code
    assert result.allowed == pytest.approx(2 * 0.001 / 3)
    assert result.losses == losses
    assert all(Path(picture).is_file() for picture in result.pictures)


def test_fp32_agrees_to_the_tolerance() -> None:
    assert compare([4.0], [4.0], {"a": [4.00003]}).agrees("a")
    assert not compare([4.0], [4.0], {"a": [4.00005]}).agrees("a")


def test_runs_that_cannot_be_compared() -> None:
    with pytest.raises(WallfacerError, match="must be the same number of losses for each run"):
        compare([4.0], [4.0], {"a": [4.0, 3.0]})
