"""The public function, on one rank without torch.distributed unless a pool is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_wallfacer.attention import attention, forget_groups
from megatron_wallfacer.engine.connections import _made
from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from tests.support.dense import Problem
from tests.support.pool import Pool

ALONE = Grid()


def tensors(
    *, q: tuple[int, ...] = (2, 6, 4, 8), k: tuple[int, ...] = (2, 6, 2, 8), v: tuple[int, ...] = (2, 6, 2, 8)
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in (q, k, v)]


def definition(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True) -> Tensor:
    group = q.shape[2] // k.shape[2]
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, dim=2))
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.repeat_interleave(group, dim=2))


# --- what it computes ---


def test_scale_is_head_dim_to_the_minus_half_unless_given() -> None:
    q, k, v = tensors()
    torch.testing.assert_close(attention(q, k, v, plan=ALONE), definition(q, k, v, scale=8**-0.5))


@pytest.mark.parametrize("scale", [1e-9, 0.125, 1.0])
def test_scale_may_be_given(scale: float) -> None:
    q, k, v = tensors()
    torch.testing.assert_close(attention(q, k, v, plan=ALONE, scale=scale), definition(q, k, v, scale=scale))


def test_full_attention() -> None:
    q, k, v = tensors()
    out = attention(q, k, v, plan=ALONE, causal=False)
    torch.testing.assert_close(out, definition(q, k, v, scale=8**-0.5, causal=False))


@pytest.mark.parametrize("kernel", ["auto", "torch", "reference"])
def test_kernel_by_name(kernel: str) -> None:
    q, k, v = tensors()
    torch.testing.assert_close(attention(q, k, v, plan=ALONE, kernel=kernel), definition(q, k, v, scale=8**-0.5))


def test_values_may_have_another_head_dim_with_the_reference_kernel() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(v=(2, 6, 2, 5)))
    out = attention(q, k, v, plan=ALONE, kernel="reference")
    torch.testing.assert_close(out, definition(q, k, v, scale=8**-0.5))
    assert out.shape == (2, 6, 4, 5)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_definition(causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    dout = torch.randn(2, 6, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(attention(q, k, v, plan=ALONE, causal=causal), (q, k, v), dout)
    want = torch.autograd.grad(definition(q, k, v, scale=8**-0.5, causal=causal), (q, k, v), dout)
    torch.testing.assert_close(got, want)


def test_gradients_of_finite_differences() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(q=(1, 4, 2, 3), k=(1, 4, 1, 3), v=(1, 4, 1, 3)))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, plan=ALONE), (q, k, v))


def test_plan_may_be_a_grid_or_a_plan() -> None:
    q, k, v = tensors()
    assert torch.equal(
        attention(q, k, v, plan=ALONE),
        attention(q, k, v, plan=Plan(ALONE, "any", "paper", "pass-q", "pass-q", head_groups=2)),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients_have_the_dtype_of_the_inputs(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors())
    out = attention(q, k, v, plan=ALONE)
    out.sum().backward()
    assert {x.dtype for x in (out, q.grad, k.grad, v.grad)} == {dtype}


def test_output_and_gradients_are_on_the_device_of_the_inputs() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = attention(q, k, v, plan=ALONE)
    out.sum().backward()
    assert {x.device for x in (out, q.grad, k.grad, v.grad)} == {torch.device("cpu")}


def test_inputs_need_not_be_contiguous() -> None:
    q, k, v = tensors()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(attention(*strided, plan=ALONE), attention(q, k, v, plan=ALONE))


def test_inputs_are_left_as_they_are() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    before = [x.detach().clone() for x in (q, k, v)]
    attention(q, k, v, plan=ALONE).sum().backward()
    assert all(torch.equal(x, old) for x, old in zip((q, k, v), before, strict=True))


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    q, k, v = tensors()
    q.requires_grad_()
    attention(q, k, v, plan=ALONE).sum().backward()
    assert q.grad is not None
    assert k.grad is v.grad is None


# --- on several ranks ---


def run_scaled(rank: int, problem: Problem, scale: float, v_head_dim: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """On a worker: output and its shape, with a scale and a head dim of values of one's own."""
    q, k, v, _ = (problem.shard(x, rank) for x in problem.tensors())
    out = attention(q, k, v[..., :v_head_dim], plan=Grid(team=2, ring_outer=2), scale=scale, kernel="reference")
    forget_groups()
    return out.numpy(), tuple(out.shape)


