"""A kernel with prepared calls: all arguments of a library call except the tensors are built once per tile."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.byte_cache import INTEGER_BYTES, byte_cache
from megatron_wallfacer.kernels.protocol import AttnSpec, Capabilities, Gradients, Inputs, Kernel
from megatron_wallfacer.kernels.windows import strips
from megatron_wallfacer.schedule.attn_tile import AttnTile, documents_of

#: (q, k, v) -> (out, lse) of one tile.
ForwardCall = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
#: (dout, q, k, v, out, lse) -> (dq, dk, dv) of one tile.
BackwardCall = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Gradients]

#: Largest number of cached calls per direction. A ring of 512 ranks has 512 tiles per direction and mask.
_TILES = 4096
#: Largest number of bytes of cached calls with documents, per direction. 65,536 documents need 5 MiB of boundaries.
_VARLEN_LIMIT = 256 << 20
#: Bytes of one tile in a list of pieces.
_TILE_BYTES = 400


class TensorKind(NamedTuple):
    """The properties of q, k and v that a prepared call depends on: batch size, dtype and device."""

    batch: int
    dtype: torch.dtype
    device: torch.device


class PreparedKernel(ABC):
    """Base class of kernels that cache prepared calls of a library.

    :class:`megatron_wallfacer.kernels.protocol.Kernel` describes the arguments and the results of kernels.

    For each tile the cache has a function whose only arguments are tensors. A repeated tile needs one hash lookup and
    one call of the library. A tile that the library does not support is divided into several tiles. A tile with a
    window and more rows than columns is divided into strips of rows. A tile with packed documents is divided into one
    tile per document if the kernel does not have the capability ``varlen``.

    Args:
        deterministic: whether gradients must be bitwise reproducible; if None, :func:`deterministic_requested` decides.
    """

    name: str
    capabilities: Capabilities

    def __init__(self, *, deterministic: bool | None = None) -> None:
        self.deterministic = deterministic_requested() if deterministic is None else deterministic
        directions = (
            partial(self._prepare, self.prepare_forward, forward_in_pieces),
            partial(self._prepare, self.prepare_backward, backward_in_pieces),
        )
        self._forward_call, self._backward_call = map(lru_cache(_TILES), directions)
        self._varlen_forward_call, self._varlen_backward_call = map(byte_cache(_VARLEN_LIMIT, self._nbytes), directions)

    def unsupported_reason(self, inputs: Inputs) -> str | None:
        """See :meth:`Kernel.unsupported_reason`."""
        return self.capabilities.unsupported_reason(inputs)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: AttnTile, spec: AttnSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Kernel.forward`."""
        prepared = self._forward_call if tile.cu_seqlens is None else self._varlen_forward_call
        return prepared(tile, spec, q.shape[1], q.dtype, q.device)(q, k, v)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: AttnTile, spec: AttnSpec
    ) -> Gradients:
        """See :meth:`Kernel.backward`."""
        prepared = self._backward_call if tile.cu_seqlens is None else self._varlen_backward_call
        return prepared(tile, spec, q.shape[1], q.dtype, q.device)(dout, q, k, v, out, lse)

    @abstractmethod
    def prepare_forward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> ForwardCall:
        """Return the function that computes a tile forward with a single library call."""

    @abstractmethod
    def prepare_backward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> BackwardCall:
        """Return the function that computes a tile backward with a single library call."""

    def pieces(self, tile: AttnTile) -> list[AttnTile]:
        """Divide a tile if one library call cannot compute it; else return an empty list.

        Rows and columns of the parts are numbered from the first row and the first column of ``tile``.
        """
        if tile.cu_seqlens is not None:
            return [] if self.capabilities.varlen else documents_of(tile)
        return strips(tile, tile.width) if tile.window is not None and tile.height > tile.width else []

    def _prepare(
        self, prepare: Callable[..., Any], in_pieces: Callable[..., Any], tile: AttnTile, spec: AttnSpec, *kind: object
    ) -> Callable[..., Any]:
        if spec.softcap and not self.capabilities.softcap:
            raise OptionError("softcap", spec.softcap, f"0 with kernel {self.name}, which does not cap logits")
        pieces = self.pieces(tile)
        return partial(in_pieces, self, pieces, spec) if pieces else prepare(tile, spec, TensorKind(*kind))

    def _nbytes(self, tile: AttnTile, *rest: object) -> int:
        assert tile.cu_seqlens is not None
        each = 2 * INTEGER_BYTES if self.capabilities.varlen else _TILE_BYTES
        return each * len(tile.cu_seqlens.q)


#: Names of the attributes that look up prepared calls.
_LOOKUPS = ("_forward_call", "_backward_call", "_varlen_forward_call", "_varlen_backward_call")


@contextmanager
def prepared_calls(kernel: Kernel) -> Iterator[list[Callable[..., object]]]:
    """Collect the cached functions that ``kernel`` calls inside the ``with`` block, in a list.

    Cached functions own tensors on the GPU, such as ``cu_seqlens``, which a CUDA graph reads at each replay. The owner
    of the graph keeps this list, so that these tensors exist as long as the graph. If the kernel is not a
    :class:`PreparedKernel`, the list is empty.
    """
    used: list[Callable[..., object]] = []
    if not isinstance(kernel, PreparedKernel):
        yield used
        return
    lookups = {name: getattr(kernel, name) for name in _LOOKUPS}

    def collect(lookup: Callable[..., Callable[..., object]], *key: object) -> Callable[..., object]:
        used.append(lookup(*key))
        return used[-1]

    for name, lookup in lookups.items():
        setattr(kernel, name, partial(collect, lookup))
    try:
        yield used
    finally:
        for name, lookup in lookups.items():
            setattr(kernel, name, lookup)


def forward_in_pieces(
    kernel: Kernel, pieces: Sequence[AttnTile], spec: AttnSpec, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a tile, computed piece by piece; see :meth:`Kernel.forward`.

    The pieces cover the rows of the tile in order. The rows and columns of the pieces are indices into q, k and v of
    the whole tile.
    """
    parts = [
        kernel.forward(q[slice(*piece.rows)], k[slice(*piece.cols)], v[slice(*piece.cols)], piece, spec)
        for piece in pieces
    ]
    out, lse = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return out, lse


def backward_in_pieces(
    kernel: Kernel,
    pieces: Sequence[AttnTile],
    spec: AttnSpec,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> Gradients:
    """Return (dq, dk, dv) of a tile; see :meth:`Kernel.backward` and :func:`forward_in_pieces`.

    Several pieces may read the same columns, so dk and dv are summed over the pieces in the accumulation dtype.
    """
    dq, (dk, dv) = torch.empty_like(q), (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
    for piece in pieces:
        rows, cols = slice(*piece.rows), slice(*piece.cols)
        dq[rows], dk_part, dv_part = kernel.backward(
            dout[rows], q[rows], k[cols], v[cols], out[rows], lse[rows], piece, spec
        )
        dk[cols] += dk_part
        dv[cols] += dv_part
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def deterministic_requested() -> bool:
    """Return whether ``torch.use_deterministic_algorithms`` or ``NVTE_ALLOW_NONDETERMINISTIC_ALGO=0`` is set."""
    return (
        torch.are_deterministic_algorithms_enabled() or os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") == "0"
    )
