"""Several ranks on one GPU: every scheme against dense attention in fp64.

    torchrun --nproc-per-node 8 -m benchmarks.gpu.exact            8 ranks, one card, messages through host memory
    torchrun --nproc-per-node 4 -m benchmarks.gpu.exact --smoke    anywhere, small

An error may be twice that of one dense call of the same kernel. Errors are root mean squares over those of what is
right, of the worst rank: the largest entry is a draw of the rounding, and another one with every order of sums.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.report import add_options, device_of, markdown, relative_error, save
from megatron_wallfacer.attention import attention, forget_groups
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan

ALLOWED = 2.0
HEADS = (8, 2)
NAMES = ("out", "dq", "dk", "dv")


def shard(whole: Tensor) -> Tensor:
    """This rank's chunks, bshd."""
    size = dist.get_world_size()
    chunks = whole.chunk(2 * size, dim=1)
    return torch.cat([chunks[chunk] for chunk in shard_chunks(dist.get_rank(), size)], dim=1)


def passes(tensors: Sequence[Tensor], plan: Plan, group: dist.ProcessGroup, kernel: str) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of some rows, bshd."""
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    out = attention(q, k, v, plan=plan, group=group, kernel=kernel, transfers="staged")
    out.backward(tensors[3])
    return out.detach(), q.grad, k.grad, v.grad


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, float]:
    """Over all ranks, by tensor."""
    errors = [relative_error(got, want) for got, want in zip(found, wanted, strict=True)]
    worst = torch.stack(errors).cpu()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(NAMES, worst.tolist(), strict=True))


def measure(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """A line for each scheme."""
    device, size = device_of(options), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS[0], HEADS[1], HEADS[1], HEADS[0])
    shapes = [(1, options.tokens, h, options.head_dim) for h in heads]
    whole = [torch.randn(shape, generator=generator).to(device, getattr(torch, options.dtype)) for shape in shapes]
    alone = [dist.new_group([rank]) for rank in range(size)][dist.get_rank()]
    dense, single = Plan(Grid()), (alone, options.kernel)
    wanted = [shard(x) for x in passes([x.double() for x in whole], dense, alone, "reference")]
    limits = {
        name: ALLOWED * error
        for name, error in worst([shard(x) for x in passes(whole, dense, *single)], wanted).items()
    }
    rows = []
    for scheme in SCHEMES:
        try:
            plan = make_plan(scheme, size, q_heads=HEADS[0], kv_heads=HEADS[1])
        except OptionError as error:
            rows.append((scheme, "-", *("-" for _ in NAMES), f"left out: {error}"))
            continue
        errors = worst(passes([shard(x) for x in whole], plan, dist.group.WORLD, options.kernel), wanted)
        # Written so that a nan is wrong.
        good = all(errors[name] <= limits[name] for name in NAMES)
        rows.append((scheme, str(plan.grid), *(f"{errors[name]:.1e}" for name in NAMES), "ok" if good else "wrong"))
    return [("allowed", "dense", *(f"{limits[name]:.1e}" for name in NAMES), ""), *rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print on rank 0, save; 1 if a scheme is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args(argv)
    if options.smoke:
        options.tokens, options.head_dim = 256, 32
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    try:
        rows = measure(options)
        if dist.get_rank() == 0:
            save(options.out, f"exact-{dist.get_world_size()}", markdown(("scheme", "grid", *NAMES, "verdict"), rows))
    finally:
        forget_groups()
        dist.barrier()
        dist.destroy_process_group()
    return int(any(row[-1] == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
