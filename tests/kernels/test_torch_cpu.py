from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_wallfacer.kernels.protocol import Inputs
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from tests.kernels.problems import LocalProblem, worst

FITS = Inputs(torch.device("cpu"), torch.float32, 64, 64)


def test_realistic_tile_in_half_precision() -> None:
    problem = LocalProblem(
        256, 256, batch=1, q_heads=4, kv_heads=2, head_dim=64, v_head_dim=64, causal=True, dtype=torch.bfloat16
    )
    assert worst(problem.solved_by(TorchCpuKernel()), problem.solution()) <= 2e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cpu_tensors_of_equal_head_dims_are_served(dtype: torch.dtype) -> None:
    assert TorchCpuKernel().unsupported_reason(replace(FITS, dtype=dtype)) is None


def test_tensors_elsewhere_are_rejected() -> None:
    reason = TorchCpuKernel().unsupported_reason(replace(FITS, device=torch.device("cuda", 1)))
    assert reason == "it runs on a CPU, the tensors are on cuda"


@pytest.mark.parametrize("v_head_dim", [5, 13])
@pytest.mark.parametrize("causal", [True, False])
def test_the_narrower_head_dim_is_padded(v_head_dim: int, causal: bool) -> None:
    problem = LocalProblem(q_heads=4, kv_heads=2, v_head_dim=v_head_dim, causal=causal)
    assert worst(problem.solved_by(TorchCpuKernel()), problem.solution()) <= 1e-13


def test_capped_logits_are_rejected() -> None:
    assert TorchCpuKernel().unsupported_reason(replace(FITS, softcap=30.0)) == "it does not cap logits, softcap is 30.0"
