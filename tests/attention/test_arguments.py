"""Arguments of the public function: each wrong type or value is named on every rank, before anything is sent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from megatron_wallfacer.attention import attention, forget_groups
from megatron_wallfacer.engine.connections import _made
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.passes import errors
from tests.support.dense import Problem
from tests.support.pool import Pool

ALONE = Grid()
GRID = Grid(ring_outer=2)


def tensors(batch: int = 1, tokens: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = {"q": 4, "k": 2, "v": 2}
    return {name: torch.randn(batch, tokens, n, 8, generator=generator).to(dtype) for name, n in heads.items()}


def call(plan: object = ALONE, **changed: Any) -> Tensor:
    arguments = tensors() | {"plan": plan} | changed
    return attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def rejected(plan: object = ALONE, **changed: Any) -> str:
    with pytest.raises(OptionError) as error:
        call(plan, **changed)
    return str(error.value)


#: (arguments, message)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"q": None}, "q=a NoneType: must be a torch.Tensor"),
    ({"k": np.zeros((1, 8, 2, 8))}, "k=a ndarray: must be a torch.Tensor"),
    ({"v": [1.0]}, "v=a list: must be a torch.Tensor"),
    ({"q": torch.zeros(1, 8, 4, 8).to_sparse()}, "q=of layout torch.sparse_coo: must be a dense tensor"),
    ({"q": torch.zeros(1, 8, 0, 8)}, "q=(1, 8, 0, 8): must be a tensor with at least one head and one channel"),
    ({"v": torch.zeros(1, 8, 2, 0)}, "v=(1, 8, 2, 0): must be a tensor with at least one head and one channel"),
    ({"k": torch.zeros(1, 8, 2, 8, device="meta")}, "k.device=meta: must be the device of q, cpu"),
    (
        tensors(dtype=torch.float8_e4m3fn),
        "q.dtype=torch.float8_e4m3fn: must be one of torch.float64, torch.float32, torch.bfloat16, torch.float16",
    ),
    (
        {"k": torch.zeros(1, 8, 2, 8).to(torch.float8_e5m2)},
        "k.dtype=torch.float8_e5m2: must be one floating-point dtype for all tensors; q has torch.float32",
    ),
    ({"plan": "ring"}, "plan='ring': must be a Grid, or a Plan such as make_plan('ring', 4)"),
    ({"plan": 4}, "plan=4: must be a Grid, or a Plan such as make_plan('ring', 4)"),
    ({"group": "cp"}, "group='cp': must be a process group, a DeviceMesh of one dimension, or None"),
    ({"group": dist.GroupMember.NON_GROUP_MEMBER}, "group=a group of other ranks: must be a process group"),
    ({"causal": 1}, "causal=1: must be True or False"),
    ({"causal": None}, "causal=None: must be True or False"),
    ({"window_size": 4}, "window_size=4: must be numbers of tokens (left, right), -1 for no limit"),
    ({"window_size": (4,)}, "window_size=(4,): must be numbers of tokens"),
    ({"window_size": (4.0, 0)}, "window_size=(4.0, 0): must be numbers of tokens"),
    ({"window_size": None}, "window_size=None: must be numbers of tokens"),
    ({"cu_seqlens": 8}, "cu_seqlens=8: must be a sequence of whole numbers"),
    ({"cu_seqlens": {0: 8}}, "cu_seqlens={0: 8}: must be a sequence of whole numbers"),
    ({"cu_seqlens": (0, 8.0)}, "cu_seqlens=(0, 8.0): must be a sequence of whole numbers"),
    ({"cu_seqlens": torch.tensor([[0, 8]])}, "cu_seqlens=tensor([[0, 8]]): must be a sequence of whole numbers"),
    ({"cu_seqlens": ()}, "cu_seqlens=(): must be ascending from 0 to the length of the sequence"),
    ({"cu_seqlens": (2, 8)}, "cu_seqlens=(2, 8): must be ascending from 0"),
    ({"cu_seqlens": (0, 6, 4, 8)}, "cu_seqlens=(0, 6, 4, 8): must be ascending from 0"),
    ({"cu_seqlens": (0, 4)}, "cu_seqlens=[..., 4]: must be a list that ends with 8, the number of tokens on all ranks"),
    ({"cu_seqlens": (0,)}, "cu_seqlens=[..., 0]: must be a list that ends with 8, the number of tokens on all ranks"),
    (
        {"cu_seqlens": (0, 12)},
        "cu_seqlens=[..., 12]: must be a list that ends with 8, the number of tokens on all ranks",
    ),
    ({"cu_seqlens": (0, 8), "shard_mode": "documents"}, "shard_mode=documents: must be one of sequence, per_document"),
    ({"shard_mode": "contiguous"}, "shard_mode=contiguous: must be one of sequence, per_document"),
    ({"shard_mode": None}, "shard_mode=None: must be one of sequence, per_document"),
    ({"cu_seqlens": (0, 3, 8), "shard_mode": "per_document"}, "cu_seqlens=with a document of 3 tokens: must be padded"),
    ({"sinks": [0.0] * 4}, "sinks=a list: must be a torch.Tensor"),
    ({"sinks": torch.zeros(2)}, "sinks=(2,): must be one for each of the 4 query heads"),
    ({"sinks": torch.zeros(4, dtype=torch.int64)}, "sinks.dtype=torch.int64: must be one of torch.float64"),
    ({"sinks": torch.zeros(4, device="meta")}, "sinks.device=meta: must be the device of q, cpu"),
    ({"softcap": -1.0}, "softcap=-1.0: must be a positive number, or 0 for no cap"),
    ({"softcap": float("nan")}, "softcap=nan: must be a positive number, or 0 for no cap"),
    ({"softcap": None}, "softcap=None: must be a positive number, or 0 for no cap"),
    ({"scale": "1"}, "scale='1': must be a positive number, or None for head_dim ** -0.5"),
    ({"scale": float("inf")}, "scale=inf: must be a positive number"),
    ({"scale": True}, "scale=True: must be a positive number"),
    ({"kernel": "touch"}, "kernel=touch: must be one of auto, flash, te"),
    ({"kernel": None}, "kernel=None: must be one of auto, flash, te"),
    ({"keep_gathered_q": "yes"}, "keep_gathered_q='yes': must be True or False"),
    ({"transfers": "stagged"}, "transfers=stagged: must be one of direct, staged"),
    ({"transfers": ["direct"]}, "transfers=['direct']: must be one of direct, staged"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(WRONG)])
def test_a_wrong_argument_is_named(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str) -> None:
    """Before groups are made, which is the first message of all."""
    monkeypatch.setattr("megatron_wallfacer.attention.functional.connected", None)
    assert rejected(**changed).startswith(message)


def test_a_distributed_tensor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class DTensor(Tensor):
        pass

    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", SimpleNamespace(DTensor=DTensor))
    message = "a DTensor: must be the rank's own zig-zag shard, a plain tensor such as {0}.to_local()"
    for name, x in tensors().items():
        assert rejected(**{name: x.as_subclass(DTensor)}) == f"{name}={message.format(name)}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_order": "papers"}, "kv_order=papers: must be one of native, paper, permuted"),
        ({"forward": "k"}, "forward=k: must be one of pass-kv, pass-q"),
        ({"backward": None}, "backward=None: must be one of pass-kv, pass-q"),
        ({"head_groups": 1.5}, "head_groups=1.5: must be a positive number"),
    ],
)
def test_a_wrong_field_of_a_plan_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        Plan(ALONE, **fields)
    assert str(error.value) == message


def test_a_wrong_size_of_a_grid_is_named() -> None:
    with pytest.raises(OptionError, match=r"team_size=2\.0: must be a positive number of ranks"):
        Grid(team=2.0)  # type: ignore[arg-type]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.floats(-2, 2) | st.sampled_from([float("nan"), float("inf")]),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.integers(-2, 9) | st.floats(0, 9) | st.none(), max_size=4),
    st.sampled_from([object(), Ellipsis, {1: 2}, {0, 8}, torch.zeros(2, 2), torch.tensor(3), np.arange(3), int, len]),
)
ARGUMENTS = [
    *("q", "k", "v", "plan", "group", "causal", "window_size", "cu_seqlens", "shard_mode", "sinks"),
    *("softcap", "scale", "kernel", "keep_gathered_q", "transfers"),
]


@given(st.sampled_from(ARGUMENTS), JUNK)
@example("q", torch.zeros(0, 0, 0, 0))
@settings(max_examples=300, deadline=None)
def test_no_value_ends_in_another_error(name: str, value: object) -> None:
    """A value is right, or the error is one line of the project and names it."""
    error = error_of(**{name: value})
    if error is not None:
        # A tensor that fits by itself may fit no other.
        assert error.option.split(".")[0] in (name, "k", "k, v", "tokens", "kernel"), str(error)
        assert "\n" not in str(error)


def error_of(**changed: Any) -> OptionError | None:
    """The project's error of a call, None if it has none; any other error is raised."""
    try:
        call(**changed)
    except OptionError as error:
        return error
    return None


