"""Paths that only a card takes, with CUDA mocked, and the order and verdicts of the training runs."""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import exact, jobs, parity, peers, ranks, training
from benchmarks.gpu.rows import Rows
from megatron_wallfacer.errors import WallfacerError

VARIABLES = ("NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_MAX_CTAS")


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the variables, and put them back after the test whoever sets them."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("gpus", "shares"), [(1, True), (4, False)])
def test_ranks_share_a_card_over_nccl(gpus: int, shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    monkeypatch.setattr(ranks, "loaded_nccl", lambda: (2, 30, 7))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.setdefault("device", device))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, **options: made.update(options, of=backend))
    monkeypatch.setattr(ranks.dist, "new_group", lambda backend, timeout: backend)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    forget(monkeypatch)
    joined = ranks.join_ranks(argparse.Namespace(device="cuda", backend=None))
    assert (joined.rank, joined.size, joined.transfers, joined.control) == (3, 4, "direct", "gloo")
    assert (made["of"], made["device"]) == ("nccl", 3 % gpus)
    assert made["device_id"] == torch.device("cuda", 3 % gpus)
    assert [os.environ.get(name) for name in VARIABLES] == (["1", "8"] if shares else [None, None])


def test_a_teardown_that_hangs_is_a_row_and_ends_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(exact, "TEARDOWN_S", 0.05)
    monkeypatch.setattr(exact.os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(exact, "leave", lambda group: ended.wait(10))
    rows = Rows("table", ("scheme",), ("grid", "seconds"), argparse.Namespace(out=tmp_path, budget=None))
    exact.tear_down(rows, ranks.ALONE)
    assert ended.is_set()
    assert rows.verdicts[0] == "wrong: not over after 0.05 s"
    assert rows.close() == 1


def test_over_gloo_ranks_of_a_card_send_through_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, **options: None)
    monkeypatch.setattr(ranks.dist, "new_group", lambda backend, timeout: backend)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert ranks.join_ranks(argparse.Namespace(device="cuda", backend="gloo")).transfers == "staged"


def test_time_on_the_card_is_that_of_kernels_and_apart_that_of_nccl() -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, device: object, us: float, annotation: bool = False) -> SimpleNamespace:
        took = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=device, time_range=took, is_user_annotation=annotation)

    events = [
        event("flash_fwd", cuda, 100.0),
        event("Memcpy DtoD", cuda, 20.0),
        event("ncclDevKernel_SendRecv", cuda, 500.0),
        event("aten::copy_", cpu, 900.0),
        event("wallfacer: forward pass", cuda, 700.0, annotation=True),
    ]
    assert peers.device_seconds(events) == pytest.approx((120e-6, 500e-6))


class FakeTrainer:
    """Losses by the name of a run, instead of training."""

    def __init__(self, folder: Path, losses: dict[str, list[float]]) -> None:
        self.folder, self.on_gpu, self._losses, self.runs = folder, True, losses, []

    def losses(self, name: str, count: int, flags: list[str]) -> list[float]:
        self.runs.append((name, count, flags))
        if name not in self._losses:
            raise WallfacerError("training failed")
        return self._losses[name]


def runs_of(tmp_path: Path, losses: dict[str, list[float]]) -> tuple[parity.Runs, Rows, FakeTrainer]:
    options = argparse.Namespace(out=tmp_path, budget=None, dtype="bfloat16", kernel="te", backend="nccl")
    rows = Rows("table", ("layers", "run"), ("last loss", "apart", "allowed"), options)
    trainer = FakeTrainer(tmp_path, losses)
    return parity.Runs(trainer, rows, options), rows, trainer


