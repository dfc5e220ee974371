"""Ranks that share a GPU: over a new enough NCCL, else through host memory."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_wallfacer.cli import run
from megatron_wallfacer.cli.main import main
from megatron_wallfacer.engine import loaded_nccl
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets import shared_gpus
from megatron_wallfacer.presets.check import CheckResult
from megatron_wallfacer.presets.shared_gpus import GpuSharing, NodeGpus, gpus_of_node, share_gpus, sharing_on_this_node
from megatron_wallfacer.training_runs import local_run

ON = ["--wallfacer-cp-size", "4"]
NEW, OLD = (2, 30, 7), (2, 29, 9)
STAGED = ("--distributed-backend", "gloo", "--wallfacer-transfers", "staged")


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 8), (4, 4), (8, 4), (1, 1)])
def test_nothing_is_shared_without_need(gpus: int, ranks: int) -> None:
    assert share_gpus(NodeGpus(gpus, NEW), ranks, ON) == GpuSharing()


@pytest.mark.parametrize(
    ("gpus", "ranks", "ctas", "who"),
    [(1, 4, "8", "4 ranks share 1 GPU"), (3, 8, "10", "8 ranks share 3 GPUs"), (1, 64, "1", "64 ranks share 1 GPU")],
)
def test_a_new_nccl_is_enabled_and_limited(gpus: int, ranks: int, ctas: str, who: str) -> None:
    assert share_gpus(NodeGpus(gpus, NEW), ranks, ON) == GpuSharing(
        {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": ctas},
        (),
        f"{who} over NCCL 2.30.7 (NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS={ctas}): for debugging, not for speed",
    )


@pytest.mark.parametrize(("nccl", "name"), [(OLD, "NCCL 2.29.9"), ((2, 4, 8), "NCCL 2.4.8"), (None, "no NCCL")])
def test_else_messages_go_through_host_memory(nccl: tuple[int, ...] | None, name: str) -> None:
    assert share_gpus(NodeGpus(1, nccl), 4, ON) == GpuSharing(
        {},
        STAGED,
        f"4 ranks share 1 GPU, {name} is installed, sharing needs 2.30 or newer: messages go through host memory "
        "(--distributed-backend gloo --wallfacer-transfers staged)",
    )


def test_backend_and_transfers_stay_as_typed() -> None:
    for nccl in (OLD, NEW):
        assert share_gpus(NodeGpus(1, nccl), 4, [*ON, *STAGED]) == GpuSharing()
        assert share_gpus(NodeGpus(1, nccl), 4, [*ON, "--wallfacer-transfers=staged"]) == GpuSharing()
    nccl = [*ON, "--distributed-backend", "nccl"]
    assert share_gpus(NodeGpus(1, NEW), 4, nccl).environment["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    old = share_gpus(NodeGpus(1, OLD), 4, nccl)
    assert old.flags == ()
    assert old.line.endswith("NCCL will stop with an error")


def test_only_ranks_of_the_plugin_share_and_variables_stay_as_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_gpus, "gpus_of_node", lambda environment: NodeGpus(1, NEW))
    assert sharing_on_this_node(4, ["--lr", "1"], {}) == GpuSharing()
    assert sharing_on_this_node(1, ON, {}) == GpuSharing()
    assert sharing_on_this_node(4, ["--wallfacer-cp-size=4"], {"NCCL_MAX_CTAS": "2"}).environment == {
        "NCCL_MULTI_RANK_GPU_ENABLE": "1"
    }


# --- the node ---


def test_without_gpus_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: pytest.fail("asked"))
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter(()))
    assert gpus_of_node({}) == NodeGpus()
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([Path("/dev/nvidia3")]))
    assert gpus_of_node({"CUDA_VISIBLE_DEVICES": ""}) == NodeGpus()


@pytest.mark.parametrize(
    ("answer", "code", "found"),
    [
        ('a warning\n{"gpus": 1, "nccl": [2, 30, 7]}', 0, NodeGpus(1, NEW)),
        ('{"gpus": 2, "nccl": null}', 0, NodeGpus(2)),
        ("", 1, NodeGpus()),
    ],
)
def test_the_process_has_the_environment_of_the_ranks(
    monkeypatch: pytest.MonkeyPatch, answer: str, code: int, found: NodeGpus
) -> None:
    asked = []

    def run(words: list[str], **options: object) -> SimpleNamespace:
        asked.append((words[1:], options["env"]))
        return SimpleNamespace(returncode=code, stdout=answer)

    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([Path("/dev/nvidia0")]))
    monkeypatch.setattr(subprocess, "run", run)
    assert gpus_of_node({"LD_PRELOAD": "libnccl.so.2"}) == found
    assert asked == [(["-m", "megatron_wallfacer.engine.loaded_nccl"], {"LD_PRELOAD": "libnccl.so.2"})]


@pytest.mark.parametrize(("code", "version"), [(23007, (2, 30, 7)), (22905, (2, 29, 5)), (2804, (2, 8, 4))])
def test_codes_of_nccl(code: int, version: tuple[int, ...]) -> None:
    assert loaded_nccl.version_of(code) == version


class Library:
    """Stands for a loaded libnccl."""

    def __init__(self, code: int) -> None:
        self._code = code

    def ncclGetVersion(self, code: object) -> int:
        code._obj.value = self._code
        return 0


@pytest.mark.parametrize(
    ("preloaded", "mapped", "version"),
    [(None, 22903, (2, 29, 3)), (23007, 22903, (2, 30, 7)), (None, None, (2, 27, 5))],
)
def test_the_loaded_library_counts_and_not_torchs_build(
    monkeypatch: pytest.MonkeyPatch, preloaded: int | None, mapped: int | None, version: tuple[int, ...]
) -> None:
    import torch
    import torch.distributed as dist

    libraries = {None: preloaded, "/somewhere/libnccl.so.2": mapped}
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Library(libraries[path]) if libraries[path] else object())
    monkeypatch.setattr(loaded_nccl, "_mapped", lambda: ["/somewhere/libnccl.so.2"])
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert loaded_nccl.loaded_nccl() == version


def test_the_real_library() -> None:
    """What a process really answers, held against the package that brought the library, if one did."""
    names = [name for name in ("nvidia-nccl-cu12", "nvidia-nccl-cu13") if _installed(name)]
    words = [sys.executable, "-m", "megatron_wallfacer.engine.loaded_nccl"]
    answer = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    if not names:
        pytest.skip("torch brought no NCCL")
    assert answer["nccl"] == [int(part) for part in importlib.metadata.version(names[0]).split(".")[:3]]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# --- the commands ---


@pytest.mark.parametrize("nccl", [NEW, OLD])
def test_run_shares(nccl: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shared_gpus, "gpus_of_node", lambda environment: NodeGpus(1, nccl))
    monkeypatch.setattr(run, "check_presets", lambda *_: [CheckResult("0.19.2", (), None, True, True)])
    assert main(["run", "tiny-cpu", "--script", __file__, "--dry-run", "--json"]) == 0
    shown = capsys.readouterr()
    launch = json.loads(shown.out)
    wanted = share_gpus(NodeGpus(1, nccl), 2, ON)
    assert wanted.line
    assert wanted.environment.items() <= launch["environment"].items()
    assert tuple(launch["command"][-4:]) == STAGED or not wanted.flags
    assert shown.err == f"wallfacer: {wanted.line}\n"


def test_demo_shares(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The script is the check: it shows what its ranks are given, and nothing is trained."""
    started = []

    def start(command: list[str], **options: object) -> object:
        started.append((command, options["env"]))
        raise WallfacerError("enough")

    monkeypatch.setattr(shared_gpus, "gpus_of_node", lambda environment: NodeGpus(1, NEW))
    monkeypatch.setattr(local_run.subprocess, "Popen", start)
    monkeypatch.delenv("NCCL_MAX_CTAS", raising=False)
    for ranks in (1, 4):
        with pytest.raises(WallfacerError, match="enough"):
            local_run.train(Path("script.py"), ranks, ON, tmp_path / "log", lambda iteration: None)
    (_, alone), (command, environment) = started
    assert "NCCL_MAX_CTAS" not in alone
    assert environment["NCCL_MAX_CTAS"] == "8"
    assert tuple(command[-2:]) == tuple(ON)
    assert capsys.readouterr().err.count("wallfacer: 4 ranks share 1 GPU over NCCL 2.30.7") == 1
    monkeypatch.setattr(shared_gpus, "gpus_of_node", lambda environment: NodeGpus(1, OLD))
    with pytest.raises(WallfacerError, match="enough"):
        local_run.train(Path("script.py"), 4, ON, tmp_path / "log", lambda iteration: None)
    assert tuple(started[-1][0][-4:]) == STAGED
    assert os.environ.get("NCCL_MAX_CTAS") is None