# --- which cause comes first ---


def test_an_odd_length_hides_no_document() -> None:
    """Documents of 10, 18 and 30 tokens give each of two ranks 29; one of 10 is the cause."""
    wrong = {"cu_seqlens": (0, 10, 28, 58), "shard_mode": "per_document"}
    message = "cu_seqlens=with a document of 10 tokens: must be padded to multiples of 2P = 4"
    assert rejected_by_mask(GRID, 29, wrong) == message


def test_a_document_comes_before_the_end_of_the_sequence() -> None:
    wrong = {"cu_seqlens": (0, 10, 58), "shard_mode": "per_document"}
    assert rejected_by_mask(GRID, 28, wrong).startswith("cu_seqlens=with a document of 10 tokens")


def test_an_odd_length_without_documents_is_named() -> None:
    assert rejected_by_mask(GRID, 29, {}) == "tokens=29: must be a multiple of 2 on each rank"


def rejected_by_mask(grid: Grid, tokens: int, changed: dict[str, Any]) -> str:
    """The message on a rank of a grid, where the size of the group is right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_wallfacer.attention.checks.group_of", lambda *_: None)
        return rejected(grid, **tensors(tokens=tokens), **changed)


# --- what is accepted ---


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        [0, 4, 8],
        (0, 0, 4, 4, 4, 8, 8),
        torch.tensor([0, 4, 8], dtype=torch.int32),
        np.array([0, 4, 8]),
        range(0, 12, 4),
    ],
    ids=["list", "repeated", "tensor", "array", "range"],
)
@pytest.mark.parametrize("shard_mode", ["sequence", "per_document"])
def test_boundaries_of_any_kind_are_the_same(cu_seqlens: Any, shard_mode: str) -> None:
    assert torch.equal(
        call(cu_seqlens=cu_seqlens, shard_mode=shard_mode), call(cu_seqlens=(0, 4, 8), shard_mode=shard_mode)
    )


def test_numbers_of_numpy_are_numbers() -> None:
    assert torch.equal(call(scale=np.float32(0.5), window_size=np.array([2, 0])), call(scale=0.5, window_size=(2, 0)))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 0), (0, 8), (0, 0)])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("cu_seqlens", [None, (0, 0)], ids=["plain", "packed"])
def test_no_tokens_give_an_empty_output_with_gradients(
    batch: int, tokens: int, cu_seqlens: tuple[int, ...] | None, kernel: str
) -> None:
    """PyTorch's CPU kernel would end the process: it divides by zero."""
    if cu_seqlens is not None and tokens:
        cu_seqlens = (0, tokens)
    x = {name: tensor.requires_grad_() for name, tensor in tensors(batch, tokens).items()}
    x["v"] = torch.zeros(batch, tokens, 2, 5).requires_grad_()
    x["sinks"] = torch.full((4,), float("-inf")).requires_grad_()
    out = call(cu_seqlens=cu_seqlens, kernel=kernel, **x)
    assert out.shape == (batch, tokens, 4, 5)
    out.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in x.values())
    assert not x["sinks"].grad.any()


