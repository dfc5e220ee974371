"""Call each attention kernel once, in a process of its own, and report the cuDNN libraries."""

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

from megatron_wallfacer.doctor.cudnn import cudnn_finding, cure, folder_of_loader, is_mixed
from megatron_wallfacer.doctor.finding import Finding, examined
from megatron_wallfacer.doctor.kernel_result import HEAD_DIM, TOLERANCE, Answer

if TYPE_CHECKING:
    import torch

_MODULE = "megatron_wallfacer.doctor.kernel_process"
COMMAND = (sys.executable, "-P", "-W", "ignore", "-m", _MODULE)


def kernels() -> Iterator[Finding]:
    """Every kernel by name, called on this machine's device, and the one that ``auto`` stands for."""
    import torch

    from megatron_wallfacer.kernels.select import KERNELS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Two stand for several of the others; `auto` comes last, when it is known which answer.
    names = [name for name in KERNELS if name not in ("auto", "flash")]
    answers = []
    own = _own_cudnn()
    for answer in tried([*names, "auto"]):
        answers.append(answer)
        yield _auto_finding(answers, device) if answer.kernel == "auto" else kernel_finding(answer, own)
    yield from _cudnn(answers, own, on_gpu=device.type == "cuda")
    yield from _idle_transformer_engine(device)
    yield from examined("merging", partial(_merging, device), "install it; PyTorch's wheels bring it")


def tried(names: Sequence[str], command: Sequence[str] = COMMAND) -> Iterator[Answer]:
    """Answers of kernels in this order; a process that ends before its last answer is started again for the others.

    Args:
        names: of kernels.
        command: of the process; names follow.
    """
    waiting = list(names)
    while waiting:
        for answer in _answers(waiting, command):
            waiting.remove(answer.kernel)
            yield answer


def kernel_finding(answer: Answer, own_cudnn: str | None) -> Finding:
    """Return what there is to say of one kernel.

    Args:
        answer: of the kernel.
        own_cudnn: folder of the cuDNN that comes with torch.
    """
    name = f"kernel {answer.kernel}"
    if answer.absent:
        return Finding(name, "note", answer.absent)
    if answer.failed:
        if own_cudnn is not None and is_mixed(answer.failed):
            return Finding(name, "problem", answer.failed, cure(own_cudnn))
        return Finding(name, "problem", answer.failed, _remedy(answer.kernel))
    errors = ", ".join(f"{tensor} {error:.1e}" for tensor, error in answer.errors.items())
    text = f"called forward and backward: relative errors {errors}; allowed {TOLERANCE:.0e}"
    if answer.right:
        return Finding(name, "ok", text)
    return Finding(name, "problem", f"wrong numbers: {text}", _remedy(answer.kernel))


def _remedy(kernel: str) -> str:
    return (
        f"install it again for this torch and GPU, or give another --wallfacer-kernel; "
        f"python -X faulthandler -m {_MODULE} {kernel}"
    )


def _answers(names: Sequence[str], command: Sequence[str]) -> Iterator[Answer]:
    """Answers of one process, at least one: that of the kernel in which it died is made here."""
    # The stage that has begun and has no answer yet.
    begun: dict[str, Any] | None = {"kernel": names[0], "stage": "start", "deadline_s": None, "cudnn": ()}
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        with subprocess.Popen([*command, *names], stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.endswith("\n"):
                    break  # It died within a line.
                told = json.loads(line)
                begun = told if "stage" in told else None
                if begun is None:
                    yield Answer(**told)
        if begun is not None:
            stderr.seek(0)
            last = next((line.strip() for line in reversed(stderr.read().splitlines()) if line.strip()), "")
            ending = _ending(process.returncode, begun["deadline_s"])
            failed = f"{begun['stage']}: {ending}" + (f": {last}" if last else "")
            yield Answer(begun["kernel"], failed=failed, cudnn=begun["cudnn"])


def _ending(code: int, deadline_s: int | None) -> str:
    if code == -signal.SIGALRM:
        return f"it did not return within {deadline_s} s"
    return f"the process ended by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"


def _auto_finding(answers: Sequence[Answer], device: torch.device) -> Finding:
    """Of the last answer, which is that of ``auto``, and of the kernel that it stands for."""
    from megatron_wallfacer.kernels.switches import switches_in_effect

    answer = answers[-1]
    if answer.failed:
        return Finding("kernel auto", "problem", answer.failed, "install one of those that it names")
    variables = switches_in_effect(device)
    text = f"{answer.chosen}, for bf16, head dim {HEAD_DIM}{f'; it obeys {variables}' if variables else ''}"
    right = [one.kernel for one in answers[:-1] if one.right]
    if answer.chosen in right:
        return Finding("kernel auto", "ok", text)
    return Finding("kernel auto", "problem", f"{text}, which fails here", f"--wallfacer-kernel {' or '.join(right)}")


def _cudnn(answers: Sequence[Answer], own: str | None, *, on_gpu: bool) -> Iterator[Finding]:
    """Whether the kernels' processes have one cuDNN each; nothing where there is none."""
    loaded = max((answer.cudnn for answer in answers), key=len)
    if not loaded:
        return
    loader = folder_of_loader(_library_path(), _loader_cache()) if on_gpu else None
    broken = any(answer.broken for answer in answers if answer.kernel != "auto")
    yield cudnn_finding(loaded, own or loaded[0], loader and os.path.realpath(loader), failed=broken)


def _own_cudnn() -> str | None:
    """Folder of the cuDNN that torch's wheels depend on; None where it is not installed so."""
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return None
    places = spec.submodule_search_locations if spec else None
    folders = [os.path.realpath(os.path.join(place, "lib")) for place in places or ()]
    return next((folder for folder in folders if os.path.isdir(folder)), None)


def _library_path() -> list[str]:
    """Folders of ``LD_LIBRARY_PATH`` with cuDNN in them."""
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return [os.path.realpath(folder) for folder in folders if any(folder.glob("libcudnn.so*"))]


def _loader_cache() -> str:
    """What ``ldconfig -p`` prints; nothing where it cannot be run."""
    try:
        path = f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"
        return subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, env={"PATH": path}).stdout
    except OSError:
        return ""


def _idle_transformer_engine(device: torch.device) -> Iterator[Finding]:
    from megatron_wallfacer.kernels.optional import TRANSFORMER_ENGINE

    if device.type == "cpu" and importlib.util.find_spec("transformer_engine") is not None:
        text = f"{TRANSFORMER_ENGINE.title} is installed, and there is no GPU: CPU ranks train without it"
        yield Finding("transformer-engine", "note", text, "nothing: they have Megatron's own layers")


def _merging(device: torch.device) -> Iterator[Any]:
    from megatron_wallfacer.engine.merge import check_rows
    from megatron_wallfacer.kernels.optional import TRITON

    check_rows(device)
    yield Finding("merging", "ok", TRITON.title if device.type == "cuda" else "PyTorch's operators")
