"""Every adapter upon a fake of its library: layouts, windows, the global lse, and what is rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.kernels import te
from megatron_wallfacer.kernels.optional import UnavailableError
from megatron_wallfacer.kernels.prepared import PreparedKernel
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.schedule.attn_tile import AttnTile, TileWindow
from tests.kernels.problems import SCALE, LocalProblem, packed, worst
from tests.kernels.releases import ADAPTERS

HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
SHAPES = {"causal": (12, 12, True), "full": (12, 12, False), "wide": (4, 20, False), "tall": (20, 4, False)}
#: Windows in which each row and each column has an unmasked pair, of squares and of tiles that are not.
WINDOWS = {
    "window": (12, 12, TileWindow(3, 0)),
    "itself and next": (9, 9, TileWindow(0, 1)),
    "one side": (12, 12, TileWindow(None, 4)),
    "other side": (12, 12, TileWindow(4, None)),
    "other half": (12, 12, TileWindow(0, None)),
    "wide": (6, 14, TileWindow(2, 9)),
    "wide, one side": (6, 14, TileWindow(None, 8)),
    "wide, other side": (6, 14, TileWindow(1, None)),
    "one row": (1, 9, TileWindow(None, 8)),
    "tall": (14, 5, TileWindow(10, 2)),
    "tall, one side": (14, 5, TileWindow(None, 1)),
    "tall, other side": (14, 5, TileWindow(9, None)),
    "very tall": (14, 2, TileWindow(12, 0)),
    "no limit": (7, 5, TileWindow(6, 4)),
}
#: Kernels that know windows: all but these, which know only what is named.
_NO_LIMIT = {"one row", "no limit"}
CAUSAL_WINDOWS = {
    "transformer-engine 2.2.0": {"window", *_NO_LIMIT},
    "cudnn": _NO_LIMIT,
    "cudnn, wide lse": _NO_LIMIT,
}
CAPS_LOGITS = [name for name in ADAPTERS if name.startswith("flash")]

every_adapter = pytest.mark.parametrize("kernel", [make() for make in ADAPTERS.values()], ids=list(ADAPTERS))


@every_adapter
@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_results_are_those_of_autograd(
    kernel: PreparedKernel, heads: tuple[int, int], shape: tuple[int, int, bool]
) -> None:
    rows, cols, causal = shape
    problem = LocalProblem(rows, cols, q_heads=heads[0], kv_heads=heads[1], causal=causal)
    assert worst(problem.solved_by(kernel), problem.solution()) <= 1e-13


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_windows_are_supported_or_an_error(name: str, window: str) -> None:
    rows, cols, limits = WINDOWS[window]
    problem = LocalProblem(rows, cols, q_heads=4, kv_heads=2, window=limits)
    kernel = ADAPTERS[name]()
    if window not in CAUSAL_WINDOWS.get(name, WINDOWS):
        with pytest.raises(OptionError, match=rf"kernel={kernel.name}: must be flash or torch here, because"):
            problem.solved_by(kernel)
        return
    assert worst(problem.solved_by(kernel), problem.solution()) <= 1e-13


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in CAUSAL_WINDOWS])
def test_a_window_that_is_off_by_one_is_seen(name: str) -> None:
    problem = LocalProblem(12, 12, window=TileWindow(3, 0))
    for wrong in (TileWindow(4, 0), TileWindow(2, 0), TileWindow(3, 1)):
        assert worst(replace(problem, window=wrong).solved_by(ADAPTERS[name]()), problem.solution()) > 1e-3


@pytest.mark.parametrize("name", ["flash-attn 2.8.3", "transformer-engine 2.20.2"])
@pytest.mark.parametrize(("rows", "cols", "window"), [(6, 14, TileWindow(None, 5)), (6, 14, TileWindow(-1, None))])
def test_windows_that_mask_a_whole_row_or_column_are_an_error(
    name: str, rows: int, cols: int, window: TileWindow
) -> None:
    with pytest.raises(WallfacerError, match="masks all pairs of a row or column"):
        LocalProblem(rows, cols, window=window).solved_by(ADAPTERS[name]())


@pytest.mark.parametrize("name", CAPS_LOGITS)
@pytest.mark.parametrize("causal", [True, False])
def test_capped_logits(name: str, causal: bool) -> None:
    problem = LocalProblem(q_heads=4, kv_heads=2, causal=causal, softcap=0.8)
    assert worst(problem.solved_by(ADAPTERS[name]()), problem.solution()) <= 1e-13
    assert worst(replace(problem, softcap=0.0).solved_by(ADAPTERS[name]()), problem.solution()) > 1e-3


@every_adapter
def test_backward_of_tiles_with_the_global_lse_adds_up_to_the_gradients(kernel: PreparedKernel) -> None:
    problem = LocalProblem(12, 12, q_heads=4, kv_heads=2, causal=True)
    q, k, v, dout = problem.tensors()
    out, lse = kernel.forward(q, k, v, *problem.call)
    # Any tensor with the right row sums of dout * out stands in for the output.
    other = torch.zeros_like(out)
    other[..., 0] = (dout * out).sum(-1) / dout[..., 0]
    sums = {name: torch.zeros_like(x) for name, x in zip("qkv", (q, k, v), strict=True)}
    for rows, cols in [(0, 0), (4, 0), (8, 0), (4, 4), (8, 4), (8, 8)]:
        r, c = slice(rows, rows + 4), slice(cols, cols + 4)
        tile = AttnTile((rows, rows + 4), (cols, cols + 4), causal=rows == cols)
        parts = kernel.backward(dout[r], q[r], k[c], v[c], other[r], lse[r], tile, AttnSpec(SCALE))
        for name, where, part in zip("qkv", (r, c, c), parts, strict=True):
            sums[name][where] += part
    want = problem.solution()
    found = {f"d{name}": total for name, total in sums.items()}
    assert worst(found, {name: want[name] for name in ("dq", "dk", "dv")}) <= 1e-10


@every_adapter
def test_inputs_may_be_views_of_any_strides_with_a_dense_head_dim(kernel: PreparedKernel) -> None:
    problem = LocalProblem(8, 8, q_heads=4, kv_heads=2, causal=True)
    tensors = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in problem.tensors()]
    q, k, v, dout = tensors
    out, lse = kernel.forward(q, k, v, *problem.call)
    strided = lse.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, strided, *problem.call)
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert worst(found, problem.solution()) <= 1e-13


@every_adapter
def test_shapes(kernel: PreparedKernel) -> None:
    found = LocalProblem(rows=5, cols=9, batch=3, q_heads=6, kv_heads=2).solved_by(kernel)
    assert found["out"].shape == found["dq"].shape == (5, 3, 6, 8)
    assert found["lse"].shape == (5, 3, 6)
    assert found["dk"].shape == found["dv"].shape == (9, 3, 2, 8)


@pytest.mark.parametrize(
    "name", ["flash-attn-4 4.0.0b36", "flash-attn-3 of main", "transformer-engine 2.20.2", "cudnn"]
)
def test_the_head_dim_of_values_may_differ(name: str) -> None:
    problem = LocalProblem(q_heads=4, kv_heads=2, head_dim=16, v_head_dim=8, causal=True)
    kernel = ADAPTERS[name]()
    assert kernel.capabilities.v_head_dim
    assert worst(problem.solved_by(kernel), problem.solution()) <= 1e-13


# --- several documents in one call ---

PACKED = {
    "causal": packed((5, 1, 6), q_heads=4, kv_heads=2),
    "causal, mqa": packed((3, 9), q_heads=4, kv_heads=1),
    "full": packed((5, 1, 6), (2, 8, 1), q_heads=4, kv_heads=2),
    "full, equal": packed((4, 4), (4, 4)),
}
#: PyTorch's own take one document per call.
VARLEN = [name for name in ADAPTERS if name.startswith(("flash", "transformer-engine"))]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te, "capability", lambda device: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("problem", PACKED.values(), ids=list(PACKED))
@pytest.mark.parametrize("name", VARLEN)
def test_packed_documents(name: str, problem: LocalProblem) -> None:
    kernel = ADAPTERS[name]()
    assert kernel.capabilities.varlen
    assert worst(problem.solved_by(kernel), problem.solution()) <= 1e-13


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", VARLEN)
def test_packed_documents_with_the_global_lse_and_a_stand_in(name: str) -> None:
    kernel, problem = ADAPTERS[name](), packed((5, 1, 6))
    q, k, v, dout = problem.tensors()
    out, lse = kernel.forward(q, k, v, *problem.call)
    other = torch.zeros_like(out)
    other[..., 0] = (dout * out).sum(-1) / dout[..., 0]
    # As if each row had seen as much again elsewhere: all weights are half of what they were.
    wider = lse + torch.log(torch.tensor(2.0, dtype=lse.dtype))
    strided = wider.transpose(0, 2).contiguous().transpose(0, 2)
    dq, dk, dv = kernel.backward(dout, q, k, v, other, strided, *problem.call)
    want = problem.solution()
    assert worst({"dq": 2 * dq, "dk": 2 * dk, "dv": 2 * dv}, {name: want[name] for name in ("dq", "dk", "dv")}) <= 1e-10


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", [name for name in CAPS_LOGITS if name in VARLEN])
def test_packed_documents_with_capped_logits(name: str) -> None:
    problem = packed((5, 7), softcap=0.8)
    assert worst(problem.solved_by(ADAPTERS[name]()), problem.solution()) <= 1e-13
    assert worst(replace(problem, softcap=0.0).solved_by(ADAPTERS[name]()), problem.solution()) > 1e-3


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", VARLEN)
def test_a_document_that_ends_a_row_later_is_seen(name: str) -> None:
    right, wrong = packed((5, 7)), packed((6, 6))
    assert worst(wrong.solved_by(ADAPTERS[name]()), right.solution()) > 1e-3


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in VARLEN])
@pytest.mark.parametrize("problem", PACKED.values(), ids=list(PACKED))
def test_kernels_without_varlen_compute_one_document_at_a_time(name: str, problem: LocalProblem) -> None:
    kernel = ADAPTERS[name]()
    assert not kernel.capabilities.varlen
    assert worst(problem.solved_by(kernel), problem.solution()) <= 1e-13


@pytest.mark.parametrize(
    ("gpu", "cudnn", "together"),
    [
        ((9, 0), 90600, True),
        ((10, 0), 92400, True),
        ((9, 0), 90501, False),  # statistics padded
        ((12, 0), 92400, False),  # statistics padded
        ((8, 0), 92400, False),  # no packed documents
        (None, 92400, False),
    ],
)
def test_where_transformer_engine_has_varlen(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int] | None, cudnn: int, together: bool
) -> None:
    monkeypatch.setattr(te, "capability", lambda device: gpu)
    library = ADAPTERS["transformer-engine 2.20.2"]()._library.module
    library.tex.get_cudnn_version = lambda: cudnn
    kernel = te.TransformerEngineKernel(library, title="transformer-engine 2.20.2")
    assert kernel.capabilities.varlen == together


@pytest.mark.parametrize("capturing", [True, False])
def test_transformer_engine_receives_whether_a_graph_is_captured(
    capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[bool] = []

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def record(**arguments: Any) -> Any:
            received.append(arguments["cuda_graph"])
            return function(**arguments)

        return record

    library = ADAPTERS["transformer-engine 2.20.2"]()._library.module
    library.fused_attn_fwd, library.fused_attn_bwd = map(recorded, (library.fused_attn_fwd, library.fused_attn_bwd))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    LocalProblem().solved_by(te.TransformerEngineKernel(library, title="transformer-engine 2.20.2"))
    assert received == [capturing, capturing]


def test_statistics_of_transformer_engine_that_are_not_packed_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te, "capability", lambda device: (9, 0))
    kernel, problem = ADAPTERS["transformer-engine 2.20.2"](), PACKED["causal"]
    attend = kernel._attend._function
    padded = [torch.zeros(3, 4, 6, 1), None]
    monkeypatch.setattr(kernel._attend, "_function", lambda **given: (attend(**given)[0], padded))
    with pytest.raises(
        UnavailableError, match=r"packed documents need softmax statistics of 3 dimensions, not \(3, 4, 6, 1\)"
    ):
        problem.solved_by(kernel)