def run_groups_made(rank: int, problem: Problem) -> list[int]:
    """On a worker: how many sets of groups there are after each call."""
    q, k, v, _ = (problem.shard(x, rank) for x in problem.tensors())
    counts = []
    for grid in (Grid(team=4), Grid(team=4), Grid(team=2, ring_outer=2), Grid(team=4)):
        attention(q, k, v, plan=grid)
        counts.append(len(_made))
    forget_groups()
    return [*counts, len(_made)]


def test_scale_and_head_dim_of_values_hold_on_every_rank(pools: Callable[[int], Pool]) -> None:
    problem = Problem(4, kv_heads=2)
    q, k, v, _ = problem.tensors()
    want = definition(q, k, v[..., :5], scale=0.7)
    for rank, (out, shape) in enumerate(pools(4).run(run_scaled, problem, 0.7, 5)):
        assert shape == (1, 4, 4, 5)
        torch.testing.assert_close(torch.from_numpy(out), problem.shard(want, rank))


def test_groups_are_made_once_for_a_grid_and_forgotten_when_asked(pools: Callable[[int], Pool]) -> None:
    assert pools(4).run(run_groups_made, Problem(4)) == [[1, 1, 2, 2, 0]] * 4


# --- errors ---


@pytest.mark.parametrize(
    ("shapes", "option", "message"),
    [
        ({"q": (6, 4, 8)}, "q", "q=(6, 4, 8): must be bshd: batch, tokens, heads, head dim"),
        ({"k": (2, 6, 8)}, "k", "k=(2, 6, 8): must be bshd: batch, tokens, heads, head dim"),
        ({"v": (2, 6, 2, 8, 1)}, "v", "v=(2, 6, 2, 8, 1): must be bshd: batch, tokens, heads, head dim"),
        (
            {"q": (2, 5, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8)},
            "tokens",
            "tokens=5: must be a multiple of 2 on each rank",
        ),
        (
            {"k": (2, 4, 2, 8), "v": (2, 4, 2, 8)},
            "k, v",
            "k, v=((2, 4, 2, 8), (2, 4, 2, 8)): must be tensors with the batch and tokens of q (2, 6, 4, 8)",
        ),
        (
            {"k": (1, 6, 2, 8), "v": (1, 6, 2, 8)},
            "k, v",
            "k, v=((1, 6, 2, 8), (1, 6, 2, 8)): must be tensors with the batch and tokens of q (2, 6, 4, 8)",
        ),
        (
            {"v": (2, 6, 4, 8)},
            "k, v",
            "k, v=((2, 6, 2, 8), (2, 6, 4, 8)): must be tensors with the batch and tokens of q (2, 6, 4, 8)",
        ),
        (
            {"k": (2, 6, 3, 8), "v": (2, 6, 3, 8)},
            "k",
            "k=(2, 6, 3, 8): must be tensors whose heads divide q's heads, with q's head dim: q is (2, 6, 4, 8)",
        ),
        (
            {"k": (2, 6, 2, 4)},
            "k",
            "k=(2, 6, 2, 4): must be tensors whose heads divide q's heads, with q's head dim: q is (2, 6, 4, 8)",
        ),
    ],
)
def test_shape_that_does_not_fit_is_rejected(shapes: dict[str, tuple[int, ...]], option: str, message: str) -> None:
    with pytest.raises(OptionError) as error:
        attention(*tensors(**shapes), plan=ALONE)
    assert error.value.option == option
    assert str(error.value) == message


def test_mixed_dtypes_are_rejected() -> None:
    q, k, v = tensors()
    with pytest.raises(OptionError) as error:
        attention(q, k.float(), v, plan=ALONE)
    message = "k.dtype=torch.float32: must be one floating-point dtype for all tensors; q has torch.float64"
    assert str(error.value) == message


def test_integers_are_rejected() -> None:
    with pytest.raises(OptionError, match=r"q\.dtype=torch\.int64: must be one floating-point dtype"):
        attention(*(x.long() for x in tensors()), plan=ALONE)


