"""Speed of single tiles: each kernel by tile size and mask, and the host's time for one call of its library.

    python -m benchmarks.gpu.tiles            on a GPU: every kernel that is installed, tiles of 512 to 16K tokens
    python -m benchmarks.gpu.tiles --smoke    anywhere, in seconds; its figures mean nothing

TFLOP/s count 4 (forward) and 10 (backward) operations per unmasked query-key pair, query head and channel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import torch

from benchmarks.gpu.clock import host_seconds, medians
from benchmarks.gpu.report import add_options, device_of, head_counts, serving
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.settings import HEADS
from megatron_wallfacer.kernels import KERNELS, select_kernel
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.planning.costs import BACKWARD_FLOPS, FORWARD_FLOPS
from megatron_wallfacer.schedule.attn_tile import AttnTile

#: (mask, query rows, key columns), the sizes that 2K to 8K tokens per rank give first.
TILES = (
    *((mask, size, size) for size in (4096, 2048, 1024, 8192) for mask in ("full", "causal")),
    *(("full", rows, cols) for rows, cols in ((2048, 8192), (8192, 2048), (2048, 4096), (4096, 2048))),
    *((mask, size, size) for size in (512, 16384) for mask in ("full", "causal")),
)
VALUES = tuple(f"{name} {unit}" for name in ("forward", "backward") for unit in ("ms", "TFLOP/s", "host us"))
Tile = tuple[str, int, int]


def measure(name: str, heads: tuple[int, int], tile: Tile, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Times of both passes of one tile.

    Raises:
        OptionError: the kernel is not installed, or does not serve these tensors.
    """
    device, dtype = device_of(options), getattr(torch, options.dtype)
    kernel = select_kernel(name, device=device, dtype=dtype, head_dim=options.head_dim)
    mask, rows, cols = tile
    lengths = zip((rows, cols, cols, rows), (*heads, heads[1], heads[0]), strict=True)
    q, k, v, dout = (torch.randn(n, 1, h, options.head_dim, device=device, dtype=dtype) for n, h in lengths)
    call = AttnTile((0, rows), (0, cols), causal=mask == "causal"), AttnSpec(options.head_dim**-0.5)
    out, lse = kernel.forward(q, k, v, *call)
    works = {
        "forward": partial(kernel.forward, q, k, v, *call),
        "backward": partial(kernel.backward, dout, q, k, v, out, lse, *call),
    }
    times = medians(works, device, options.repeats)
    pairs = rows * cols / (2 if mask == "causal" else 1) * heads[0] * options.head_dim
    cells = []
    for (direction, work), flops in zip(works.items(), (FORWARD_FLOPS, BACKWARD_FLOPS), strict=True):
        host = host_seconds(work, device, options.repeats)
        took = times[direction]
        cells += f"{1e3 * took:.3f}", f"{flops * pairs / took / 1e12:.0f}", f"{1e6 * host:.0f}"
    yield *cells, ""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save one row per kernel, heads and tile."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    kernels = [name for name in KERNELS if name not in ("auto", "flash", "reference")]
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=kernels)
    parser.add_argument("--heads", type=head_counts, nargs="+", default=HEADS, metavar="Q,KV")
    options = parser.parse_args(argv)
    tiles = TILES
    if options.smoke:
        options.head_dim, options.heads, options.repeats = 32, ((4, 2),), 1
        tiles = (("full", 64, 128), ("causal", 64, 64))
    rows = Rows("tiles", ("kernel", "heads", "mask", "rows", "columns"), VALUES, options)
    kernels = serving(options.kernels, options, lambda name, why: rows.add((name, "-", "all", "-", "-"), why))
    for heads, name, tile in product(options.heads, kernels, tiles):
        setting = name, f"{heads[0]},{heads[1]}", *tile
        rows.measure(setting, partial(measure, name, heads, tile, options), tile[1] * tile[2] * heads[0])
    return rows.close()


if __name__ == "__main__":
    sys.exit(main())
