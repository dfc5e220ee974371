"""Prepared calls: a warm call is short, and what was prepared for one call is used only for equal ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import torch

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels import te
from megatron_wallfacer.kernels.prepared import PreparedKernel
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.attn_tile import TileWindow
from tests.kernels import fakes
from tests.kernels.problems import LocalProblem, packed, worst
from tests.kernels.releases import ADAPTERS

PACKAGE = str(Path(te.__file__).parents[1])
KERNELS: dict[str, Callable[[], PreparedKernel]] = {**ADAPTERS, "torch on a CPU": TorchCpuKernel}
PLAIN = {
    "causal": LocalProblem(q_heads=4, kv_heads=2, causal=True),
    "full": LocalProblem(6, 14, q_heads=4, kv_heads=2),
    "window": LocalProblem(q_heads=4, kv_heads=2, window=TileWindow(None, 0)),
}
VARLEN = [name for name in ADAPTERS if name.startswith(("flash", "transformer-engine"))]
#: Python calls in this project per warm call: (forward, backward).
LIMITS = (3, 4)

every_kernel = pytest.mark.parametrize("name", KERNELS)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te, "capability", lambda device: (9, 0))


def project_calls(run: Callable[[], object]) -> list[str]:
    """Names of the project's functions that are called, without those inside the library's functions."""
    found: list[str] = []
    depth = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth
        # The libraries are fakes, whose bodies are the reference kernel.
        in_library = frame.f_code.co_filename == fakes.LIBRARY
        if event == "call" and in_library:
            depth += 1
        elif event == "return" and in_library:
            depth -= 1
        elif event == "call" and depth == 0 and frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def warm_calls(kernel: PreparedKernel, problem: LocalProblem) -> tuple[list[str], list[str]]:
    """Names of the project's functions of the second forward and of the second backward."""
    q, k, v, dout = problem.tensors()
    call = problem.call
    out, lse = kernel.forward(q, k, v, *call)
    kernel.backward(dout, q, k, v, out, lse, *call)
    forward = project_calls(lambda: kernel.forward(q, k, v, *call))
    return forward, project_calls(lambda: kernel.backward(dout, q, k, v, out, lse, *call))


@every_kernel
@pytest.mark.parametrize("tile", ["causal", "full"])
def test_a_warm_call_is_few_python_calls(name: str, tile: str) -> None:
    for names, limit in zip(warm_calls(KERNELS[name](), PLAIN[tile]), LIMITS, strict=True):
        assert 2 <= len(names) <= limit, names


@pytest.mark.parametrize("name", VARLEN)
def test_a_warm_call_of_documents_is_not_longer(name: str) -> None:
    kernel = ADAPTERS[name]()
    for names, limit in zip(warm_calls(kernel, packed((5, 1, 6), q_heads=4, kv_heads=2)), LIMITS, strict=True):
        assert 2 <= len(names) <= limit, names


@every_kernel
def test_one_kernel_serves_calls_that_differ_in_one_thing(name: str) -> None:
    """In batch, dtype, scale, mask or sizes: what was prepared for one call is not used for another."""
    kernel, base = KERNELS[name](), PLAIN["causal"]
    problems = [
        base,
        replace(base, batch=3),
        replace(base, causal=False),
        replace(base, rows=8, cols=8),
        replace(base, causal=False, rows=8, cols=14),
        PLAIN["window"] if name not in ("cudnn", "cudnn, wide lse") else base,
    ]
    for problem in [*problems, *problems]:
        assert worst(problem.solved_by(kernel), problem.solution()) <= 1e-13
    q, k, v, _ = base.tensors()
    tile, spec = base.call
    (_, lse), (_, other) = (kernel.forward(q, k, v, tile, AttnSpec(scale)) for scale in (spec.scale, 2 * spec.scale))
    assert (lse - other).abs().max() > 1e-3
    _, lse = kernel.forward(q.float(), k.float(), v.float(), tile, spec)
    assert lse.dtype == torch.float32


def test_equal_tiles_are_prepared_once() -> None:
    kernel, problem = ADAPTERS["transformer-engine 2.20.2"](), PLAIN["causal"]
    for _ in range(3):
        problem.solved_by(kernel)
    assert kernel._forward_call.cache_info()[:2] == kernel._backward_call.cache_info()[:2] == (2, 1)
    assert kernel._forward_call.cache_info().maxsize is not None


@pytest.mark.parametrize("name", [name for name in KERNELS if not name.startswith("flash")])
def test_a_cap_of_logits_that_a_kernel_does_not_support_is_an_error(name: str) -> None:
    kernel = KERNELS[name]()
    q, k, v, dout = PLAIN["causal"].tensors()
    call = PLAIN["causal"].call[0], AttnSpec(0.4, 30.0)
    for run, tensors in ((kernel.forward, (q, k, v)), (kernel.backward, (dout, q, k, v, q, q[..., 0]))):
        with pytest.raises(OptionError) as error:
            run(*tensors, *call)
        assert str(error.value) == f"softcap=30.0: must be 0 with kernel {kernel.name}, which does not cap logits"
