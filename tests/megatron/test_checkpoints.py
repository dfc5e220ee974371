"""Saved at one layout, resumed at another (torch_dist): training goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.megatron.training import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, arguments, baseline
from tests.support.megatron_runs import RunResult, train

EXTRA_STATE = Path(__file__).resolve().parents[1] / "support" / "extra_state.py"
#: Megatron pads the vocabulary to a multiple of this times the tensor-parallel size: one size for all.
ROWS, HALF = "--make-vocab-size-divisible-by 512".split(), "--make-vocab-size-divisible-by 256"
#: (ranks, flags) of each iteration. No dropout, so that Megatron may draw new random states where TP and PP change.
LAYOUTS = {
    "cp 1, without the plugin": (1, ""),
    "cp 2": (2, "--wallfacer-cp-size 2"),
    "cp 8": (8, "--wallfacer-cp-size 8 --wallfacer-team-size 2"),
    "cp 2 again": (2, "--wallfacer-cp-size 2 --wallfacer-scheme ulysses"),
    "cp 1 again": (1, "--wallfacer-cp-size 1"),
    "tp 2": (4, f"--wallfacer-cp-size 2 --tensor-model-parallel-size 2 {HALF}"),
    "pp 2": (4, "--wallfacer-cp-size 2 --pipeline-model-parallel-size 2"),
    "in the end, without the plugin": (1, ""),
}
DISTRIBUTED = {
    "cp 2, dp 2": (4, "--wallfacer-cp-size 2"),
    "cp 1, dp 2, without the plugin": (2, ""),
    "cp 4": (4, "--wallfacer-cp-size 4"),
}


def resume(folder: Path, iteration: int, ranks: int, *flags: str, **options: Any) -> RunResult:
    """One iteration, from the checkpoint before it to the one after it."""
    saving = ["--save", str(folder), "--load", str(folder), "--save-interval", "1", "--ckpt-format", "torch_dist"]
    ending = ["--exit-interval", str(iteration)]
    return train(ranks, arguments(*ROWS, *saving, *ending, *flags, iterations=len(LAYOUTS)), **options).check()


def continues(folder: Path, layouts: dict[str, tuple[int, str]], *flags: str) -> None:
    """Train an iteration in each layout, one after the other, and compare with the uninterrupted run."""
    whole = baseline(*ROWS, "--train-iters", str(len(LAYOUTS)))
    for number, (name, (ranks, layout)) in enumerate(layouts.items(), start=1):
        (iteration,) = resume(folder, number, ranks, *layout.split(), *flags).iterations
        want = whole.iterations[number - 1]
        assert iteration.number == want.number, name
        assert abs(iteration.loss - want.loss) <= LOSS_TOLERANCE * want.loss, name
        assert abs(iteration.grad_norm - want.grad_norm) <= GRAD_NORM_TOLERANCE * want.grad_norm, name


def test_training_goes_on_in_every_layout(tmp_path: Path) -> None:
    continues(tmp_path, LAYOUTS)


def test_nothing_of_the_plugin_is_in_the_state_dict(tmp_path: Path) -> None:
    """Keys and shapes of what ranks with the plugin saved are those of what Megatron alone saved."""
    resume(tmp_path, 1, 1)
    resume(tmp_path, 2, 2, "--wallfacer-cp-size", "2")
    alone, ours = (contents(tmp_path / f"iter_{number:07}") for number in (1, 2))
    assert alone == ours
    assert any("self_attention.linear_qkv.weight" in name for name in ours)
    assert not [name for name in ours if "wallfacer" in name or "core_attention" in name]


def contents(checkpoint: Path) -> dict[str, torch.Size | None]:
    """Shape of each tensor of a checkpoint by key; None for other things."""
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    # Random states and the state of reruns have an entry for each rank or model-parallel rank.
    entries = {name: getattr(entry, "size", None) for name, entry in stored.items()}
    return {name: size for name, size in entries.items() if not name.startswith(("rng_state", "rerun_state"))}


def test_with_the_distributed_optimizer(tmp_path: Path) -> None:
    continues(tmp_path, DISTRIBUTED, "--use-distributed-optimizer")


def test_transformer_engines_extra_state_is_neither_missed_nor_in_the_way(tmp_path: Path) -> None:
    """From an attention that saves such entries to ours, and from ours to one that has them and does not save them."""
    stateful = {"script": EXTRA_STATE, "env": {"EXTRA_STATE": "saved"}}
    first = resume(tmp_path, 1, 1, **stateful)
    assert [name for name in contents(tmp_path / "iter_0000001") if "core_attention._extra_state" in name]
    second = resume(tmp_path, 2, 2, "--wallfacer-cp-size", "2")
    assert not [name for name in contents(tmp_path / "iter_0000002") if "core_attention" in name]
    third = resume(tmp_path, 3, 1, script=EXTRA_STATE)
    got = [loss for run in (first, second, third) for loss in run.losses]
    want = baseline(*ROWS, "--train-iters", str(len(LAYOUTS))).losses
    assert got == pytest.approx(want[:3], rel=LOSS_TOLERANCE)


def test_a_run_that_does_not_resume_is_noticed(tmp_path: Path) -> None:
    """Negative control: the weights without the optimizer's moments."""
    resume(tmp_path, 1, 1)
    resume(tmp_path, 2, 1, "--no-load-optim")
    (third,) = resume(tmp_path, 3, 2, "--wallfacer-cp-size", "2").iterations
    want = baseline(*ROWS, "--train-iters", str(len(LAYOUTS))).iterations[2]
    assert abs(third.loss - want.loss) > 10 * LOSS_TOLERANCE * want.loss
