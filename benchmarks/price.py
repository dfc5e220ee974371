"""Simulate the grids that ``auto`` chooses by price: ``python -m benchmarks.price``.

Each choice is simulated on as many nodes as it needs, next to the grid with the least volume (the choice without a
number of tokens) and the fastest team x kv_team x ring grid. Nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.schedule.grid import divisors
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape

CP_SIZES = (4, 8, 16, 32, 64)
TOKENS = (1024, 4096, 16384, 65536)
HEADS = ((32, 8), (32, 32), (8, 1))
#: Larger teams and longer rings are never the fastest at these sizes, and take long to simulate.
_LARGEST_TEAM = 32


@dataclass(frozen=True)
class PricedJob:
    """Simulated choices for one job.

    Attributes:
        cp_size: context-parallel size P.
        tokens: tokens per rank.
        heads: query and kv heads per rank.
        auto: choice by price.
        least_volume: grid of the least communication volume.
        fastest: fastest of all simulated grids.
    """

    cp_size: int
    tokens: int
    heads: tuple[int, int]
    auto: Choice
    least_volume: Choice
    fastest: Choice

    @property
    def loss(self) -> float:
        """Time of the choice by price over that of the fastest grid."""
        return self.auto.simulation.seconds / self.fastest.simulation.seconds

    @property
    def loss_by_volume(self) -> float:
        """Time of the grid with the least volume over that of the fastest grid."""
        return self.least_volume.simulation.seconds / self.fastest.simulation.seconds

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        choices = (f"{c.plan.grid}: {figures(c)}" for c in (self.least_volume, self.auto, self.fastest))
        return str(self.cp_size), f"{self.tokens:,}", f"{self.heads[0]}, {self.heads[1]}", *choices


def figures(choice: Choice) -> str:
    """Return the simulated milliseconds of a layer and the gigabytes of attention buffers."""
    return f"{1e3 * choice.simulation.seconds:.2f} ms, {choice.buffer_bytes / 1e9:.2f} GB"


def priced_jobs(
    cp_sizes: Sequence[int], tokens: Sequence[int], heads: Sequence[tuple[int, int]]
) -> Iterator[PricedJob]:
    """Simulate every job of these sizes."""
    for cp_size in cp_sizes:
        for each in tokens:
            for q_heads, kv_heads in heads:
                yield priced_job(cp_size, each, q_heads, kv_heads)


def priced_job(cp_size: int, tokens: int, q_heads: int, kv_heads: int) -> PricedJob:
    """Simulate one job on h100-8x8, or above 64 ranks on h100-1024x8."""
    name = "h100-8x8" if cp_size <= 64 else "h100-1024x8"
    cluster = replace(load_cluster(name), nodes=max(1, cp_size // 8))
    job = AttentionJob(cluster, Shape(tokens, q_heads, kv_heads, 128), cp_size)
    options = {"q_heads": q_heads, "kv_heads": kv_heads, "tokens": tokens}
    grids = {}
    for team in divisors(cp_size):
        for kv_team in divisors(cp_size // team):
            if max(team, kv_team, cp_size // (team * kv_team) // 2) <= _LARGEST_TEAM:
                plan = make_plan("team-ring", cp_size, team_size=team, kv_team_size=kv_team, **options)
                grids[plan.grid] = Choice(job, plan)
    auto, least = (make_plan(scheme, cp_size, **options).grid for scheme in ("auto", "team-ring"))
    fastest = min(grids.values(), key=lambda choice: choice.simulation.seconds)
    return PricedJob(cp_size, tokens, (q_heads, kv_heads), grids[auto], grids[least], fastest)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one row per job and a summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.price", description=__doc__.partition("\n")[0])
    parser.add_argument("--cp-size", type=int, nargs="+", default=CP_SIZES, help="(default: 4 8 16 32 64)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens per rank")
    options = parser.parse_args(argv)
    print("| P | tokens per rank | heads | least volume | `auto` | fastest |\n| --- | --- | --- | --- | --- | --- |")
    jobs = []
    for job in priced_jobs(options.cp_size, options.tokens, HEADS):
        jobs.append(job)
        print(f"| {' | '.join(job.cells())} |", flush=True)
    by_price, by_volume = [job.loss for job in jobs], [job.loss_by_volume for job in jobs]
    print(
        f"\n{len(jobs)} jobs. Time over the fastest: `auto` {mean(by_price):.3f} (at most {max(by_price):.2f}), "
        f"least volume {mean(by_volume):.3f} (at most {max(by_volume):.2f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
