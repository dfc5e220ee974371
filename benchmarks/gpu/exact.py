"""Several ranks on one GPU: every scheme against dense attention in fp64, then how long the teardown takes.

    torchrun --nproc-per-node 4 -m benchmarks.gpu.exact                   4 ranks, one card, NCCL (2.30 or newer)
    torchrun --nproc-per-node 8 -m benchmarks.gpu.exact --backend gloo    messages through host memory
    torchrun --nproc-per-node 4 -m benchmarks.gpu.exact --smoke           anywhere, small

An error may be twice that of one dense call of the same kernel. Errors are root mean squares over those of the right
values, of the worst rank: the largest entry is a draw of the rounding, and another one with every order of sums.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.ranks import Ranks, join_ranks, leave
from benchmarks.gpu.report import add_options, device_of, relative_error
from benchmarks.gpu.rows import Rows
from megatron_wallfacer.attention import attention
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan

ALLOWED = 2.0
HEADS = (8, 2)
NAMES = ("out", "dq", "dk", "dv")
#: Seconds in which all process groups must be gone.
TEARDOWN_S = 10.0
#: The default first, then the ring and the schemes with other axes.
ORDER = (
    "team-ring",
    "wallfacer",
    "ring",
    *(name for name in SCHEMES if name not in ("team-ring", "wallfacer", "ring")),
)


def shard(whole: Tensor) -> Tensor:
    """This rank's chunks, bshd."""
    size = dist.get_world_size()
    chunks = whole.chunk(2 * size, dim=1)
    return torch.cat([chunks[chunk] for chunk in shard_chunks(dist.get_rank(), size)], dim=1)


def passes(
    tensors: Sequence[Tensor], plan: Plan, group: dist.ProcessGroup, kernel: str, transfers: str
) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of some rows, bshd."""
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    out = attention(q, k, v, plan=plan, group=group, kernel=kernel, transfers=transfers)
    out.backward(tensors[3])
    return out.detach(), q.grad, k.grad, v.grad


class Problem:
    """Random tensors over the whole sequence, this rank's share of the right answer, and the allowed errors.

    Args:
        options: tokens, head_dim, dtype, device and kernel.
        ranks: ranks that share the sequence.
    """

    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        self._options, self._ranks = options, ranks
        device = device_of(options)
        generator = torch.Generator().manual_seed(0)
        heads = (HEADS[0], HEADS[1], HEADS[1], HEADS[0])
        shapes = [(1, options.tokens, h, options.head_dim) for h in heads]
        dtype = getattr(torch, options.dtype)
        self._whole = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        alone = [dist.new_group([rank]) for rank in range(ranks.size)][ranks.rank]
        dense, transfers = Plan(Grid()), ranks.transfers
        self._wanted = [
            shard(x) for x in passes([x.double() for x in self._whole], dense, alone, "reference", transfers)
        ]
        plain = self.worst([shard(x) for x in passes(self._whole, dense, alone, options.kernel, transfers)])
        self.limits = {name: ALLOWED * error for name, error in plain.items()}

    def worst(self, got: Sequence[Tensor]) -> dict[str, float]:
        """Largest error over all ranks, by tensor."""
        mine = [relative_error(one, want).item() for one, want in zip(got, self._wanted, strict=True)]
        return {name: max(errors) for name, errors in zip(NAMES, zip(*self._ranks.all(mine), strict=True), strict=True)}

    def measure(self, scheme: str) -> Iterator[tuple[str, ...]]:
        """Errors of one scheme, and a verdict.

        Raises:
            OptionError: the scheme cannot be had for so many ranks and heads.
        """
        plan = make_plan(scheme, self._ranks.size, q_heads=HEADS[0], kv_heads=HEADS[1])
        tensors, begin = [shard(x) for x in self._whole], time.monotonic()
        errors = self.worst(passes(tensors, plan, dist.group.WORLD, self._options.kernel, self._ranks.transfers))
        # Written so that a nan is wrong.
        right = all(errors[name] <= self.limits[name] for name in NAMES)
        seconds = f"{time.monotonic() - begin:.1f}"
        yield str(plan.grid), *(f"{errors[name]:.1e}" for name in NAMES), seconds, "ok" if right else "wrong"


def measure(rows: Rows, options: argparse.Namespace, ranks: Ranks) -> None:
    """One row per scheme, after one with the allowed errors."""
    made: list[Problem] = []

    def allowed() -> Iterator[tuple[str, ...]]:
        made.append(Problem(options, ranks))
        yield "dense", *(f"{made[0].limits[name]:.1e}" for name in NAMES), "-", ""

    if rows.measure(("allowed",), allowed):
        for scheme in ORDER:
            rows.measure((scheme,), partial(made[0].measure, scheme))


def tear_down(rows: Rows, ranks: Ranks) -> None:
    """Destroy every group; a row with the seconds that it took. Ranks that hang are ended."""
    ranks.all(None)

    def give_up() -> None:
        rows.add(("teardown",), f"wrong: not over after {TEARDOWN_S:g} s")
        os._exit(1)

    guard = threading.Timer(TEARDOWN_S, give_up)
    guard.daemon = True
    guard.start()
    begin = time.monotonic()
    leave(ranks)
    guard.cancel()
    guard.join()
    rows.add(("teardown",), "ok", ("-", *("-" for _ in NAMES), f"{time.monotonic() - begin:.1f}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print on rank 0, save; 1 if a scheme is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the whole sequence (default: 4096)")
    parser.add_argument("--backend", choices=("nccl", "gloo"), help="(default: nccl on a GPU, gloo on a CPU)")
    options = parser.parse_args(argv)
    if options.smoke:
        options.tokens, options.head_dim = 256, 32
    ranks = join_ranks(options)
    rows = Rows(f"exact-{ranks.size}", ("scheme",), ("grid", *NAMES, "seconds"), options, ranks=ranks)
    measure(rows, options, ranks)
    tear_down(rows, ranks)
    return rows.close()


if __name__ == "__main__":
    sys.exit(main())
