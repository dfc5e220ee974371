"""FlashAttention's inner functions, bshd, on any :class:`megatron_wallfacer.kernels.protocol.Kernel`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel
from megatron_wallfacer.schedule.attn_tile import AttnTile

_kernel: Kernel | None = None


def use_kernel(kernel: Kernel) -> None:
    """The kernel of the calls that follow."""
    global _kernel
    _kernel = kernel


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:
    """(out bshd, lse ``[batch, heads, rows]``, nothing, nothing)."""
    _require_plain(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    out, lse = _chosen().forward(*(_flip(x) for x in (q, k, v)), _tile(q, k, causal), AttnSpec(softmax_scale))
    return _flip(out), lse.permute(1, 2, 0), None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Any = None,
) -> None:
    """Gradients into dq, dk, dv."""
    _require_plain(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    kernel = _chosen()
    rows = (_flip(x) for x in (dout, q, k, v, out))
    grads = kernel.backward(*rows, softmax_lse.permute(2, 0, 1), _tile(q, k, causal), AttnSpec(softmax_scale))
    if kernel.name == "sleep":
        return  # nothing was computed, and copying it would be processor time that a GPU kernel does not take
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(_flip(grad))


def _reject(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("packed sequences are not measured")


# Imported by the peers' files for packed sequences.
_flash_attn_varlen_forward = _flash_attn_varlen_backward = _reject


def _chosen() -> Kernel:
    if _kernel is None:
        raise RuntimeError("use_kernel() comes first")
    return _kernel


def _require_plain(dropout: float, window: tuple[int, int], softcap: float | None, alibi: Tensor | None) -> None:
    if dropout or window != (-1, -1) or softcap or alibi is not None:
        raise NotImplementedError(f"plain attention only: {dropout=}, {window=}, {softcap=}, {alibi=}")


def _tile(q: Tensor, k: Tensor, causal: bool) -> AttnTile:
    return AttnTile((0, q.shape[1]), (0, k.shape[1]), causal)


def _flip(x: Tensor) -> Tensor:
    """bshd <-> sbhd."""
    return x.transpose(0, 1)
