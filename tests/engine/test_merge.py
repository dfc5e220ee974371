from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.engine.merge import PartialOutput, merge_stacked, surrogate_output
from megatron_wallfacer.kernels.reference import ReferenceKernel

ROWS, BATCH, HEADS, DIM = 6, 2, 4, 8
NOTHING = float("-inf")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return ReferenceKernel().forward(q, k, v, causal=False, scale=0.5)


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(randn(rows, BATCH, HEADS, DIM, seed=seed) for seed, rows in enumerate((ROWS, 10, 10)))


def empty(shards: int = 1, dtype: torch.dtype = torch.float64) -> PartialOutput:
    return PartialOutput(shards, torch.zeros(ROWS // shards, BATCH, HEADS, DIM), DIM, dtype)


def unseen(*leading: int) -> tuple[Tensor, Tensor]:
    """A partial result that has seen no key."""
    return torch.zeros(*leading, BATCH, HEADS, DIM), torch.full((*leading, BATCH, HEADS), NOTHING)


# --- running merge ---


def test_parts_added_one_after_the_other_are_the_whole(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    partial = empty()
    for keys in (slice(0, 3), slice(3, 4), slice(4, 10)):
        partial.add(slice(None), *attention(q, k[keys], v[keys]))
    out, lse = attention(q, k, v)
    torch.testing.assert_close(partial.out, out, rtol=0, atol=1e-14)
    torch.testing.assert_close(partial.lse, lse, rtol=0, atol=1e-14)


def test_part_of_some_rows_leaves_the_others(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    partial = empty()
    partial.add(slice(2, 5), *attention(q[2:5], k, v))
    seen = torch.tensor([False, False, True, True, True, False])
    assert torch.equal(partial.lse.isfinite().all(-1).all(-1), seen)
    assert not partial.out[~seen].any()
    torch.testing.assert_close(partial.out[seen], attention(q, k, v)[0][seen])


def test_row_that_sees_nothing_stays_empty() -> None:
    partial = empty(dtype=torch.float32)
    partial.add(slice(None), *unseen(ROWS))
    assert not partial.out.any()
    assert (partial.lse == NOTHING).all()


def test_empty_part_changes_nothing(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    partial = empty()
    partial.add(slice(None), *attention(*qkv))
    before = partial.out.clone(), partial.lse.clone()
    partial.add(slice(None), *unseen(ROWS))
    assert torch.equal(partial.out, before[0])
    assert torch.equal(partial.lse, before[1])


def test_block_of_shards_has_the_rows_of_all() -> None:
    partial = PartialOutput(3, torch.zeros(4, BATCH, HEADS, DIM, dtype=torch.bfloat16), 5, torch.float32)
    assert (partial.out.shape, partial.out.dtype) == ((12, BATCH, HEADS, 5), torch.float32)
    assert (partial.lse.shape, partial.lse.dtype) == ((12, BATCH, HEADS), torch.float32)


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_far_apart_parts_do_not_overflow(shift: float) -> None:
    partial = empty(dtype=torch.float32)
    near, far = torch.ones(ROWS, BATCH, HEADS, DIM), torch.full((ROWS, BATCH, HEADS, DIM), 2.0)
    partial.add(slice(None), near, torch.zeros(ROWS, BATCH, HEADS))
    partial.add(slice(None), far, torch.full((ROWS, BATCH, HEADS), shift))
    assert torch.equal(partial.out, far if shift > 0 else near)


# --- merge of a team ---


def test_stacked_parts_are_the_whole(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    parts = [attention(q, k[keys], v[keys]) for keys in (slice(0, 3), slice(3, 4), slice(4, 10))]
    merged = merge_stacked(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))
    for got, want in zip(merged, attention(q, k, v), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_stacked_parts_that_saw_nothing_weigh_nothing(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse = attention(*qkv)
    nothing = torch.zeros_like(out), torch.full_like(lse, NOTHING)
    merged = merge_stacked(torch.stack([nothing[0], out]), torch.stack([nothing[1], lse]))
    assert torch.equal(merged[0], out)
    assert torch.equal(merged[1], lse)


def test_rows_that_no_part_saw_stay_empty() -> None:
    out, lse = merge_stacked(*unseen(3, ROWS))
    assert not out.any()
    assert (lse == NOTHING).all()


# --- stand-in for the output in backward ---


def row_sums(dout: Tensor, stand_in: Tensor) -> Tensor:
    return (dout.double() * stand_in.double()).sum(-1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)]
)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_stand_in_has_the_row_sums(dtype: torch.dtype, tolerance: float, size: float) -> None:
    dout = (randn(ROWS, BATCH, HEADS, DIM) * size).to(dtype)
    out = randn(ROWS, BATCH, HEADS, DIM, seed=1, dtype=dtype)
    delta = row_sums(dout, out).to(torch.float64 if dtype == torch.float64 else torch.float32)
    stand_in = surrogate_output(dout, delta)
    # Rounding of the stand-in, times the lengths that it is multiplied with.
    lengths = dout.double().norm(dim=-1) * stand_in.double().norm(dim=-1)
    assert stand_in.dtype == dtype
    assert ((row_sums(dout, stand_in) - delta).abs() <= tolerance * lengths).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_stand_in_is_never_longer_than_the_output(dtype: torch.dtype, size: float) -> None:
    dout = (randn(ROWS, BATCH, HEADS, DIM) * size).to(dtype)
    out = randn(ROWS, BATCH, HEADS, DIM, seed=1, dtype=dtype)
    delta = row_sums(dout, out).to(torch.float64 if dtype == torch.float64 else torch.float32)
    longest = out.double().norm(dim=-1) * (1 + 4 * torch.finfo(dtype).eps)
    assert (surrogate_output(dout, delta).double().norm(dim=-1) <= longest).all()


def test_stand_in_of_a_gradient_along_the_output_is_the_output() -> None:
    out = randn(ROWS, BATCH, HEADS, DIM)
    dout = 3 * out
    torch.testing.assert_close(surrogate_output(dout, (dout * out).sum(-1)), out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_stand_in_of_a_zero_gradient_is_zero(dtype: torch.dtype) -> None:
    delta = torch.zeros(ROWS, BATCH, HEADS, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert not surrogate_output(torch.zeros(ROWS, BATCH, HEADS, DIM, dtype=dtype), delta).any()


def test_rows_without_gradient_get_none(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    _, lse = attention(q, k, v)
    dout = randn(ROWS, BATCH, HEADS, DIM, seed=9)
    dout[2:4] = 0
    stand_in = surrogate_output(dout, (dout * attention(q, k, v)[0]).sum(-1))
    dq, dk, dv = ReferenceKernel().backward(dout, q, k, v, stand_in, lse, causal=False, scale=0.5)
    assert not dq[2:4].any()
    assert all(grad.isfinite().all() for grad in (dq, dk, dv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1.0])
def test_stand_in_gives_the_gradients_of_the_output(dtype: torch.dtype, size: float) -> None:
    q, k, v = (randn(8, 1, 2, DIM, seed=seed, dtype=dtype) for seed in range(3))
    dout = (randn(8, 1, 2, DIM, seed=3) * size).to(dtype)
    kernel, options = ReferenceKernel(), {"causal": True, "scale": 0.35}
    out, lse = kernel.forward(q.double(), k.double(), v.double(), **options)
    delta = row_sums(dout, out).float()
    want = kernel.backward(*(x.double() for x in (dout, q, k, v)), out, lse, **options)
    got = kernel.backward(dout, q, k, v, surrogate_output(dout, delta), lse.float(), **options)
    for mine, exact in zip(got, want, strict=True):
        assert (mine.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
