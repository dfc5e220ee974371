from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_wallfacer.engine.merge import merge_into, surrogate_output
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


def unseen(*leading: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A partial result that has seen no key."""
    return torch.zeros(*leading, BATCH, HEADS, DIM, dtype=dtype), torch.full(
        (*leading, BATCH, HEADS), NOTHING, dtype=dtype
    )


# --- merge in place ---


def test_parts_merged_one_after_the_other_are_the_whole(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    out, lse = attention(q, k[:3], v[:3])
    for keys in (slice(3, 4), slice(4, 10)):
        merge_into(out, lse, *attention(q, k[keys], v[keys]))
    for got, want in zip((out, lse), attention(q, k, v), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_merging_does_not_depend_on_the_order(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    parts = [attention(q, k[keys], v[keys]) for keys in (slice(0, 3), slice(3, 4), slice(4, 10))]
    merged = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        out, lse = (x.clone() for x in parts[order[0]])
        for index in order[1:]:
            merge_into(out, lse, *parts[index])
        merged.append((out, lse))
    for other in merged[1:]:
        torch.testing.assert_close(other, merged[0], rtol=0, atol=1e-14)


def test_merging_changes_the_rows_of_a_view_only(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    out, lse = attention(q, k[:3], v[:3])
    before = out.clone(), lse.clone()
    merge_into(out[2:5], lse[2:5], *attention(q[2:5], k[3:], v[3:]))
    for got, old, want in zip((out, lse), before, attention(q, k, v), strict=True):
        torch.testing.assert_close(got[2:5], want[2:5], rtol=0, atol=1e-14)
        assert torch.equal(got[:2], old[:2])
        assert torch.equal(got[5:], old[5:])


def test_the_part_is_left_as_it_is(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    part = attention(q, k[3:], v[3:])
    before = [x.clone() for x in part]
    merge_into(*attention(q, k[:3], v[:3]), *part)
    assert all(torch.equal(x, old) for x, old in zip(part, before, strict=True))


def test_row_that_sees_nothing_stays_empty() -> None:
    out, lse = unseen(ROWS, dtype=torch.float32)
    merge_into(out, lse, *unseen(ROWS, dtype=torch.float32))
    assert not out.any()
    assert (lse == NOTHING).all()


def test_empty_part_changes_nothing(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse = attention(*qkv)
    before = out.clone(), lse.clone()
    merge_into(out, lse, *unseen(ROWS))
    assert torch.equal(out, before[0])
    assert torch.equal(lse, before[1])


def test_what_comes_to_empty_rows_is_taken_as_it_is(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse = unseen(ROWS)
    part = attention(*qkv)
    merge_into(out, lse, *part)
    assert torch.equal(out, part[0])
    assert torch.equal(lse, part[1])


def test_some_rows_empty_on_either_side(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    left, right = attention(q, k[:3], v[:3]), attention(q, k[3:], v[3:])
    for (out, lse), rows in ((left, slice(0, 2)), (right, slice(1, 4))):
        out[rows], lse[rows] = 0, NOTHING
    wanted = [x.clone() for x in left]
    for (first, end), of in (((0, 1), attention(q, k[3:], v[3:])), ((4, 6), attention(q, k, v))):
        for want, rows in zip(wanted, of, strict=True):
            want[first:end] = rows[first:end]
    merge_into(*left, *right)
    for got, want in zip(left, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_a_narrow_part_is_merged_in_the_precision_of_the_sum() -> None:
    out, lse = torch.full((1, 1, 1, 2), 1 / 3), torch.zeros(1, 1, 1)
    merge_into(out, lse, torch.ones(1, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 1))
    torch.testing.assert_close(out, torch.full((1, 1, 1, 2), 2 / 3), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 2.0).log(), rtol=1e-6, atol=0)


class Passes(TorchDispatchMode):
    """Counts the operations that write as many elements as the output has."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.size, self.seen = out.numel(), []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self.size:
            self.seen.append(str(func))
        return result


@pytest.mark.parametrize(
    ("dtype", "passes"), [(torch.float32, ["aten.lerp_"]), (torch.bfloat16, ["aten._to_copy", "aten.lerp_"])]
)
def test_the_outputs_are_gone_over_once(dtype: torch.dtype, passes: list[str]) -> None:
    (out, lse), (part, part_lse) = unseen(ROWS, dtype=torch.float32), unseen(ROWS, dtype=torch.float32)
    part = part.to(dtype)
    with Passes(out) as counted:
        merge_into(out, lse, part, part_lse)
    assert [name.rsplit(".", 1)[0] for name in counted.seen] == passes


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_far_apart_parts_do_not_overflow(shift: float) -> None:
    out, lse = torch.ones(ROWS, BATCH, HEADS, DIM), torch.zeros(ROWS, BATCH, HEADS)
    far = torch.full((ROWS, BATCH, HEADS, DIM), 2.0)
    merge_into(out, lse, far, torch.full((ROWS, BATCH, HEADS), shift))
    assert torch.equal(out, far if shift > 0 else torch.ones_like(far))


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