@pytest.mark.parametrize(
    ("kernel", "allowed"),
    [("flash", "auto or reference here, because flash4 cannot: "), ("no-such", "one of auto, flash, te, ")],
)
def test_kernel_that_is_not_there_is_rejected(kernel: str, allowed: str) -> None:
    with pytest.raises(OptionError, match=rf"kernel={kernel}: must be {allowed}"):
        attention(*tensors(), plan=ALONE, kernel=kernel)


def test_tensors_that_the_kernel_cannot_reach_are_rejected() -> None:
    with pytest.raises(OptionError, match="it runs on a CPU, the tensors are on meta"):
        attention(*(x.to("meta") for x in tensors()), plan=ALONE)


def test_plan_of_another_size_than_the_group_is_rejected() -> None:
    with pytest.raises(OptionError, match="must be axes whose product is the group's size 1"):
        attention(*tensors(), plan=Plan(Grid(ring_outer=2)))


def test_errors_are_of_the_projects_own_kind() -> None:
    with pytest.raises(WallfacerError):
        attention(*tensors(), plan=Grid(ring_outer=2))


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive_is_rejected(scale: float) -> None:
    """PyTorch's CPU kernel would answer NaN."""
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(OptionError, match=r"scale=.*: must be positive"):
        attention(x, x, x, plan=Grid(), scale=scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": (0, 6)}, "batch=2: must be 1 with cu_seqlens"),
        (
            {"window_size": (-2, 0)},
            r"window_size=\(-2, 0\): must be numbers of tokens \(left, right\), -1 for no limit",
        ),
        ({"sinks": torch.zeros(3)}, r"sinks=\(3,\): must be one for each of the 4 query heads"),
        ({"softcap": 2.0}, "kernel=auto: must be reference here, because torch cannot: it does not cap logits"),
    ],
)
def test_masks_that_do_not_fit_are_rejected(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attention(*tensors(), plan=ALONE, **options)


REOPENED = """
import atexit, os, sys

def say(*words):
    os.write(1, (" ".join(words) + chr(10)).encode())  # one piece: ranks share the pipe

# Registered first, so it runs last.
atexit.register(lambda: say("left", str(len(dist.distributed_c10d._world.pg_map))))

import torch, torch.distributed as dist
from megatron_wallfacer.attention import attention, forget_groups
from megatron_wallfacer.engine.leaving import at_exit
from megatron_wallfacer.megatron.communicators import destroy_world
from megatron_wallfacer.schedule.grid import Grid

x = torch.ones(1, 4, 2, 8)

def open_world(number):
    store = f"file://{sys.argv[1]}/store{number}"
    dist.init_process_group("gloo", init_method=store, rank=int(os.environ["RANK"]), world_size=4)
    attention(x, x, x, plan=Grid(team=2, ring_outer=2))

for world in range(2):
    open_world(world)
    dist.destroy_process_group()
forget_groups()
say("still here")

open_world(2)
at_exit(destroy_world)  # as the Megatron plugin does
destroy, order = dist.destroy_process_group, []

def recorded(group=None):
    order.append("world" if group is None else group.group_desc)
    destroy(group)
    if group is None:
        say("order", *order)

dist.destroy_process_group = recorded
"""


def test_groups_end_with_their_world_and_with_the_process(tmp_path: Path) -> None:
    script = tmp_path / "reopened.py"
    script.write_text(REOPENED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        str(script),
        str(tmp_path),
    ]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("still here") == 4, done.stderr
    names = [f"WALLFACER_{axis}_{kind}" for axis in ("TEAM", "RING_OUTER") for kind in ("INPUTS", "RESULTS")]
    names.append("WALLFACER_CP_INPUTS")
    orders = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("order")]
    assert [sorted(order[:-1]) for order in orders] == [sorted(names)] * 4, done.stdout + done.stderr
    assert [order[-1] for order in orders] == ["world"] * 4
    assert orders == [orders[0]] * 4
    assert done.stdout.count("left 0") == 4
    assert done.returncode == 0
    assert "destroy_process_group() was not called" not in done.stderr