# --- on several ranks ---


def run_rejected(rank: int) -> tuple[list[str], int, list[np.ndarray]]:
    """On a worker: each wrong argument, one after the other; then groups that were made, then a right call."""
    x = tensors(tokens=4)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    cases: list[dict[str, Any]] = [{"group": mesh}]
    cases += [{"group": dist.new_group([other])} for other in (0, 1)][1 - rank :][:1]
    cases += [{"cu_seqlens": (0, 4)}, {"plan": Grid(team=4)}, {"plan": Grid(head=2), "k": x["k"][:, :, :1]}]
    cases += [changed for changed, _ in WRONG if not {"q", "k", "v", "cu_seqlens", "plan"} & set(changed)]
    messages = [str(error_of(**({"plan": GRID} | x | case))) for case in cases]
    made = len(_made)
    return messages, made, run_repeated(rank, Problem(2, documents=(0, 4, 8)), (0, 0, 4, 4, 8, 8), mesh["cp"])


def run_repeated(rank: int, problem: Problem, cu_seqlens: tuple[int, ...], group: object = None) -> list[np.ndarray]:
    """On a worker: out, dq, dk, dv where boundaries are repeated."""
    q, k, v, dout = (problem.shard(x, rank) for x in problem.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, plan=GRID, group=group, cu_seqlens=cu_seqlens, shard_mode=problem.shard_mode)
    out.backward(dout)
    forget_groups()
    return [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)]


def test_wrong_arguments_leave_no_trace_on_ranks(pools: Callable[[int], Pool]) -> None:
    """The same message on each rank, no group is made, and the next call is exact."""
    first, second = pools(2).run(run_rejected)
    assert first[0] == second[0]
    assert first[0][0] == "group=a mesh of 2 dimensions: must be a mesh of one dimension, such as mesh['cp']"
    assert first[0][1].startswith("group=a group of other ranks: must be ")
    assert first[0][2] == "cu_seqlens=[..., 4]: must be a list that ends with 8, the number of tokens on all ranks"
    assert first[0][3].startswith("grid=team 4: must be axes whose product is the group's size 2")
    assert "None" not in first[0]
    assert first[1] == second[1] == 0
    assert max(errors(Problem(2, documents=(0, 4, 8)), [first[2], second[2]]).values()) <= 1e-12


def test_repeated_boundaries_are_exact_where_documents_are_cut(pools: Callable[[int], Pool]) -> None:
    problem = Problem(2, chunk=3, documents=(0, 4, 12), shard_mode="per_document")
    ranks = pools(2).run(run_repeated, problem, (0, 0, 4, 4, 12))
    assert max(errors(problem, ranks).values()) <= 1e-12
