"""Merging, row sums and proxys: PyTorch's operators, and the kernels for GPUs in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_wallfacer.engine import merge
from megatron_wallfacer.kernels.optional import UnavailableError
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.schedule.attn_tile import AttnTile
from tests.engine.triton_copies import kernels

ROWS, BATCH, HEADS, DIM = 6, 2, 4, 8
NOTHING = float("-inf")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return ReferenceKernel().forward(q, k, v, AttnTile((0, len(q)), (0, len(k))), AttnSpec(0.5))


@pytest.fixture(scope="module", params=["torch", "triton"])
def by(request: pytest.FixtureRequest) -> Iterator[ModuleType | SimpleNamespace]:
    """The module that computes them."""
    if request.param == "torch":
        yield merge
    else:
        with kernels("triton_proxy", interpreted=True) as proxy, kernels("triton_rows", interpreted=True) as rows:
            yield SimpleNamespace(merge_into=rows.merge_into, row_sums=proxy.row_sums, out_proxy=proxy.out_proxy)


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(randn(rows, BATCH, HEADS, DIM, seed=seed) for seed, rows in enumerate((ROWS, 10, 10)))


def unseen(*leading: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A partial result that has seen no key."""
    return torch.zeros(*leading, BATCH, HEADS, DIM, dtype=dtype), torch.full(
        (*leading, BATCH, HEADS), NOTHING, dtype=dtype
    )


# --- merge in place ---


