"""Checks of kernels: findings on kernels that fail, and on cuDNN libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from megatron_wallfacer.doctor import kernels
from megatron_wallfacer.doctor.cudnn import cudnn_finding, folder_of_loader, folders_in_maps
from megatron_wallfacer.doctor.finding import Finding
from megatron_wallfacer.doctor.kernel_result import KernelResult
from megatron_wallfacer.kernels import KERNELS

WHEEL, SYSTEM = "/site/nvidia/cudnn/lib", "/usr/lib/x86_64-linux-gnu"
CURE = "export CUDNN_HOME=/site/nvidia/cudnn LD_LIBRARY_PATH=/site/nvidia/cudnn/lib:$LD_LIBRARY_PATH"
RIGHT = dict.fromkeys(("out", "lse", "dq", "dk", "dv"), 1e-3)
MIXED = "forward: RuntimeError: cuDNN Error: CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED"


@pytest.fixture(scope="module")
def broken() -> dict[str, Finding]:
    """Return the findings on kernels that fail in every way. One that crashes and one that hangs precede others."""
    names = ["te", "flash2", "flash3", "flash4", "cudnn", "torch", "reference", "auto"]
    command = (sys.executable, "-W", "ignore", "-m", "tests.doctor.broken_kernels")
    results = list(kernels.call_kernels(names, command))
    assert [result.kernel for result in results] == names
    found = [kernels.kernel_finding(result, WHEEL) for result in results[:-1]]
    return {finding.name: finding for finding in (*found, kernels._auto_finding(results, torch.device("cpu")))}


@pytest.mark.parametrize(
    ("kernel", "status", "found"),
    [
        ("te", "problem", MIXED),
        ("flash2", "problem", "backward: the process ended by SIGSEGV: corrupted double-linked list"),
        ("flash3", "problem", "forward: the call did not return within 5 s"),
        ("flash4", "problem", "wrong numbers: called forward and backward: relative errors out "),
        ("cudnn", "problem", "wrong numbers: called forward and backward: relative errors out nan, lse "),
        ("torch", "ok", "called forward and backward: relative errors out "),
        ("reference", "note", "it is not installed: get it"),
        ("auto", "ok", "torch, for bf16, head dim 128"),
    ],
)
def test_each_kernel_has_a_line_of_its_own(broken: dict[str, Finding], kernel: str, status: str, found: str) -> None:
    finding = broken[f"kernel {kernel}"]
    assert (finding.status, finding.result[: len(found)]) == (status, found)
    if status == "problem":
        assert (
            finding.remedy == CURE
            if kernel == "te"
            else "-m megatron_wallfacer.doctor.kernel_process" in finding.remedy
        )


def test_a_process_that_does_not_start_fails_each_kernel() -> None:
    command = (sys.executable, "-S", "-c", "import sys; sys.exit('no torch')")
    assert [(result.kernel, result.failure) for result in kernels.call_kernels(["te", "auto"], command)] == [
        (name, "start: the process ended with 1: no torch") for name in ("te", "auto")
    ]


def test_auto_is_a_problem_where_its_kernel_fails() -> None:
    failed = KernelResult("te", failure=MIXED)
    results = [failed, KernelResult("flash2", "flash2", errors=RIGHT), KernelResult("auto", "te")]
    finding = kernels._auto_finding(results, torch.device("cuda"))
    assert (finding.status, finding.remedy) == ("problem", "--wallfacer-kernel flash2")
    none = KernelResult("auto", failure="selection: kernel=auto: must be reference here")
    assert kernels._auto_finding([failed, none], torch.device("cuda")).status == "problem"


def test_auto_names_the_variables_that_limit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    results = [KernelResult("flash2", "flash2", errors=RIGHT), KernelResult("auto", "flash2")]
    finding = kernels._auto_finding(results, torch.device("cuda"))
    assert (finding.status, finding.result) == ("ok", "flash2, for bf16, head dim 128, because of NVTE_FUSED_ATTN=0")


def test_an_unused_transformer_engine_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    (finding,) = kernels._unused_transformer_engine(torch.device("cpu"))
    assert (finding.status, "CPU ranks train without it" in finding.result) == ("note", True)
    assert not list(kernels._unused_transformer_engine(torch.device("cuda")))
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert not list(kernels._unused_transformer_engine(torch.device("cpu")))


def maps(*paths: str) -> str:
    """A process's ``/proc/PID/maps`` with these files."""
    lines = (
        f"7f3c{i:08x}-7f3c{i + 1:08x} r-xp 00000000 fe:00 {1000 + i}                 {p}" for i, p in enumerate(paths)
    )
    return "\n".join(("55d0-55d1 rw-p 00000000 00:00 0   [heap]", "7f00-7f01 rw-p 00000000 00:00 0", *lines, ""))


