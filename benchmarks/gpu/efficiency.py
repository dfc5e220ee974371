"""Tile efficiency: a rank's tiles, with merges and copies, against one dense causal call of as many operations.

    python -m benchmarks.gpu.efficiency                     on a GPU: P 8, 64, 512; 64K, 256K, 1M tokens
    python -m benchmarks.gpu.efficiency --smoke             anywhere, in seconds; its figures mean nothing

A rank's work is N^2 / (2 P) pairs of tokens; the dense call is over sqrt(N^2 / P) tokens, rounded, and its time is
scaled by the operations that rounding added or took. ``others`` is what takes the rank's time beside kernels: merges,
sums, copies, and launches; measured by the same schedule with a kernel that gives the same results back at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import medians
from benchmarks.gpu.one_rank import OneRank
from benchmarks.gpu.report import add_options, device_of, kernel_of, markdown, save
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.capabilities import Capabilities
from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel, accumulation_dtype
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.schemes import make_plan

SCHEMES = ("team-ring", "wallfacer", "ring")
SIZES, TOKENS = (8, 64, 512), (1 << 16, 1 << 18, 1 << 20)
HEADS = ((32, 32), (32, 8), (8, 1))
_ROUND = 128
#: What is wanted of `team-ring`: tokens of a rank -> (forward, backward), from as many on.
WANTED = ((16384, 0.93, 0.95), (2048, 0.80, 0.80))


class NoKernel:
    """Results of the right shape at once: what is left is the time of everything else."""

    name = "none"
    capabilities = Capabilities()

    def __init__(self) -> None:
        self._results: dict[tuple[object, ...], Tensor] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        lse_dtype = accumulation_dtype(q.dtype)
        return self._like("out", (*q.shape[:3], v.shape[-1]), q), self._like("lse", q.shape[:3], q, lse_dtype)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return tuple(self._like(name, x.shape, x) for name, x in (("dq", q), ("dk", k), ("dv", v)))

    def _like(self, name: str, shape: Sequence[int], x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        key = (name, *shape)
        if key not in self._results:
            self._results[key] = torch.zeros(tuple(shape), dtype=dtype or x.dtype, device=x.device)
        return self._results[key]


@dataclass(frozen=True)
class Row:
    """One rank; times in seconds.

    Attributes:
        cp_size, tokens, heads, scheme, grid: what was run.
        rank_tokens: of one rank.
        forward, backward: of the rank.
        dense_forward, dense_backward: of as many operations in one dense causal call.
        forward_others, backward_others: of the rank without its kernels.
    """

    cp_size: int
    tokens: int
    heads: str
    scheme: str
    grid: str
    rank_tokens: int
    forward: float
    backward: float
    dense_forward: float
    dense_backward: float
    forward_others: float
    backward_others: float

    @property
    def efficiency(self) -> tuple[float, float]:
        """(forward, backward)."""
        return self.dense_forward / self.forward, self.dense_backward / self.backward

    @property
    def verdict(self) -> str:
        """Whether `team-ring` does what is wanted; empty for others and for fewer tokens than anything is wanted of."""
        wanted = next((both for tokens, *both in WANTED if self.rank_tokens >= tokens), None)
        if self.scheme != "team-ring" or wanted is None:
            return ""
        return "ok" if all(got >= want for got, want in zip(self.efficiency, wanted, strict=True)) else "below"


def measure(cp_size: int, tokens: int, heads: tuple[int, int], scheme: str, options: argparse.Namespace) -> Row:
    """One rank of one scheme.

    Raises:
        OptionError: the scheme cannot be had for these heads, or no kernel serves them.
    """
    device, dtype = device_of(options), getattr(torch, options.dtype)
    plan = make_plan(scheme, cp_size, q_heads=heads[0], kv_heads=heads[1])
    kernel = kernel_of(options, device, dtype)
    shape = {"heads": heads, "head_dim": options.head_dim, "device": device, "dtype": dtype}
    ours, bare = (OneRank(plan, tokens, kernel=one, **shape) for one in (kernel, NoKernel()))
    length = max(_ROUND, round(isqrt(tokens * tokens // cp_size) / _ROUND) * _ROUND)
    works = _works(ours, bare, kernel, length)
    times = medians(works, device, options.repeats)
    scale = tokens * tokens / cp_size / (length * length)
    return Row(
        cp_size,
        tokens,
        f"{heads[0]},{heads[1]}",
        scheme,
        str(plan.grid),
        ours.shard,
        times["forward"],
        times["backward"],
        times["dense forward"] * scale,
        times["dense backward"] * scale,
        times["forward others"],
        times["backward others"],
    )


def _works(ours: OneRank, bare: OneRank, kernel: Kernel, length: int) -> dict[str, Any]:
    """By name, what is timed."""
    q, k, v, dout = ours.inputs()
    done, bare_done = ours.forward(q, k, v), bare.forward(q, k, v)
    long = OneRank(make_plan("ring", 1), length, ours.heads, ours.head_dim, kernel, ours.device, ours.dtype)
    big_q, big_k, big_v, big_dout = long.inputs()
    dense = AttnTile((0, length), (0, length), causal=True), AttnSpec(ours.head_dim**-0.5)
    big_out, big_lse = kernel.forward(big_q, big_k, big_v, *dense)
    return {
        "dense forward": partial(kernel.forward, big_q, big_k, big_v, *dense),
        "forward": partial(ours.forward, q, k, v),
        "forward others": partial(bare.forward, q, k, v),
        "dense backward": partial(kernel.backward, big_dout, big_q, big_k, big_v, big_out, big_lse, *dense),
        "backward": partial(ours.backward, dout, q, k, v, done),
        "backward others": partial(bare.backward, dout, q, k, v, bare_done),
    }


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Every setting; those that cannot be had are said and left out."""
    for cp_size, tokens, heads, scheme in product(options.cp_size, options.tokens, options.heads, SCHEMES):
        try:
            yield measure(cp_size, tokens, heads, scheme, options)
        except (OptionError, torch.OutOfMemoryError) as error:
            print(f"P {cp_size}, {tokens} tokens, heads {heads}, {scheme}: left out: {error}", file=sys.stderr)


def table(found: Sequence[Row]) -> str:
    """Markdown."""
    heading = (
        "P tokens heads scheme grid a-rank forward backward forward-ms dense others backward-ms dense others verdict"
    )
    lines = [
        (
            f"{row.cp_size}",
            f"{row.tokens >> 10}K",
            row.heads,
            row.scheme,
            row.grid,
            f"{row.rank_tokens}",
            *(f"{value:.3f}" for value in row.efficiency),
            *(f"{1e3 * value:.3f}" for value in (row.forward, row.dense_forward, row.forward_others)),
            *(f"{1e3 * value:.3f}" for value in (row.backward, row.dense_backward, row.backward_others)),
            row.verdict,
        )
        for row in found
    ]
    return markdown(heading.split(), lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; 1 if `team-ring` is below what is wanted anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--cp-size", type=int, nargs="+", default=SIZES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--heads", type=_pair, nargs="+", default=HEADS, metavar="Q,KV")
    options = parser.parse_args(argv)
    if options.smoke:
        options.cp_size, options.tokens, options.heads, options.head_dim = (4, 8), (2048,), ((4, 2),), 32
        options.repeats = 1
    found = list(rows(options))
    save(options.out, "efficiency", table(found))
    return int(not options.smoke and any(row.verdict == "below" for row in found))


def _pair(text: str) -> tuple[int, int]:
    q_heads, kv_heads = text.split(",")
    return int(q_heads), int(kv_heads)


if __name__ == "__main__":
    sys.exit(main())