def test_parts_merged_one_after_the_other_are_the_whole(by: ModuleType, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    out, lse = attention(q, k[:3], v[:3])
    for keys in (slice(3, 4), slice(4, 10)):
        by.merge_into(out, lse, *attention(q, k[keys], v[keys]))
    for got, want in zip((out, lse), attention(q, k, v), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_merging_does_not_depend_on_the_order(by: ModuleType, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    parts = [attention(q, k[keys], v[keys]) for keys in (slice(0, 3), slice(3, 4), slice(4, 10))]
    merged = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        out, lse = (x.clone() for x in parts[order[0]])
        for index in order[1:]:
            by.merge_into(out, lse, *parts[index])
        merged.append((out, lse))
    for other in merged[1:]:
        torch.testing.assert_close(other, merged[0], rtol=0, atol=1e-14)


def test_merging_changes_the_rows_of_a_view_only(by: ModuleType, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    out, lse = attention(q, k[:3], v[:3])
    before = out.clone(), lse.clone()
    by.merge_into(out[2:5], lse[2:5], *attention(q[2:5], k[3:], v[3:]))
    for got, old, want in zip((out, lse), before, attention(q, k, v), strict=True):
        torch.testing.assert_close(got[2:5], want[2:5], rtol=0, atol=1e-14)
        assert torch.equal(got[:2], old[:2])
        assert torch.equal(got[5:], old[5:])


def test_the_part_is_left_as_it_is(by: ModuleType, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    part = attention(q, k[3:], v[3:])
    before = [x.clone() for x in part]
    by.merge_into(*attention(q, k[:3], v[:3]), *part)
    assert all(torch.equal(x, old) for x, old in zip(part, before, strict=True))


def test_row_that_sees_nothing_stays_empty(by: ModuleType) -> None:
    out, lse = unseen(ROWS, dtype=torch.float32)
    by.merge_into(out, lse, *unseen(ROWS, dtype=torch.float32))
    assert not out.any()
    assert (lse == NOTHING).all()


def test_empty_part_changes_nothing(by: ModuleType, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse = attention(*qkv)
    before = out.clone(), lse.clone()
    by.merge_into(out, lse, *unseen(ROWS))
    assert torch.equal(out, before[0])
    assert torch.equal(lse, before[1])


def test_what_comes_to_empty_rows_is_taken_as_it_is(by: ModuleType, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse = unseen(ROWS)
    part = attention(*qkv)
    by.merge_into(out, lse, *part)
    assert torch.equal(out, part[0])
    assert torch.equal(lse, part[1])


def test_some_rows_empty_on_either_side(by: ModuleType, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    left, right = attention(q, k[:3], v[:3]), attention(q, k[3:], v[3:])
    for (out, lse), rows in ((left, slice(0, 2)), (right, slice(1, 4))):
        out[rows], lse[rows] = 0, NOTHING
    wanted = [x.clone() for x in left]
    for (first, end), of in (((0, 1), attention(q, k[3:], v[3:])), ((4, 6), attention(q, k, v))):
        for want, rows in zip(wanted, of, strict=True):
            want[first:end] = rows[first:end]
    by.merge_into(*left, *right)
    for got, want in zip(left, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_a_narrow_part_is_merged_in_the_precision_of_the_sum(by: ModuleType) -> None:
    out, lse = torch.full((1, 1, 1, 2), 1 / 3), torch.zeros(1, 1, 1)
    by.merge_into(out, lse, torch.ones(1, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 1))
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
        merge.merge_into(out, lse, part, part_lse)
    assert [name.rsplit(".", 1)[0] for name in counted.seen] == passes


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_far_apart_parts_do_not_overflow(by: ModuleType, shift: float) -> None:
    out, lse = torch.ones(ROWS, BATCH, HEADS, DIM), torch.zeros(ROWS, BATCH, HEADS)
    far = torch.full((ROWS, BATCH, HEADS, DIM), 2.0)
    by.merge_into(out, lse, far, torch.full((ROWS, BATCH, HEADS), shift))
    assert torch.equal(out, far if shift > 0 else torch.ones_like(far))


# --- row sums ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_sums_are_in_the_precision_of_the_sums(by: ModuleType, dtype: torch.dtype) -> None:
    dout, out = (randn(ROWS, BATCH, HEADS, 24, seed=seed, dtype=dtype) for seed in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    delta = by.row_sums(dout, out, wide)
    assert delta.dtype == wide
    torch.testing.assert_close(delta, (dout.double() * out.double()).sum(-1).to(wide))


# --- strides, sizes ---


@pytest.mark.parametrize("channels", [8, 24, 128])
def test_rows_may_lie_as_libraries_and_packets_have_them(by: ModuleType, channels: int) -> None:
    """Some heads of all; out as ``[b, s, h, d]``, lse as ``[b, h, s]``."""
    wide, narrow = torch.float32, torch.bfloat16
    out, lse = randn(5, 2, 8, channels, dtype=wide)[:, :, 4:], randn(5, 2, 8, seed=1, dtype=wide)[:, :, 4:]
    part = randn(2, 5, 4, channels, seed=2, dtype=narrow).transpose(0, 1)
    part_lse = randn(2, 4, 5, seed=3, dtype=wide).permute(2, 0, 1)
    want = [x.contiguous() for x in (out, lse)]
    merge.merge_into(*want, part.contiguous(), part_lse.contiguous())
    proxy, sums = proxy_of(by, part, part_lse), by.row_sums(part, part, wide)
    by.merge_into(out, lse, part, part_lse)
    for got, wanted in zip((out, lse), want, strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(proxy, proxy_of(merge, part, part_lse))
    torch.testing.assert_close(sums, merge.row_sums(part, part, wide))


def test_no_rows(by: ModuleType) -> None:
    out, lse = torch.zeros(0, 1, 2, 8), torch.zeros(0, 1, 2)
    by.merge_into(out, lse, out.clone(), lse.clone())
    assert proxy_of(by, out, lse).shape == out.shape


# --- on a GPU ---


@pytest.mark.parametrize("generation", [80, 90, 100])
def test_kernels_compile_for_gpus_that_are_not_here(generation: int) -> None:
    triton = pytest.importorskip("triton")
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with kernels("triton_proxy", interpreted=False) as proxy, kernels("triton_rows", interpreted=False) as rows:
        on_rows = {"ROWS": 8, "WIDTH": 128}
        of_lists = on_rows | {"SOURCES": 3, "NARROW": tl.bfloat16, "WIDE": tl.float32, "ALIGNED": True}
        pointers = {
            proxy._row_sums: (("*bf16", "*bf16", "*fp32"), "i32", on_rows),
            proxy._out_proxy: (("*bf16", "*fp32", "*bf16"), "i32", on_rows),
            rows._sum: (("*i64",), "i64", of_lists),
            rows._merge: (("*i64",), "i64", of_lists),
        }
        for kernel, (types, others, sizes) in pointers.items():
            signature = dict.fromkeys(kernel.arg_names, others) | dict.fromkeys(sizes, "constexpr")
            signature |= dict(zip(kernel.arg_names, types, strict=False))
            source = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
            assert triton.compile(source, target=GPUTarget("cuda", generation, 32)).asm["cubin"]


def test_tensors_on_a_gpu_are_given_to_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    names = ("merge_into", "row_sums", "out_proxy")
    gpu = SimpleNamespace(**{name: partial(lambda name, *_: called.append(name), name) for name in names})
    monkeypatch.setattr(merge, "kernels", lambda: gpu)
    with FakeTensorMode():
        out, lse = torch.empty(4, 1, 2, 8, device="cuda"), torch.empty(4, 1, 2, device="cuda")
        merge.merge_into(out, lse, out, lse)
        merge.row_sums(out, out, torch.float32)
        merge.out_proxy(out, lse, out)
    assert called == list(names)


def test_a_gpu_without_triton_is_rejected_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(merge.TRITON, modules=("no_such_module",))
    monkeypatch.setattr(merge, "TRITON", missing)
    merge.kernels.cache_clear()
    merge.check_rows(torch.device("cpu"))
    with pytest.raises(UnavailableError, match="triton is not installed: pip install triton"):
        merge.check_rows(torch.device("cuda"))


# --- proxy for the output in backward ---


def proxy_of(by: ModuleType, dout: Tensor, delta: Tensor) -> Tensor:
    """Made by one of the implementations."""
    proxy = torch.empty_like(dout)
    by.out_proxy(dout, delta, proxy)
    return proxy


def row_sums(dout: Tensor, proxy: Tensor) -> Tensor:
    return (dout.double() * proxy.double()).sum(-1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)]
)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_proxy_has_the_row_sums(by: ModuleType, dtype: torch.dtype, tolerance: float, size: float) -> None:
    dout = (randn(ROWS, BATCH, HEADS, DIM) * size).to(dtype)
    out = randn(ROWS, BATCH, HEADS, DIM, seed=1, dtype=dtype)
    delta = row_sums(dout, out).to(torch.float64 if dtype == torch.float64 else torch.float32)
    proxy = proxy_of(by, dout, delta)
    # Rounding of the proxy, times the lengths that it is multiplied with.
    lengths = dout.double().norm(dim=-1) * proxy.double().norm(dim=-1)
    assert proxy.dtype == dtype
    if by is not merge and dtype == torch.bfloat16:
        tolerance *= 2  # the interpreter cuts off where a GPU rounds
    assert ((row_sums(dout, proxy) - delta).abs() <= tolerance * lengths).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_proxy_is_never_longer_than_the_output(by: ModuleType, dtype: torch.dtype, size: float) -> None:
    dout = (randn(ROWS, BATCH, HEADS, DIM) * size).to(dtype)
    out = randn(ROWS, BATCH, HEADS, DIM, seed=1, dtype=dtype)
    delta = row_sums(dout, out).to(torch.float64 if dtype == torch.float64 else torch.float32)
    longest = out.double().norm(dim=-1) * (1 + 4 * torch.finfo(dtype).eps)
    assert (proxy_of(by, dout, delta).double().norm(dim=-1) <= longest).all()


def test_proxy_of_a_gradient_along_the_output_is_the_output(by: ModuleType) -> None:
    out = randn(ROWS, BATCH, HEADS, DIM)
    dout = 3 * out
    torch.testing.assert_close(proxy_of(by, dout, (dout * out).sum(-1)), out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_proxy_of_a_zero_gradient_is_zero(by: ModuleType, dtype: torch.dtype) -> None:
    delta = torch.zeros(ROWS, BATCH, HEADS, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert not proxy_of(by, torch.zeros(ROWS, BATCH, HEADS, DIM, dtype=dtype), delta).any()


def test_rows_without_gradient_get_none(by: ModuleType, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    _, lse = attention(q, k, v)
    dout = randn(ROWS, BATCH, HEADS, DIM, seed=9)
    dout[2:4] = 0
    proxy = proxy_of(by, dout, (dout * attention(q, k, v)[0]).sum(-1))
    dq, dk, dv = ReferenceKernel().backward(
        dout, q, k, v, proxy, lse, AttnTile((0, len(q)), (0, len(k))), AttnSpec(0.5)
    )
    assert not dq[2:4].any()
    assert all(grad.isfinite().all() for grad in (dq, dk, dv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1.0])
def test_proxy_gives_the_gradients_of_the_output(by: ModuleType, dtype: torch.dtype, size: float) -> None:
    q, k, v = (randn(8, 1, 2, DIM, seed=seed, dtype=dtype) for seed in range(3))
    dout = (randn(8, 1, 2, DIM, seed=3) * size).to(dtype)
    kernel, call = ReferenceKernel(), (AttnTile((0, len(q)), (0, len(k)), causal=True), AttnSpec(0.35))
    out, lse = kernel.forward(q.double(), k.double(), v.double(), *call)
    delta = row_sums(dout, out).float()
    want = kernel.backward(*(x.double() for x in (dout, q, k, v)), out, lse, *call)
    got = kernel.backward(dout, q, k, v, proxy_of(by, dout, delta), lse.float(), *call)
    for mine, exact in zip(got, want, strict=True):
        assert (mine.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


# --- a NaN is not hidden ---


def test_a_nan_in_either_part_stays_one(by: ModuleType) -> None:
    for place in range(2):
        out, lse = torch.ones(2, 1, 1, 8), torch.zeros(2, 1, 1)
        part_out, part_lse = torch.ones(2, 1, 1, 8), torch.zeros(2, 1, 1)
        (lse, part_lse)[place][0] = float("nan")
        by.merge_into(out, lse, part_out, part_lse)
        assert out[0].isnan().all()
        assert lse[0].isnan().all()
        assert torch.equal(out[1], torch.ones(1, 1, 8))