def test_cudnn_folders_of_a_process() -> None:
    one = (f"{WHEEL}/libcudnn.so.9", f"{WHEEL}/libcudnn_graph.so.9", f"{WHEEL}/libcudnn_ops.so.9", "/usr/lib/libc.so.6")
    assert folders_in_maps(maps(*one)) == (WHEEL,)
    system = f"{SYSTEM}/libcudnn_engines_precompiled.so.9.14.0 (deleted)"
    assert folders_in_maps(maps(*one, system)) == (WHEEL, SYSTEM)
    assert folders_in_maps(maps("/site/cudnn/_compiled_module.so", "/x/libcudnn_notes.txt")) == ()


def test_the_loader_looks_into_the_variable_first() -> None:
    cache = (
        "2 libs found in cache `/etc/ld.so.cache'\n\tlibcudnn_ops.so.9 (libc6,x86-64) => /other/libcudnn_ops.so.9\n"
        f"\tlibcudnn.so.9 (libc6,x86-64) => {SYSTEM}/libcudnn.so.9\n\tlibc.so.6 (libc6,x86-64) => /lib/libc.so.6\n"
    )
    assert folder_of_loader([], cache) == SYSTEM
    assert folder_of_loader([WHEEL, "/b"], cache) == WHEEL
    assert folder_of_loader([], "") is None


@pytest.mark.parametrize(
    ("loaded", "loader", "failed", "status"),
    [
        ((WHEEL,), None, False, "ok"),
        ((WHEEL,), WHEEL, True, "ok"),
        ((WHEEL,), SYSTEM, False, "note"),
        ((WHEEL, SYSTEM), WHEEL, False, "note"),
        ((SYSTEM, WHEEL), None, True, "problem"),
    ],
)
def test_two_cudnn_libraries_are_found_and_cured(
    loaded: tuple[str, ...], loader: str | None, failed: bool, status: str
) -> None:
    finding = cudnn_finding(loaded, WHEEL, loader, failed=failed)
    assert finding.status == status
    assert finding.remedy.endswith(CURE) == (status != "ok")
    if len(loaded) > 1:
        assert finding.result == f"two cuDNN libraries in one process: {', '.join(loaded)}"


def test_all_kernels_and_what_they_loaded_are_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: TransformerEngine fails on a second cuDNN, and ``auto`` selects it."""
    asked: list[str] = []

    def call_kernels(names: list[str]) -> Iterator[KernelResult]:
        asked.extend(names)
        call = partial(KernelResult, cudnn=(WHEEL,))
        yield from (
            KernelResult("te", failure=MIXED, cudnn=(WHEEL, SYSTEM)) if n == "te" else call(n, n, errors=RIGHT)
            for n in names[:-1]
        )
        yield call("auto", "te")

    monkeypatch.setattr(kernels, "call_kernels", call_kernels)
    monkeypatch.setattr(kernels, "_cudnn_of_torch", lambda: WHEEL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {finding.name: finding for finding in kernels.kernels()}
    assert asked == [name for name in KERNELS if name not in ("auto", "flash")] + ["auto"]
    assert {name for name, finding in found.items() if finding.status == "problem"} >= {
        "kernel te",
        "kernel auto",
        "cudnn",
    }
    assert found["kernel te"].remedy == found["cudnn"].remedy == CURE
