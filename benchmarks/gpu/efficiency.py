"""Tile efficiency: a rank's tiles, with merges and copies, against one dense causal call of as many operations.

    python -m benchmarks.gpu.efficiency                     on a GPU: P 8, 4, 2 at 8K to 2K tokens per rank, then larger
    python -m benchmarks.gpu.efficiency --smoke             anywhere, in seconds; its figures mean nothing

A rank's work is N^2 / (2 P) pairs of tokens; the dense call is over sqrt(N^2 / P) tokens, rounded, and its time is
scaled by the operations that rounding added or took. ``others`` is the rank's time without kernels: merges, sums,
copies, and launches, by the same schedule with a kernel that returns at once. ``host`` is the host's time for its
launches: where it is longer than the kernels, the device waits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt

import torch

from benchmarks.gpu.clock import host_seconds, medians
from benchmarks.gpu.no_kernel import NoKernel
from benchmarks.gpu.one_rank import OneRank
from benchmarks.gpu.report import add_options, device_of, head_counts, kernel_of
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.settings import COLUMNS, HEADS, Setting, settings
from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.schemes import make_plan

SCHEMES = ("team-ring", "wallfacer", "ring")
PASSES = ("forward", "backward")
VALUES = ("grid", *PASSES, *(f"{name} {what} ms" for name in PASSES for what in ("rank", "dense", "others", "host")))
_ROUND = 128
#: What `team-ring` must reach: tokens per rank -> (forward, backward), from as many on.
WANTED = ((16384, 0.93, 0.95), (2048, 0.80, 0.80))


@dataclass(frozen=True)
class Row:
    """One rank of one scheme; times in seconds, (forward, backward).

    Attributes:
        scheme, grid: what ran.
        rank_tokens: tokens per rank.
        rank: the rank's passes.
        dense: as many operations in one dense causal call.
        others: the rank's passes without kernels.
        host: the host's time for the rank's launches.
    """

    scheme: str
    grid: str
    rank_tokens: int
    rank: tuple[float, float]
    dense: tuple[float, float]
    others: tuple[float, float] = (0.0, 0.0)
    host: tuple[float, float] = (0.0, 0.0)

    @property
    def efficiency(self) -> tuple[float, float]:
        """(forward, backward)."""
        return self.dense[0] / self.rank[0], self.dense[1] / self.rank[1]

    @property
    def verdict(self) -> str:
        """Whether `team-ring` reaches what it must; empty for other schemes, and below the fewest tokens."""
        wanted = next((both for tokens, *both in WANTED if self.rank_tokens >= tokens), None)
        if self.scheme != "team-ring" or wanted is None:
            return ""
        return "ok" if all(got >= want for got, want in zip(self.efficiency, wanted, strict=True)) else "below"

    def cells(self, *, judged: bool) -> tuple[str, ...]:
        """Cells of :data:`VALUES` and the verdict."""
        times = zip(self.rank, self.dense, self.others, self.host, strict=True)
        shares = (f"{share:.3f}" for share in self.efficiency)
        return self.grid, *shares, *(f"{1e3 * t:.3f}" for one in times for t in one), self.verdict if judged else ""


def measure(setting: Setting, scheme: str, options: argparse.Namespace) -> Row:
    """Time one rank of one scheme.

    Raises:
        OptionError: the scheme cannot be had for these heads, or no kernel serves them.
    """
    device, dtype, heads = device_of(options), getattr(torch, options.dtype), setting.heads
    plan = make_plan(
        scheme, setting.cp_size, q_heads=heads[0], kv_heads=heads[1], tokens=setting.tokens // setting.cp_size
    )
    kernel = kernel_of(options, device, dtype)
    shape = {"heads": heads, "head_dim": options.head_dim, "device": device, "dtype": dtype}
    ours, bare = (OneRank(plan, setting.tokens, kernel=one, **shape) for one in (kernel, NoKernel()))
    pairs = setting.tokens**2 // setting.cp_size
    length = max(_ROUND, round(isqrt(pairs) / _ROUND) * _ROUND)
    works = _works(ours, bare, kernel, length)
    times = medians(works, device, options.repeats)
    host = tuple(host_seconds(works[name], device, options.repeats) for name in PASSES)
    scale = pairs / (length * length)
    rank, others = (tuple(times[f"{name}{suffix}"] for name in PASSES) for suffix in ("", " others"))
    dense = tuple(times[f"dense {name}"] * scale for name in PASSES)
    return Row(scheme, str(plan.grid), ours.shard, rank, dense, others, host)


def _works(ours: OneRank, bare: OneRank, kernel: Kernel, length: int) -> dict[str, Callable[[], object]]:
    """Timed calls by name."""
    q, k, v, dout = ours.inputs()
    done, bare_done = ours.forward(q, k, v), bare.forward(q, k, v)
    long = OneRank(make_plan("ring", 1), length, ours.heads, ours.head_dim, kernel, ours.device, ours.dtype)
    big_q, big_k, big_v, big_dout = long.inputs()
    call = AttnTile((0, length), (0, length), causal=True), AttnSpec(ours.head_dim**-0.5)
    big_out, big_lse = kernel.forward(big_q, big_k, big_v, *call)
    return {
        "dense forward": partial(kernel.forward, big_q, big_k, big_v, *call),
        "forward": partial(ours.forward, q, k, v),
        "forward others": partial(bare.forward, q, k, v),
        "dense backward": partial(kernel.backward, big_dout, big_q, big_k, big_v, big_out, big_lse, *call),
        "backward": partial(ours.backward, dout, q, k, v, done),
        "backward others": partial(bare.backward, dout, q, k, v, bare_done),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; 1 if `team-ring` is below what it must reach anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--cp-size", type=int, nargs="+", help="(default: 8, 4, 2, 64, 512)")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of the whole sequence")
    parser.add_argument("--heads", type=head_counts, nargs="+", default=HEADS, metavar="Q,KV")
    options = parser.parse_args(argv)
    if options.smoke:
        options.cp_size, options.tokens, options.heads, options.head_dim = (4, 8), (2048,), ((4, 2),), 32
        options.repeats = 1
    rows = Rows("efficiency", (*COLUMNS, "scheme"), VALUES, options)

    def row(setting: Setting, scheme: str) -> Iterator[tuple[str, ...]]:
        yield measure(setting, scheme, options).cells(judged=not options.smoke)

    for setting in settings(options.cp_size, options.tokens, options.heads):
        for scheme in SCHEMES:
            rows.measure((*setting.names, scheme), partial(row, setting, scheme), setting.cost)
    return rows.close()


if __name__ == "__main__":
    sys.exit(main())
