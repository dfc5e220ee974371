"""What every kernel promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel, accumulation_dtype
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.attn_tile import AttnTile, TileWindow
from tests.kernels.problems import SCALE, LocalProblem, worst

KERNELS = {"torch": TorchCpuKernel(), "reference": ReferenceKernel()}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
SHAPES = {"causal": (12, 12, True), "full": (12, 12, False), "wide": (4, 20, False), "tall": (20, 4, False)}

every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@every_kernel
@every_dtype
@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_results_are_those_of_autograd(
    kernel: Kernel, dtype: torch.dtype, heads: tuple[int, int], shape: tuple[int, int, bool]
) -> None:
    rows, cols, causal = shape
    problem = LocalProblem(rows, cols, q_heads=heads[0], kv_heads=heads[1], causal=causal, dtype=dtype)
    assert worst(problem.solved_by(kernel), problem.solution()) <= TOLERANCE[dtype]


#: Windows that begin and end inside, a long way from the diagonal, over more rows than one strip of the CPU kernel.
WINDOWS = {
    "window": (40, 40, TileWindow(3, 0)),
    "itself": (9, 9, TileWindow(0, 0)),
    "one side": (12, 12, TileWindow(None, 4)),
    "other side": (12, 12, TileWindow(4, None)),
    "apart": (300, 700, TileWindow(-2, 400)),
    "strips": (700, 700, TileWindow(600, 0)),
}


@every_kernel
@every_dtype
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(kernel: Kernel, dtype: torch.dtype, name: str) -> None:
    rows, cols, window = WINDOWS[name]
    problem = LocalProblem(rows, cols, batch=1, q_heads=2, kv_heads=1, window=window, dtype=dtype)
    found, want = problem.solved_by(kernel), problem.solution()
    if name == "itself":  # softmax of one score does not change with it
        found, want = ({key: one[key] for key in ("out", "lse", "dv")} for one in (found, want))
    assert worst(found, want) <= TOLERANCE[dtype]


@every_kernel
def test_a_window_that_is_off_by_one_is_seen(kernel: Kernel) -> None:
    problem = LocalProblem(40, 40, window=TileWindow(3, 0))
    for wrong in (TileWindow(4, 0), TileWindow(2, 0), TileWindow(3, 1)):
        assert worst(replace(problem, window=wrong).solved_by(kernel), problem.solution()) > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_capped_logits(causal: bool) -> None:
    problem = LocalProblem(q_heads=4, kv_heads=2, causal=causal, softcap=0.8)
    assert worst(problem.solved_by(KERNELS["reference"]), problem.solution()) <= TOLERANCE[torch.float64]
    assert worst(replace(problem, softcap=0.0).solved_by(KERNELS["reference"]), problem.solution()) > 1e-3


@every_dtype
@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
def test_kernels_agree(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    problem = LocalProblem(64, 64, q_heads=heads[0], kv_heads=heads[1], head_dim=32, v_head_dim=32, causal=True)
    found, want = (problem.solved_by(KERNELS[name]) for name in ("torch", "reference"))
    assert worst(found, want) <= TOLERANCE[dtype]


@every_kernel
@pytest.mark.parametrize("causal", [True, False])
def test_lse_is_the_natural_logarithm_with_the_scale_applied(kernel: Kernel, causal: bool) -> None:
    problem = LocalProblem(causal=causal)
    q, k, v, _ = problem.tensors()
    _, lse = kernel.forward(q, k, v, *problem.call)
    torch.testing.assert_close(lse, problem.solution()["lse"])


@every_kernel
def test_lse_of_equal_scores_counts_the_keys(kernel: Kernel) -> None:
    problem = LocalProblem(rows=3, cols=7)
    q, k, v, _ = problem.tensors()
    _, lse = kernel.forward(torch.zeros_like(q), k, v, *problem.call)
    torch.testing.assert_close(lse.exp(), torch.full_like(lse, 7.0))


@every_kernel
@every_dtype
def test_results_have_the_dtype_of_the_inputs_and_lse_that_of_accumulation(kernel: Kernel, dtype: torch.dtype) -> None:
    found = LocalProblem(dtype=dtype, causal=True).solved_by(kernel)
    assert found.pop("lse").dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {tensor.dtype for tensor in found.values()} == {dtype}


@every_kernel
def test_kv_heads_are_not_expanded(kernel: Kernel) -> None:
    problem = LocalProblem(rows=5, cols=9, q_heads=6, kv_heads=2)
    found = problem.solved_by(kernel)
    assert found["out"].shape == found["dq"].shape == (5, 2, 6, 8)
    assert found["lse"].shape == (5, 2, 6)
    assert found["dk"].shape == found["dv"].shape == (9, 2, 2, 8)


@every_kernel
def test_inputs_may_be_slices_of_larger_blocks(kernel: Kernel) -> None:
    problem = LocalProblem(16, 16)
    q, k, v, dout = problem.tensors()
    rows, cols, call = slice(4, 12), slice(2, 6), (AttnTile((4, 12), (2, 6)), AttnSpec(SCALE))
    sliced = (dout[rows], q[rows], k[cols], v[cols])
    copied = tuple(x.clone() for x in sliced)
    out, lse = kernel.forward(*sliced[1:], *call)
    for got, want in zip(
        (out, lse, *kernel.backward(*sliced, out, lse, *call)),
        (*kernel.forward(*copied[1:], *call), *kernel.backward(*copied, out, lse, *call)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@every_kernel
@every_dtype
@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
def test_backward_of_tiles_with_the_global_lse_adds_up_to_the_gradients(
    kernel: Kernel, dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    problem = LocalProblem(12, 12, q_heads=heads[0], kv_heads=heads[1], causal=True, dtype=dtype)
    q, k, v, dout = problem.tensors()
    out, lse = kernel.forward(q, k, v, *problem.call)
    sums = {
        name: torch.zeros_like(x, dtype=accumulation_dtype(dtype)) for name, x in zip("qkv", (q, k, v), strict=True)
    }
    for rows, cols in [(0, 0), (4, 0), (8, 0), (4, 4), (8, 4), (8, 8)]:
        r, c = slice(rows, rows + 4), slice(cols, cols + 4)
        tile = AttnTile((rows, rows + 4), (cols, cols + 4), causal=rows == cols)
        parts = kernel.backward(dout[r], q[r], k[c], v[c], out[r], lse[r], tile, AttnSpec(SCALE))
        for name, where, part in zip("qkv", (r, c, c), parts, strict=True):
            sums[name][where] += part
    want = problem.solution()
    assert (
        worst({f"d{name}": total for name, total in sums.items()}, {n: want[n] for n in ("dq", "dk", "dv")})
        <= (TOLERANCE[dtype])
    )


@every_kernel
def test_backward_uses_nothing_of_the_output_but_its_row_sums(kernel: Kernel) -> None:
    problem = LocalProblem(causal=True)
    q, k, v, dout = problem.tensors()
    out, lse = kernel.forward(q, k, v, *problem.call)
    # Another tensor with the same rowsum(dout * out): all of it in one channel.
    other = torch.zeros_like(out)
    other[..., 0] = (dout * out).sum(-1) / dout[..., 0]
    for got, want in zip(
        kernel.backward(dout, q, k, v, other, lse, *problem.call),
        kernel.backward(dout, q, k, v, out, lse, *problem.call),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "accumulated"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_sums_are_at_least_single_precision(dtype: torch.dtype, accumulated: torch.dtype) -> None:
    assert accumulation_dtype(dtype) == accumulated
