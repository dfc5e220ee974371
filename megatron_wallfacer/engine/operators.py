"""Attention as two operators of PyTorch's dispatcher, forward and backward.

Selective activation checkpointing, torch.compile and profilers find operators by name: ``wallfacer::attention`` and
``wallfacer::attention_backward``. They take tensors and numbers, so a call goes by its number. Neither has a
derivative of its own: :mod:`megatron_wallfacer.engine.autograd` joins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

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
#: The inputs are left out where backward reads what was kept after the exchange along the head axis. Without sinks
#: dsinks is empty.
attention_backward = torch.ops.wallfacer.attention_backward.default


def run_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: int) -> Forward:
    """Run the operator :data:`attention` without the dispatcher.

    Raises:
        WallfacerError: another rank failed in this pass, or any rank in an earlier one.
    """
    known = call_of_number(call)
    PROGRESS.layer, PROGRESS.backward, PROGRESS.passes = known.layer, False, PROGRESS.passes + 1
    if known.runtime.transfers.failure:
        raise closed_error(known.runtime.transfers.failure)
    try:
        return _forward(known, q, k, v, sinks)
    except OptionError:
        raise  # before the first message, on every rank
    except BaseException as error:
        fail(known, "forward", error)
        raise


def run_attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    kept: Sequence[Tensor],
    inputs: Sequence[Tensor],
    kv_heads: int,
    head_dim: int,
    call: int,
) -> Backward:
    """Run the operator :data:`attention_backward` without the dispatcher.

    Raises:
        WallfacerError: another rank failed in this pass, or any rank in an earlier one.
    """
    known = call_of_number(call)
    PROGRESS.layer, PROGRESS.backward, PROGRESS.passes = known.layer, True, PROGRESS.passes + 1
    if known.runtime.transfers.failure:
        raise closed_error(known.runtime.transfers.failure)
    try:
        return _backward(known, dout, out, lse, sinks, kept, inputs, kv_heads, head_dim)
    except BaseException as error:
        fail(known, "backward", error)
        raise


def _forward(call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Forward:
    compiled, runtime = call.forward_pass(q, k, v, sinks=sinks is not None), call.runtime
    with _dtypes_as_given(q):
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
        # Kernels read channels side by side; the gradient of a sum has them all in one place.
        dout = dout.contiguous()
    with _dtypes_as_given(dout):
        own = dict(zip("qkv", inputs, strict=False))
        own |= {"dout": dout, "out": out, "lse": lse}
        compiled, runtime = call.backward_pass(own, kv_heads, head_dim), call.runtime
        # Tiles of own rows read the output itself. Where no other rank is sent dout, nothing needs its row sums.
        delta = row_sums(dout, out, lse.dtype) if compiled.reads_delta or sinks is not None else lse
        (dq, dk, dv), _ = call.run(compiled, (*own.values(), delta), kept, runtime.transfers, runtime.observer)
        dsinks = lse.new_empty(0) if sinks is None else sinks_gradient(lse, delta, sinks)
    dtype = out.dtype
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dsinks


def _dtypes_as_given(x: Tensor) -> AbstractContextManager[object]:
    # The dtypes are the caller's choice: autocast must not make the reference kernel's products bf16.
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _UNCHANGED


def _attention_shapes(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: int) -> Forward:
    """Results of :func:`run_attention` without values, for tracing."""
    compiled = call_of_number(call).forward_pass(q, k, v, sinks=sinks is not None)
    (out_shape, _), (lse_shape, lse_dtype) = compiled.results
    kept = [q.new_empty(nbytes, dtype=torch.uint8) for nbytes in compiled.kept]
    return q.new_empty(out_shape), q.new_empty(lse_shape, dtype=lse_dtype), kept


def _attention_backward_shapes(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    kept: Sequence[Tensor],
    inputs: Sequence[Tensor],
    kv_heads: int,
    head_dim: int,
    call: int,
) -> Backward:
    tokens, batch, q_heads, v_head_dim = out.shape
    shapes = (q_heads, head_dim), (kv_heads, head_dim), (kv_heads, v_head_dim)
    dq, dk, dv = (out.new_empty((tokens, batch, *shape)) for shape in shapes)
    return dq, dk, dv, lse.new_empty(0) if sinks is None else torch.empty_like(sinks)


for _name, _function, _shapes in (
    ("attention", run_attention, _attention_shapes),
    ("attention_backward", run_attention_backward, _attention_backward_shapes),
):
    # On any device: what differs between devices is in kernels and transfers.
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wallfacer::{_name}", _shapes, lib=_LIBRARY)
