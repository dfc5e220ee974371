"""Attention as two operators of PyTorch's dispatcher, forward and backward.

Selective activation checkpointing, torch.compile and profilers know operators, by name: ``wallfacer::attention`` and
``wallfacer::attention_backward``. They take tensors and numbers, so a call goes by its number. Neither has a
derivative of its own: :mod:`megatron_wallfacer.engine.autograd` joins them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_wallfacer.engine.blocks import Sizes
from megatron_wallfacer.engine.call import Call, call_of_number
from megatron_wallfacer.engine.merge import add_sinks, row_sums, sinks_gradient
from megatron_wallfacer.engine.run import run

_LIBRARY = torch.library.Library("wallfacer", "FRAGMENT")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, int call) -> (Tensor, Tensor, Tensor[])")
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor out, Tensor lse, Tensor? sinks, Tensor[] kept, Tensor[] inputs, "
    "int kv_heads, int head_dim, int call) -> (Tensor, Tensor, Tensor, Tensor)"
)
Forward = tuple[Tensor, Tensor, list[Tensor]]
Backward = tuple[Tensor, Tensor, Tensor, Tensor]

#: (q, k, v, sinks, number of the call) -> (out, lse, packets of what the schedule keeps, in its order).
attention = torch.ops.wallfacer.attention.default
#: (dout, out, lse, sinks, kept, (q, k, v) or (), kv_heads, head_dim, number of the call) -> (dq, dk, dv, dsinks).
#: The inputs are left out where backward reads what came of them along the head axis. Without sinks dsinks is empty.
attention_backward = torch.ops.wallfacer.attention_backward.default


def run_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: int) -> Forward:
    """What the operator :data:`attention` does, out of the dispatcher's sight."""
    known = call_of_number(call)
    sizes = _sizes_of_inputs(known, q, k, v)
    with _as_given(q):
        local = {"q": q, "k": k, "v": v}
        schedule = known.forward_schedule(sizes)
        # Sinks have a last say in the output: until then it keeps its precision.
        results, kept = run(schedule, known.runtime, sizes, local, {}, known.mask, rounded=sinks is None)
        if sinks is not None:
            add_sinks(results["out"], results["lse"], sinks)
    return results["out"].to(q.dtype), results["lse"], [block.packet for block in kept.values()]


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
    """What the operator :data:`attention_backward` does, out of the dispatcher's sight."""
    known = call_of_number(call)
    sizes = known.sizes(out, kv_heads, head_dim, out.shape[-1])
    schedule, names = known.backward_schedule(sizes), known.forward_schedule(sizes).keeps
    packets = dict(zip(names, kept, strict=True))
    given = {name: sizes.unpack(schedule.values[name], packets[name]) for name in schedule.given}
    if dout.stride(-1) != 1:
        # Kernels want channels side by side; the gradient of a sum has them all in one place.
        dout = dout.contiguous()
    with _as_given(dout):
        local = dict(zip("qkv", inputs, strict=False)) | {"dout": dout, "lse": lse}
        local["delta"] = row_sums(dout, out, lse.dtype)
        results, _ = run(schedule, known.runtime, sizes, local, given, known.mask, rounded=True)
        dsinks = lse.new_empty(0) if sinks is None else sinks_gradient(lse, local["delta"], sinks)
    dq, dk, dv = (results[name].to(out.dtype) for name in ("dq", "dk", "dv"))
    return dq, dk, dv, dsinks


def _as_given(x: Tensor) -> torch.autocast:
    # The dtypes are the caller's choice: autocast must not make the reference kernel's products bf16.
    return torch.autocast(x.device.type, enabled=False)


def _sizes_of_inputs(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    return call.sizes(q, k.shape[2], q.shape[3], v.shape[3])


def _attention_shapes(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: int) -> Forward:
    """What :func:`run_attention` gives, empty: for who traces a program without running it."""
    known = call_of_number(call)
    sizes = _sizes_of_inputs(known, q, k, v)
    schedule = known.forward_schedule(sizes)
    lse = q.new_empty(q.shape[:3], dtype=sizes.dtype_of("lse"))
    return (
        q.new_empty((*q.shape[:3], v.shape[3])),
        lse,
        [sizes.like(schedule.values[name]).packet for name in schedule.keeps],
    )


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
