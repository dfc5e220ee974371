from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_wallfacer.kernels import prepared, protocol
from megatron_wallfacer.kernels.protocol import FUSED, Inputs
from megatron_wallfacer.kernels.torch_cuda import TorchCudnnKernel
from tests.kernels.releases import ADAPTERS

FITS = Inputs(torch.device("cuda"), torch.bfloat16, 128, 128)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "capability", lambda device: (9, 0))


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_hopper_is_served(name: str, dtype: torch.dtype) -> None:
    assert ADAPTERS[name]().unsupported_reason(replace(FITS, dtype=dtype)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "it runs on a CUDA device, the tensors are on cpu"),
        ({"dtype": torch.float32}, "it computes in fp16 and bf16, the tensors are float32"),
        ({"head_dim": 264, "v_head_dim": 264}, "its head dims go up to 256, here it is 264"),
        ({"head_dim": 100, "v_head_dim": 100}, "its head dims are multiples of 8, here it is 100"),
    ],
)
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_no_kernel_supports(name: str, change: dict, reason: str) -> None:
    assert ADAPTERS[name]().unsupported_reason(replace(FITS, **change)) == reason


@pytest.mark.parametrize(("found", "generations", "reason"), [
    ((7, 5), None, "it runs on GPUs of compute capability 8.0 and later, this one is 7.5"),
    ((12, 0), None, None),
    ((8, 0), (9,), "it runs on GPUs of compute capability 9.x, this one is 8.0"),
    ((10, 0), (9,), "it runs on GPUs of compute capability 9.x, this one is 10.0"),
    ((12, 0), (9, 10), "it runs on GPUs of compute capability 9.x or 10.x, this one is 12.0"),
    (None, None, "there is no GPU here"),
])  # fmt: skip
def test_generations(
    monkeypatch: pytest.MonkeyPatch, found: object, generations: tuple[int, ...] | None, reason: str | None
) -> None:
    monkeypatch.setattr(protocol, "capability", lambda device: found)
    assert replace(FUSED, compute_capabilities=generations).unsupported_reason(FITS) == reason


@pytest.mark.parametrize("name", ADAPTERS)
def test_capped_logits_are_served_or_rejected(name: str) -> None:
    reason = ADAPTERS[name]().unsupported_reason(replace(FITS, softcap=30.0))
    assert reason == (None if name.startswith("flash") else "it does not cap logits, softcap is 30.0")


@pytest.mark.parametrize("name", ADAPTERS)
def test_head_dims_that_differ_are_served_or_rejected(name: str) -> None:
    kernel = ADAPTERS[name]()
    reason = kernel.unsupported_reason(replace(FITS, head_dim=192))
    equal = "its head dims are equal, here they are 192 and 128"
    assert reason == (None if kernel.name in ("te", "flash3", "flash4", "cudnn") else equal)


@pytest.mark.parametrize("name", ADAPTERS)
def test_windows_are_supported_or_a_reason(name: str) -> None:
    kernel = ADAPTERS[name]()
    reason = kernel.unsupported_reason(replace(FITS, window=True))
    cannot = "its windows end at the diagonal, and a sliding window needs others"
    old = name == "transformer-engine 2.2.0"
    assert reason == (cannot if old or kernel.name == "cudnn" else None)


def test_deterministic_gradients_are_requested_in_two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    assert not prepared.deterministic_requested()
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    assert prepared.deterministic_requested()
    assert all(make().deterministic for make in ADAPTERS.values())
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert prepared.deterministic_requested()


def test_cudnn_of_torch_is_rejected_where_gradients_must_repeat() -> None:
    reason = TorchCudnnKernel(deterministic=True).unsupported_reason(FITS)
    assert reason == "its gradients do not repeat bit by bit, and deterministic ones are requested"
