"""Call each attention kernel once in a process of its own, and report the loaded cuDNN libraries."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_wallfacer.doctor.cudnn import cudnn_finding, export_command, folder_of_loader, is_mixed
from megatron_wallfacer.doctor.finding import Finding, run_check
from megatron_wallfacer.doctor.kernel_result import HEAD_DIM, TOLERANCE, KernelResult

if TYPE_CHECKING:
    import torch

_MODULE = "megatron_wallfacer.doctor.kernel_process"
COMMAND = (sys.executable, "-P", "-W", "ignore", "-m", _MODULE)


def kernels() -> Iterator[Finding]:
    """Check every kernel on this node's device, and the kernel that ``auto`` selects."""
    import torch

    from megatron_wallfacer.kernels.select import KERNELS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # `auto` and `flash` select one of the other kernels. `auto` is last, because its finding needs the other results.
    names = [name for name in KERNELS if name not in ("auto", "flash")]
    results = []
    cudnn_of_torch = _cudnn_of_torch()
    for result in call_kernels([*names, "auto"]):
        results.append(result)
        yield _auto_finding(results, device) if result.kernel == "auto" else kernel_finding(result, cudnn_of_torch)
    yield from _cudnn(results, cudnn_of_torch, on_gpu=device.type == "cuda")
    yield from _unused_transformer_engine(device)
    yield from run_check("merging", partial(_merging, device), "install it; PyTorch's wheels contain it")


def call_kernels(names: Sequence[str], command: Sequence[str] = COMMAND) -> Iterator[KernelResult]:
    """Yield the result of each kernel in ``names``. If a process ends early, a new one calls the remaining kernels."""
    remaining = list(names)
    while remaining:
        for result in _results(remaining, command):
            remaining.remove(result.kernel)
            yield result


def kernel_finding(result: KernelResult, cudnn_of_torch: str | None) -> Finding:
    """Report whether one kernel works. ``cudnn_of_torch`` is the folder of the cuDNN that PyTorch installs."""
    name = f"kernel {result.kernel}"
    if result.unavailable:
        return Finding(name, "note", result.unavailable)
    if result.failure:
        if cudnn_of_torch is not None and is_mixed(result.failure):
            return Finding(name, "problem", result.failure, export_command(cudnn_of_torch))
        return Finding(name, "problem", result.failure, _remedy(result.kernel))
    errors = ", ".join(f"{tensor} {error:.1e}" for tensor, error in result.errors.items())
    text = f"called forward and backward: relative errors {errors}; allowed {TOLERANCE:.0e}"
    if result.is_accurate:
        return Finding(name, "ok", text)
    return Finding(name, "problem", f"wrong numbers: {text}", _remedy(result.kernel))


def _remedy(kernel: str) -> str:
    return (
        f"reinstall it for this torch and GPU, or use another --wallfacer-kernel; "
        f"python -X faulthandler -m {_MODULE} {kernel}"
    )


def _results(names: Sequence[str], command: Sequence[str]) -> Iterator[KernelResult]:
    """Call kernels in one process, and yield their results. If the process ends early, the last result is a failure."""
    # Current stage, or None between two kernels.
    begun: dict[str, Any] | None = {"kernel": names[0], "stage": "start", "deadline_s": None, "cudnn": ()}
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        with subprocess.Popen([*command, *names], stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.endswith("\n"):
                    break  # The process ended within a line.
                report = json.loads(line)
                begun = report if "stage" in report else None
                if begun is None:
                    yield KernelResult(**report)
        if begun is not None:
            stderr.seek(0)
            last = next((line.strip() for line in reversed(stderr.read().splitlines()) if line.strip()), "")
            ending = _ending(process.returncode, begun["deadline_s"])
            failure = f"{begun['stage']}: {ending}" + (f": {last}" if last else "")
            yield KernelResult(begun["kernel"], failure=failure, cudnn=begun["cudnn"])


def _ending(code: int, deadline_s: int | None) -> str:
    if code == -signal.SIGALRM:
        return f"the call did not return within {deadline_s} s"
    return f"the process ended by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"


def _auto_finding(results: Sequence[KernelResult], device: torch.device) -> Finding:
    """Report which kernel ``auto`` selects, and whether it works. The last of ``results`` is the result of ``auto``."""
    from megatron_wallfacer.kernels.select import switches_in_effect

    auto = results[-1]
    if auto.failure:
        return Finding("kernel auto", "problem", auto.failure, "install one of the named libraries")
    variables = switches_in_effect(device)
    text = f"{auto.selected}, for bf16, head dim {HEAD_DIM}{f', because of {variables}' if variables else ''}"
    accurate = [result.kernel for result in results[:-1] if result.is_accurate]
    if auto.selected in accurate:
        return Finding("kernel auto", "ok", text)
    return Finding("kernel auto", "problem", f"{text}, which fails", f"--wallfacer-kernel {' or '.join(accurate)}")


def _cudnn(results: Sequence[KernelResult], of_torch: str | None, *, on_gpu: bool) -> Iterator[Finding]:
    """Check that each process has loaded only one cuDNN. Yield nothing if no process has loaded cuDNN."""
    loaded = max((result.cudnn for result in results), key=len)
    if not loaded:
        return
    loader = folder_of_loader(_library_path(), _loader_cache()) if on_gpu else None
    broken = any(result.is_broken for result in results if result.kernel != "auto")
    yield cudnn_finding(loaded, of_torch or loaded[0], loader and os.path.realpath(loader), failed=broken)


def _cudnn_of_torch() -> str | None:
    """Return the folder of the cuDNN that PyTorch's wheels require, or None."""
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return None
    places = spec.submodule_search_locations if spec else None
    folders = [os.path.realpath(os.path.join(place, "lib")) for place in places or ()]
    return next((folder for folder in folders if os.path.isdir(folder)), None)


def _library_path() -> list[str]:
    """Return the folders of ``LD_LIBRARY_PATH`` that contain cuDNN."""
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return [os.path.realpath(folder) for folder in folders if any(folder.glob("libcudnn.so*"))]


def _loader_cache() -> str:
    """Return the output of ``ldconfig -p``, or an empty text if the command cannot run."""
    try:
        path = f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"
        return subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, env={"PATH": path}).stdout
    except OSError:
        return ""


def _unused_transformer_engine(device: torch.device) -> Iterator[Finding]:
    from megatron_wallfacer.kernels.optional import TRANSFORMER_ENGINE

    if device.type == "cpu" and importlib.util.find_spec("transformer_engine") is not None:
        text = f"{TRANSFORMER_ENGINE.title} is installed, but there is no GPU: CPU ranks train without it"
        yield Finding("transformer-engine", "note", text, "none needed: CPU ranks use Megatron's own layers")


def _merging(device: torch.device) -> Iterator[Any]:
    from megatron_wallfacer.engine.merge import check_rows
    from megatron_wallfacer.kernels.optional import TRITON

    check_rows(device)
    yield Finding("merging", "ok", TRITON.title if device.type == "cuda" else "PyTorch's operators")
