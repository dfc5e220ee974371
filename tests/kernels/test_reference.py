from __future__ import annotations

import torch

from megatron_wallfacer.kernels.protocol import AttnSpec, Inputs
from megatron_wallfacer.kernels.reference import ReferenceKernel
from tests.kernels.problems import LocalProblem, worst


def test_head_dim_of_values_may_differ() -> None:
    problem = LocalProblem(q_heads=4, kv_heads=2, head_dim=6, v_head_dim=10, causal=True)
    assert worst(problem.solved_by(ReferenceKernel()), problem.solution()) <= 1e-13


def test_all_inputs_are_supported() -> None:
    odd = Inputs(torch.device("meta"), torch.float16, head_dim=7, v_head_dim=3, softcap=2.0, window=True)
    assert ReferenceKernel().unsupported_reason(odd) is None


def test_half_precision_inputs_are_summed_in_single_precision() -> None:
    problem = LocalProblem(rows=2, cols=512, dtype=torch.bfloat16)
    q, k, v, _ = problem.tensors()
    out, _ = ReferenceKernel().forward(q, k, v, problem.call[0], AttnSpec(0.0))
    mean = v.double().mean(0).expand_as(out).to(torch.bfloat16)
    torch.testing.assert_close(out, mean, rtol=2**-7, atol=2**-10)
