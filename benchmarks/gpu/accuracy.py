"""Every kernel that can be had here against fp64, tile by tile, beside the same library's plain call.

    python -m benchmarks.gpu.accuracy            bf16 and fp16, every kind of tile
    python -m benchmarks.gpu.accuracy --smoke    small

A tile's backward gets what it gets in a ring: the log-sum-exp of rows over *more* keys than the tile's, and a proxy
for the output. Plain is the same kernel's forward and backward of the same rows and columns, as a model without context
parallelism calls it: with its own log-sum-exp and output. A tile may be wrong by at most twice of that; errors are root
mean squares over those of what is right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product

import torch
from torch import Tensor

from benchmarks.gpu.report import add_options, device_of, relative_error, serving
from benchmarks.gpu.rows import Rows
from megatron_wallfacer.engine.merge import out_proxy
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels import KERNELS, select_kernel
from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.schedule.attn_tile import AttnTile, CuSeqlens, TileWindow

ALLOWED = 2.0
HEADS = ((8, 2), (8, 8), (8, 1))
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Kind:
    """A kind of tile: rows and columns in chunks, its window from the top-left corner in chunks.

    ``documents``: their rows and their columns in chunks, where it is several of them in one call.
    """

    name: str
    rows: int
    cols: int
    causal: bool = False
    window: tuple[float | None, float | None] | None = None
    documents: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def tile(self, chunk: int) -> AttnTile:
        """Return the tile for so many tokens per chunk."""
        tile = AttnTile((0, self.rows * chunk), (0, self.cols * chunk), self.causal)
        if self.documents is not None:
            sides = (tuple(int(end * chunk) for end in accumulate(side, initial=0)) for side in self.documents)
            return tile._replace(cu_seqlens=CuSeqlens(*sides))
        if self.window is None:
            return tile
        return tile._replace(window=TileWindow(*(None if side is None else int(side * chunk) for side in self.window)))


#: Documents of a chunk.
_PIECES = (0.125, 0.5, 0.25, 0.125)
KINDS = (
    Kind("causal", 1, 1, causal=True),
    Kind("full", 1, 1),
    Kind("wide", 1, 4),
    Kind("tall", 4, 1),
    Kind("window", 2, 2, window=(0.5, 0)),
    Kind("wide window", 1, 2, window=(0, 1)),
    Kind("tall window", 2, 1, window=(1.5, 0)),
    Kind("packed causal", 1, 1, causal=True, documents=(_PIECES, _PIECES)),
    Kind("packed full", 1, 1, documents=(_PIECES, _PIECES[::-1])),
)


def errors(
    kernel: Kernel, kind: Kind, heads: tuple[int, int], options: argparse.Namespace, *, in_ring: bool
) -> dict[str, float]:
    """Of one tile; plain, or with what it gets in a ring.

    Raises:
        OptionError: the kernel does not serve it.
    """
    device, dtype = device_of(options), getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    rows, cols = kind.rows * options.chunk, kind.cols * options.chunk
    shapes = [
        (n, 1, h, options.head_dim) for n, h in zip((rows, cols, cols, rows), (*heads, heads[1], heads[0]), strict=True)
    ]
    q, k, v, dout = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    call = kind.tile(options.chunk), AttnSpec(options.head_dim**-0.5)
    wanted = _passes(ReferenceKernel(), call, in_ring, *(x.double() for x in (q, k, v, dout)))
    found = _passes(kernel, call, in_ring, q, k, v, dout)
    pairs = zip(NAMES, found, wanted, strict=True)
    return {name: relative_error(got, want).item() for name, got, want in pairs}


def _passes(
    kernel: Kernel, call: tuple[AttnTile, AttnSpec], in_ring: bool, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv."""
    out, lse = kernel.forward(q, k, v, *call)
    rows_lse, proxy = lse, out
    if in_ring:
        # As if each row had seen as much again elsewhere.
        rows_lse = lse + 0.7
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        proxy = torch.empty_like(dout)
        out_proxy(dout, delta, proxy)
    return out, lse, *kernel.backward(dout, q, k, v, proxy, rows_lse, *call)


def measure(name: str, kind: Kind, heads: tuple[int, int], options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Errors of one kernel on one kind of tile, and a verdict.

    Raises:
        OptionError: the kernel is not installed, or does not serve such a tile.
    """
    dtype = getattr(torch, options.dtype)
    kernel = select_kernel(name, device=device_of(options), dtype=dtype, head_dim=options.head_dim)
    if kind.documents is not None and not kernel.capabilities.varlen:
        raise OptionError("kernel", name, "one that takes several documents in one call")
    plain, ring = (errors(kernel, kind, heads, options, in_ring=in_ring) for in_ring in (False, True))
    # Written so that a nan is wrong.
    right = all(ring[tensor] <= ALLOWED * plain[tensor] for tensor in NAMES)
    yield *(f"{ring[tensor]:.1e}" for tensor in NAMES), "ok" if right else "wrong"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; 1 if a tile is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=KERNELS,
        default=[name for name in KERNELS if name not in ("auto", "flash", "reference")],
    )
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a chunk")
    options = parser.parse_args(argv)
    if options.smoke:
        options.chunk, options.head_dim = 64, 32
    rows = Rows(f"accuracy-{options.dtype}", ("kernel", "dtype", "heads", "tile"), NAMES, options)
    kernels = serving(options.kernels, options, lambda name, why: rows.add((name, options.dtype, "-", "all"), why))
    for heads, name in product(HEADS, kernels):
        for kind in KINDS:
            setting = name, options.dtype, f"{heads[0]},{heads[1]}", kind.name
            rows.measure(setting, partial(measure, name, kind, heads, options))
    return rows.close()


if __name__ == "__main__":
    sys.exit(main())
