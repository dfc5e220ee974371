"""Tiles inside a CUDA graph: each kernel and kind of tile, a replay on other tensors against eager calls, bit by bit.

python -m benchmarks.gpu.graph_tiles            on a GPU: every kernel that is installed
python -m benchmarks.gpu.graph_tiles --smoke    anywhere: on a tape in place of a graph
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu.accuracy import KINDS, Kind
from benchmarks.gpu.captures import apart, captures_of
from benchmarks.gpu.report import add_options, device_of, serving
from benchmarks.gpu.rows import Rows
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels import KERNELS, select_kernel
from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel

HEADS = (8, 2)


class Tile:
    """Both passes of one tile on tensors at fixed addresses.

    Args:
        kernel: computes it.
        kind: its shape and mask.
        options: chunk, head_dim, dtype, device.
    """

    def __init__(self, kernel: Kernel, kind: Kind, options: argparse.Namespace) -> None:
        self._kernel, self._call = kernel, (kind.tile(options.chunk), AttnSpec(options.head_dim**-0.5))
        rows, cols = kind.rows * options.chunk, kind.cols * options.chunk
        lengths = zip((rows, cols, cols, rows), (HEADS[0], HEADS[1], HEADS[1], HEADS[0]), strict=True)
        like = {"device": device_of(options), "dtype": getattr(torch, options.dtype)}
        self._tensors = [torch.empty(n, 1, heads, options.head_dim, **like) for n, heads in lengths]
        self._results: tuple[Tensor, ...] = ()

    def fill(self, seed: int) -> None:
        """Give it other tensors."""
        generator = torch.Generator().manual_seed(seed)
        for x in self._tensors:
            x.copy_(torch.randn(x.shape, generator=generator))

    def run(self) -> None:
        """Forward, then backward with its own output."""
        q, k, v, dout = self._tensors
        out, lse = self._kernel.forward(q, k, v, *self._call)
        self._results = (out, lse, *self._kernel.backward(dout, q, k, v, out, lse, *self._call))

    def results(self) -> list[Tensor]:
        """out, lse, dq, dk, dv, copied."""
        return [x.clone() for x in self._results]


def measure(name: str, kind: Kind, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """How far a replay is from eager calls.

    Raises:
        OptionError: the kernel is not installed, or does not serve such a tile.
    """
    device = device_of(options)
    captures = captures_of(device)
    kernel = select_kernel(name, device=device, dtype=getattr(torch, options.dtype), head_dim=options.head_dim)
    if kind.documents is not None and not kernel.capabilities.varlen:
        raise OptionError("kernel", name, "one that takes several documents in one call")
    tile, wanted = Tile(kernel, kind, options), []
    for seed in range(2):
        tile.fill(seed)
        tile.run()
        wanted.append(tile.results())
    graph = captures.make()(tile.run)
    found = []
    for seed in range(2):
        tile.fill(seed)
        graph.replay()
        found.append(tile.results())
    graph.reset()
    difference = max(apart(*pair) for pair in zip(found, wanted, strict=True))
    yield f"{difference:.1e}", "ok" if difference == 0 else "wrong"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; 1 if a replay differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    kernels = [name for name in KERNELS if name not in ("auto", "flash", "reference")]
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=kernels)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens per chunk (default: 1024)")
    options = parser.parse_args(argv)
    if options.smoke:
        options.chunk, options.head_dim = 64, 32
    captures_of(device_of(options))
    rows = Rows("graph-tiles", ("kernel", "tile"), ("largest difference",), options)
    served = serving(options.kernels, options, lambda name, why: rows.add((name, "all"), why))
    for name, kind in product(served, KINDS):
        rows.measure((name, kind.name), partial(measure, name, kind, options))
    return rows.close()


if __name__ == "__main__":
    sys.exit(main())
