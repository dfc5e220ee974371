"""The plugin and other projects' context parallelism in the same run: several ranks on one card.

    torchrun --nproc-per-node 4 -m benchmarks.gpu.peers            4 ranks on the card; 2K to 32K tokens per rank
    torchrun --nproc-per-node 2 -m benchmarks.gpu.peers --smoke    anywhere; TransformerEngine by a stand-in

One forward and backward. ``wall`` is the host's time from a barrier until the slowest rank is done. ``card`` is the
time of all kernels of all ranks except NCCL's, which wait; ``nccl`` is the time of those. On a CPU ``card`` is
processor time. ``error`` is the largest relative error of out, dq, dk, dv over all ranks, against dense attention in
fp64, with 256 tokens per rank.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.contenders import CONTENDERS, Attend
from benchmarks.gpu.exact import shard
from benchmarks.gpu.ranks import Ranks, join_ranks, leave
from benchmarks.gpu.report import add_options, device_of, head_counts, relative_error
from benchmarks.gpu.rows import Rows
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.schedule.attn_tile import AttnTile

#: Tokens per rank, most important first.
SHARDS = (8192, 2048, 4096, 16384, 32768)
ERROR_TOKENS = 256
#: An error of bf16 or fp16 above this is not rounding.
ALLOWED = 2e-2
VALUES = ("error", "wall ms", "card ms", "nccl ms")


class Peers:
    """Measures contenders on ranks that share a card.

    Args:
        options: heads, head_dim, dtype, device, kernel, repeats.
        ranks: ranks that share the sequence.
    """

    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        self._options, self._ranks, self._device = options, ranks, device_of(options)
        self._made: dict[str, Attend] = {}
        self._errors: dict[str, float] = {}

    @property
    def on_cpu(self) -> bool:
        """Whether there is no GPU here."""
        return self._device.type != "cuda"

    def measure(self, name: str, tokens: int) -> Iterator[tuple[str, ...]]:
        """Error, wall time and card time of one contender with so many tokens per rank.

        Raises:
            LeftOut: it cannot run here.
            OptionError: its scheme or kernel cannot be had.
        """
        if name not in self._made:
            self._made[name] = CONTENDERS[name](self._options, self._ranks)
            self._errors[name] = self._error(self._made[name])
        q, k, v, dout = self._random(tokens, seed=self._ranks.rank)
        step = partial(_step, self._made[name], q, k, v, dout)
        step()
        walls = [self._wall(step) for _ in range(self._options.repeats)]
        kernels, waits = (sum(times) for times in zip(*self._ranks.all(self._card(step)), strict=True))
        cells = (f"{1e3 * seconds:.2f}" for seconds in (median(walls), kernels, waits))
        # Written so that a nan is wrong.
        yield f"{self._errors[name]:.1e}", *cells, "ok" if self._errors[name] <= ALLOWED else "wrong"

    def _random(self, tokens: int, seed: int) -> list[Tensor]:
        """q, k, v, dout, bshd."""
        (q_heads, kv_heads), head_dim = self._options.heads, self._options.head_dim
        generator = torch.Generator(self._device).manual_seed(seed)
        shapes = [(1, tokens, heads, head_dim) for heads in (q_heads, kv_heads, kv_heads, q_heads)]
        dtype = getattr(torch, self._options.dtype)
        return [torch.randn(shape, generator=generator, device=self._device).to(dtype) for shape in shapes]

    def _error(self, attend: Attend) -> float:
        """Largest relative error over tensors and ranks."""
        got = _step(attend, *(shard(x) for x in self._whole))
        mine = max(relative_error(one, want).item() for one, want in zip(got, self._wanted, strict=True))
        return max(self._ranks.all(mine))

    @cached_property
    def _whole(self) -> list[Tensor]:
        """q, k, v, dout of the sequence that errors are measured on."""
        return self._random(ERROR_TOKENS * self._ranks.size, seed=0)

    @cached_property
    def _wanted(self) -> list[Tensor]:
        """This rank's part of out, dq, dk, dv in fp64."""
        q, k, v, dout = (x.double().transpose(0, 1) for x in self._whole)
        kernel, tile = ReferenceKernel(), AttnTile((0, len(q)), (0, len(k)), causal=True)
        spec = AttnSpec(self._options.head_dim**-0.5)
        out, lse = kernel.forward(q, k, v, tile, spec)
        grads = kernel.backward(dout, q, k, v, out, lse, tile, spec)
        wanted = [shard(x.transpose(0, 1)) for x in (out, *grads)]
        if not self.on_cpu:
            # All scores in fp64, which several ranks of one card held.
            torch.cuda.empty_cache()
        return wanted

    def _wall(self, step: Callable[[], object]) -> float:
        """Seconds of the host until every rank is done."""
        self._settle()
        self._ranks.all(None)
        begin = time.perf_counter()
        step()
        self._settle()
        return max(self._ranks.all(time.perf_counter() - begin))

    def _card(self, step: Callable[[], object]) -> tuple[float, float]:
        """This rank's seconds on the device: (kernels that compute and copy, NCCL's kernels)."""
        if self.on_cpu:
            begin = time.process_time()
            step()
            return time.process_time() - begin, 0.0
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step()
            self._settle()
        return device_seconds(profiled.events())

    def _settle(self) -> None:
        if not self.on_cpu:
            torch.cuda.synchronize()


def device_seconds(events: Iterable[Any]) -> tuple[float, float]:
    """Seconds that a profile's events took on the device: (kernels that compute and copy, NCCL's kernels)."""
    seconds = [0.0, 0.0]
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device and not getattr(event, "is_user_annotation", False):
            seconds["nccl" in event.name.lower()] += event.time_range.elapsed_us() / 1e6
    return seconds[0], seconds[1]


def _step(attend: Attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    out.backward(dout)
    return out.detach(), *(x.grad for x in leaves)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print on rank 0, save; 1 if a contender fails or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--backend", choices=("nccl", "gloo"), help="(default: nccl on a GPU, gloo on a CPU)")
    parser.add_argument("--tokens", type=int, nargs="+", default=SHARDS, help="tokens per rank")
    parser.add_argument("--heads", type=head_counts, default=(32, 8), metavar="Q,KV")
    options = parser.parse_args(argv)
    if options.smoke:
        options.tokens, options.heads, options.head_dim, options.repeats = (256,), (4, 2), 32, 1
    ranks = join_ranks(options)
    rows = Rows(f"peers-{ranks.size}", ("P", "tokens per rank", "contender"), VALUES, options, ranks=ranks)
    peers = Peers(options, ranks)
    for tokens in options.tokens:
        for name in CONTENDERS:
            # A table must not call the stand-in TransformerEngine.
            shown = f"stand-in for {name}" if name.startswith("te ") and peers.on_cpu else name
            rows.measure((ranks.size, tokens, shown), partial(peers.measure, name, tokens), tokens**2)
    code = rows.close()
    leave(ranks)
    return code


if __name__ == "__main__":
    sys.exit(main())