def test_each_kind_of_layers_is_compared_with_its_own_rank(tmp_path: Path) -> None:
    losses = {
        "Megatron's layers 1 rank, fp32": [4.0, 3.0],
        "TransformerEngine's layers 1 rank": [4.0004, 3.0],
        "TransformerEngine's layers cp 4, team-ring": [4.0, 3.0005],
    }
    runs, rows, trainer = runs_of(tmp_path, losses)
    runs.compare(parity.THEIRS, parity.splits(4))
    assert rows.verdicts == ["", "", "ok", "failed: WallfacerError: training failed"]
    assert [count for _, count, _ in trainer.runs] == [1, 1, 4, 4]
    split = " ".join(trainer.runs[3][2])
    assert "--transformer-impl transformer_engine" in split
    assert "--tensor-model-parallel-size 2 --wallfacer-cp-size 2 --wallfacer-scheme team-ring" in split
    # One rank is not trained again; without it there is nothing to judge by.
    runs.compare(parity.THEIRS, parity.splits(4))
    assert len(trainer.runs) == 6
    runs.compare(parity.OWN, parity.splits(4))
    assert rows.verdicts[-3:-1] == [
        "failed: WallfacerError: training failed",
        "left out: there is no run of 1 rank to compare it with",
    ]


def test_graphs_are_trained_too(tmp_path: Path) -> None:
    alone = {f"Megatron's layers 1 rank{exact}": [4.0, 3.0] for exact in (", fp32", "")}
    runs, _, trainer = runs_of(tmp_path, alone)
    options = argparse.Namespace(dtype="float32", backend="nccl", smoke=True)
    parity.train(runs, 4, options)
    flags = [" ".join(words) for _, count, words in trainer.runs if count == 4]
    assert sum("--wallfacer-cuda-graphs" in words for words in flags) == 1
    trainer.runs.clear()
    parity.train(runs, 4, argparse.Namespace(dtype="float32", backend="gloo", smoke=True))
    assert not any("--wallfacer-cuda-graphs" in words for _, _, words in trainer.runs)
    assert [split.flags for split in parity.graph_splits(4, parity.THEIRS).values()] == [
        ("--wallfacer-cuda-graphs",),
        ("--cuda-graph-impl", "local"),
    ]


def test_a_resumed_job_must_go_on_as_the_saved_one(tmp_path: Path) -> None:
    losses = {
        "Megatron's layers 1 rank, fp32": [6.0, 5.0, 4.0, 3.0],
        "Megatron's layers 1 rank": [6.0006, 5.0, 4.0, 3.0],
        "Megatron's layers usual job": [6.0, 5.0, 4.0, 3.0],
        # The second is the mean of the first two, as Megatron prints it.
        "Megatron's layers resumed": [4.0, 3.5],
        "Megatron's layers kept": [6.0, 5.0, 4.0, 3.0],
    }
    runs, rows, trainer = runs_of(tmp_path, losses)
    jobs.Job(runs, rows, parity.OWN, 4).measure()
    assert rows.verdicts == ["", "", "ok", "ok", "ok"]
    flags = {name.rpartition(" ")[2]: " ".join(words) for name, _, words in trainer.runs}
    assert "--save-interval 2" in flags["job"]
    assert f"--load {tmp_path / 'checkpoint-bf16'} --ckpt-step 2" in flags["resumed"]
    assert jobs.KEEP in flags["kept"]
    for wrong in ([4.01, 3.5], [6.0, 5.0, 4.0, 3.0]):
        losses["Megatron's layers resumed"] = wrong
        runs, rows, _ = runs_of(tmp_path, losses)
        jobs.Job(runs, rows, parity.OWN, 4).measure()
        assert rows.verdicts[3].startswith("wrong")


def test_logs_have_names_of_their_runs_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = []

    def train(script, count, arguments, log, seen):
        logs.append(log)
        return [SimpleNamespace(loss=2.0)]

    monkeypatch.setattr(training.local_run, "train", train)
    monkeypatch.setattr(training.demo, "training_arguments", lambda folder, iterations: [])
    forget(monkeypatch)
    trainer = training.Trainer(tmp_path, 2, argparse.Namespace(device="cuda", smoke=False))
    assert trainer.losses("Megatron's layers tp 2 x cp 2", 4, ["--bf16"]) == [2.0]
    assert logs == [tmp_path / "megatron-s-layers-tp-2-x-cp-2.log"]
