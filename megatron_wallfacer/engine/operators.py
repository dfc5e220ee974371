"""Attention as two operators of PyTorch's dispatcher, forward and backward.

Selective activation checkpointing, torch.compile and profilers find operators by name: ``wallfacer::attention`` and
``wallfacer::attention_backward``. Operators accept tensors and numbers, but no objects, so an operator takes the number
of a :class:`Call`. The autograd function in :mod:`megatron_wallfacer.engine.autograd` calls both operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.call import Call, call_of_number
from megatron_wallfacer.engine.failures import closed_error, fail
from megatron_wallfacer.engine.merge import add_sinks, row_sums, sinks_gradient
from megatron_wallfacer.engine.waits.progress import PROGRESS
from megatron_wallfacer.errors import OptionError

_LIBRARY = torch.library.Library("wallfacer", "FRAGMENT")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, int call) -> (Tensor, Tensor, Tensor[])")
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor out, Tensor lse, Tensor? sinks, Tensor[] kept, Tensor[] inputs, "
    "int kv_heads, int head_dim, int call) -> (Tensor, Tensor, Tensor, Tensor)"
)
_UNCHANGED = nullcontext()
Forward = tuple[Tensor, Tensor, list[Tensor]]
Backward = tuple[Tensor, Tensor, Tensor, Tensor]

#: (q, k, v, sinks, number of the call) -> (out, lse, bytes of each value that the schedule keeps, in its order).
attention = torch.ops.wallfacer.attention.default
#: (dout, out, lse, sinks, kept, (q, k, v) or (), kv_heads, head_dim, number of the call) -> (dq, dk, dv, dsinks).
#: (q, k, v) is omitted if forward kept exchanged values of the head axis. Without sinks dsinks is empty.
attention_backward = torch.ops.wallfacer.attention_backward.default


def _forward(call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Forward:
    compiled, runtime = call.forward_pass(q, k, v, sinks=sinks is not None), call.runtime
    with _without_autocast(q):
        (out, lse), kept = call.run(compiled, (q, k, v), (), runtime.transfers, runtime.observer)
        if sinks is not None:
            add_sinks(out, lse, sinks)
            out = out.to(q.dtype)
    return out, lse, kept


def _backward(
    call: Call,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    kept: Sequence[Tensor],
    inputs: Sequence[Tensor],
    kv_heads: int,
    head_dim: int,
) -> Backward:
    if dout.stride(-1) != 1:
        # Kernels need contiguous channels, but the gradient of a sum has stride 0.
        dout = dout.contiguous()
    with _without_autocast(dout):
        local = dict(zip("qkv", inputs, strict=False))
        local |= {"dout": dout, "out": out, "lse": lse}
        compiled, runtime = call.backward_pass(local, kv_heads, head_dim), call.runtime
        # Tiles with rows that are exchanged along the head axis or received from other ranks read ``out_proxy``, which
        # needs delta. Tiles that have only other local rows read the output itself.
        delta = row_sums(dout, out, lse.dtype) if compiled.reads_delta or sinks is not None else lse
        (dq, dk, dv), _ = call.run(compiled, (*local.values(), delta), kept, runtime.transfers, runtime.observer)
        dsinks = lse.new_empty(0) if sinks is None else sinks_gradient(lse, delta, sinks)
    dtype = out.dtype
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dsinks


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast, because autocast would compute the reference kernel's products in bf16."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _UNCHANGED


def _attention_shapes(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: int) -> Forward:
    """Return empty tensors with the shapes and dtypes of the results of :data:`run_attention`, for tracing."""
    compiled = call_of_number(call).forward_pass(q, k, v, sinks=sinks is not None)
    (out_shape, _), (lse_shape, lse_dtype) = compiled.results
    kept = [q.new_empty(nbytes, dtype=torch.uint8) for nbytes in compiled.kept]
    return q.new_empty(out_shape), q.new_empty(lse_shape, dtype=lse_dtype), kept


def _attention_backward_shapes(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, *others: Any) -> Backward:
    """Return empty tensors with the shapes and dtypes of the results of :data:`run_attention_backward`, for tracing."""
    _, _, kv_heads, head_dim, _ = others
    tokens, batch, q_heads, v_head_dim = out.shape
    shapes = (q_heads, head_dim), (kv_heads, head_dim), (kv_heads, v_head_dim)
    dq, dk, dv = (out.new_empty((tokens, batch, *shape)) for shape in shapes)
    return dq, dk, dv, lse.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _guarded(run: Callable[..., Any], *, backward: bool) -> Callable[..., Any]:
    """Wrap ``run`` as an operator. The operator takes the number of a call (:attr:`Call.number`) instead of the call.

    After an exception the operator closes the call's process groups. An OptionError in forward leaves them open.
    """

    def run_pass(*arguments: Any) -> Any:
        *others, number = arguments
        call = call_of_number(number)
        PROGRESS.layer, PROGRESS.backward, PROGRESS.passes = call.layer, backward, PROGRESS.passes + 1
        PROGRESS.in_flight = ()
        if call.runtime.transfers.failure:
            raise closed_error(call.runtime.transfers.failure)
        try:
            return run(call, *others)
        except BaseException as error:
            # An OptionError in forward is raised before the first message, on every rank.
            if backward or not isinstance(error, OptionError):
                fail(call, "backward" if backward else "forward", error)
            raise

    return run_pass


#: The operators without the dispatcher. They raise a WallfacerError if another rank failed in the same pass, or if any
#: rank failed in an earlier pass.
run_attention = _guarded(_forward, backward=False)
run_attention_backward = _guarded(_backward, backward=True)
for _name, _function, _shapes in (
    ("attention", run_attention, _attention_shapes),
    ("attention_backward", run_attention_backward, _attention_backward_shapes),
):
    # One implementation for all devices: kernels and transfers contain the differences.
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wallfacer::{_name}", _shapes, lib=_LIBRARY)
