"""Checks of the tensors of :func:`megatron_wallfacer.attention.attention`.

Each function raises :class:`megatron_wallfacer.errors.OptionError` for the first tensor that is not supported.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from megatron_wallfacer.errors import OptionError

#: Supported dtypes. Floating-point dtypes of 8 bits and fewer need scales, which :func:`attention` does not accept.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BSHD = "bshd: batch, tokens, heads, head dim"


def check_tensors(q: object, k: object, v: object) -> None:
    """Check types, dtypes, devices and shapes of q, k and v."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x)
        if x.dim() != 4:
            raise OptionError(name, tuple(x.shape), _BSHD)
        if x.dtype != q.dtype or not x.is_floating_point():
            raise OptionError(f"{name}.dtype", x.dtype, f"one floating-point dtype for all tensors; q has {q.dtype}")
        if x.dtype not in DTYPES:
            raise OptionError(f"{name}.dtype", x.dtype, f"one of {', '.join(map(str, DTYPES))}")
        if x.device != q.device:
            raise OptionError(f"{name}.device", x.device, f"the device of q, {q.device}")
        if 0 in x.shape[2:]:
            raise OptionError(name, tuple(x.shape), "a tensor with at least one head and one channel")
    if k.shape[:3] != v.shape[:3] or k.shape[:2] != q.shape[:2]:
        shapes = tuple(k.shape), tuple(v.shape)
        raise OptionError("k, v", shapes, f"tensors with the batch and tokens of q {tuple(q.shape)}")
    if q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        raise OptionError(
            "k", tuple(k.shape), f"tensors whose heads divide q's heads, with q's head dim: q is {tuple(q.shape)}"
        )


def check_sinks(sinks: object, q: Tensor) -> None:
    """Check that ``sinks`` is None, or has one logit per query head of q."""
    if sinks is None:
        return
    _check_tensor("sinks", sinks)
    if sinks.shape != q.shape[2:3]:
        raise OptionError("sinks", tuple(sinks.shape), f"one for each of the {q.shape[2]} query heads")
    if sinks.dtype not in DTYPES:
        raise OptionError("sinks.dtype", sinks.dtype, f"one of {', '.join(map(str, DTYPES))}")
    if sinks.device != q.device:
        raise OptionError("sinks.device", sinks.device, f"the device of q, {q.device}")


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise OptionError(name, f"a {type(x).__name__}", "a torch.Tensor")
    # Importing DTensor takes seconds. If its module is not imported, no tensor is a DTensor.
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(x, distributed.DTensor):
        raise OptionError(name, "a DTensor", f"the rank's own zig-zag shard, a plain tensor such as {name}.to_local()")
    if x.layout != torch.strided or x.is_nested:
        raise OptionError(name, f"of layout {x.layout}" if not x.is_nested else "a nested tensor", "a dense tensor")
