"""The operators that the dispatcher sees: checkpointing by policy, tracing, profiles, and no host that waits."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron_wallfacer.engine import operators
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime, call_of_number
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan


class CountingKernel(TorchCpuKernel):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.calls["forward"] += 1
        return super().forward(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls["backward"] += 1
        return super().backward(*args, **kwargs)


@pytest.fixture
def kernel() -> CountingKernel:
    return CountingKernel()


@pytest.fixture
def call(kernel: CountingKernel) -> Call:
    plan = Plan(Grid())
    return Call(plan, Runtime(Transfers(connect(None, plan.grid)), kernel, 0.4))


@pytest.fixture
def qkv() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(8, 2, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]


def gradients(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(function(*tensors).square().sum(), tensors))


def test_gradients_are_those_of_finite_differences(call: Call) -> None:
    shapes = (4, 1, 2, 2), (4, 1, 1, 2), (4, 1, 1, 2), (2,)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert gradcheck(lambda q, k, v, sinks: attend(q, k, v, call, sinks=sinks), tensors)


def test_a_second_derivative_is_rejected(call: Call, qkv: list[Tensor]) -> None:
    (dq,) = torch.autograd.grad(attend(*qkv, call).square().sum(), qkv[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


# --- checkpointing by policy ---


def save_attention(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    wanted = operator is operators.attention
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(("saved", "forwards"), [(True, 1), (False, 2)])
def test_a_policy_spares_attention_the_second_forward(
    call: Call, kernel: CountingKernel, qkv: list[Tensor], saved: bool, forwards: int
) -> None:
    contexts = partial(create_selective_checkpoint_contexts, save_attention)
    options = {"context_fn": contexts} if saved else {}

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q.sin(), k, v, call).cos()

    found = gradients(lambda *x: checkpoint(block, *x, use_reentrant=False, **options), qkv)
    assert kernel.calls["forward"] == forwards
    for got, want in zip(found, gradients(block, qkv), strict=True):
        assert torch.equal(got, want)


# --- tracing ---


class Layer(torch.nn.Module):
    """As a core attention holds its call."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 2, k, v, self.call) + 1


def test_a_compiled_program_has_attention_as_one_piece(call: Call, kernel: CountingKernel, qkv: list[Tensor]) -> None:
    layer = Layer(call)
    want = gradients(layer, qkv)
    kernel.calls.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(gradients(compiled, qkv), want, strict=True):
        assert torch.equal(got, wanted)
    # Tracing computes nothing: the kernel ran for the numbers only.
    assert kernel.calls == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("sinks", [None, torch.zeros(4, dtype=torch.float64)], ids=["no sinks", "sinks"])
def test_shapes_are_known_without_running(call: Call, qkv: list[Tensor], sinks: Tensor | None) -> None:
    q, k, v = (x.detach() for x in qkv)
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(operators.attention, (q, k, v, sinks, call.number), test_utils=checks)
    out, lse, kept = operators.attention(q, k, v, sinks, call.number)
    passed = out, out, lse, sinks, kept, [q, k, v], 2, 4, call.number
    torch.library.opcheck(operators.attention_backward, passed, test_utils=checks)


# --- profiles ---


def test_a_profile_names_both_passes(call: Call, qkv: list[Tensor]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(partial(attend, call=call), qkv)
    names = {event.key for event in profile.key_averages()}
    assert {"wallfacer::attention", "wallfacer::attention_backward"} <= names


# --- the host does not wait for the device ---

#: What makes a host read a number from a device. Copies to the host are caught by the device of their result on CUDA.
SYNCHRONISING = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique2", "aten.equal"}


class HostWaits(TorchDispatchMode):
    """Operators of a program that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        if name in SYNCHRONISING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits() -> Iterator[list[str]]:
    with HostWaits() as mode:
        yield mode.found


def test_no_pass_reads_a_number_from_the_device(call: Call, qkv: list[Tensor], waits: list[str]) -> None:
    q, k, v = (x.detach() for x in qkv)
    out, lse, kept = operators.run_attention(q, k, v, None, call.number)
    operators.run_attention_backward(out, out, lse, None, kept, [q, k, v], 2, 4, call.number)
    assert waits == []


def test_a_number_read_from_the_device_would_be_seen(waits: list[str]) -> None:
    float(torch.ones(1).sum())
    assert waits == ["aten._local_scalar_dense"]


# --- calls by number ---


def test_a_call_that_nobody_holds_is_gone(call: Call) -> None:
    lost = Call(call.plan, call.runtime)
    number = lost.number
    assert call_of_number(number) is lost
    del lost
    gc.collect()
    with pytest.raises(WallfacerError, match=f"attention call {number} no longer exists"):
        call_of_number(number)
