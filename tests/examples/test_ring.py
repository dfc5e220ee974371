"""The plain loop of examples/ring_in_40_lines.py equals the engine, outputs and gradients."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_wallfacer.attention import attention
from megatron_wallfacer.schedule.grid import Grid
from tests.docs.pages import ROOT
from tests.support.pool import Pool

EXAMPLE = ROOT / "examples" / "ring_in_40_lines.py"
RANKS, TOKENS, HEADS, HEAD_DIM = 4, 64, 3, 16
#: Absolute, fp64; outputs and gradients are of order one.
TOLERANCE = 1e-12


def inputs() -> torch.Tensor:
    """Return q, k, v and the gradient of the output: ``[4, 1, tokens, heads, head_dim]``, fp64."""
    return torch.randn(4, 1, TOKENS, HEADS, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def engine(rank: int) -> list[Any]:
    """Return out, dq, dk, dv of one rank, computed by the engine on a ring of all ranks."""
    shards = runpy.run_path(str(EXAMPLE))["shards"]
    q, k, v, dout = (shards(x, RANKS)[rank] for x in inputs())
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, plan=Grid(ring_outer=RANKS), causal=True)
    out.backward(dout)
    return [x.detach().numpy() for x in (out, *(leaf.grad for leaf in leaves))]


def test_the_plain_loop_equals_the_engine(pools: Callable[[int], Pool]) -> None:
    example = runpy.run_path(str(EXAMPLE))
    q, k, v, dout = inputs()
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    outs = example["ring_attention"](*whole, RANKS)
    torch.autograd.backward(outs, example["shards"](dout, RANKS))
    expected = [outs, *(example["shards"](x.grad, RANKS) for x in whole)]
    for rank, computed in enumerate(pools(RANKS).run(engine)):
        for name, ours, plain in zip(("out", "dq", "dk", "dv"), computed, expected, strict=True):
            error = (torch.from_numpy(ours) - plain[rank].detach()).abs().max().item()
            assert error < TOLERANCE, f"rank {rank}, {name}: {error}"


def test_the_file_runs_and_is_short() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    name, _, error = done.stdout.strip().rpartition(" ")
    assert name == "largest difference from dense attention:"
    assert float(error) < TOLERANCE
    assert len(EXAMPLE.read_text().splitlines()) <= 45
