"""The planner's choices and simulated times that docs/planning.md shows: ``python -m benchmarks.choices``.

First the choice of ``wallfacer plan`` for Llama 3 8B on 64 GPUs, with the buffers of attention. Then the simulated time
of the schemes whose attention calls and launches docs/benchmarks.md counts: h100-8x8, and h100-1024x8 for 512 ranks.
Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

from megatron_wallfacer.cli.main import main as wallfacer
from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape

CLUSTERS, LENGTHS = ("h100-8x8", "h200-8x8"), ("64K", "128K", "1M")
HEADS = {"q_heads": 32, "kv_heads": 8}
#: P, tokens per rank, and arguments of ``make_plan``.
SCHEMES = (
    (512, 2048, {"scheme": "team-ring", "team_size": 16}),
    (512, 2048, {"scheme": "ring"}),
    (512, 2048, {"scheme": "team-ring", "team_size": 16, "kv_team_size": 16}),
    (512, 2048, {"scheme": "auto"}),
    (2, 4096, {"scheme": "ring"}),
    (4, 4096, {"scheme": "ring"}),
    (4, 4096, {"scheme": "auto"}),
    (8, 4096, {"scheme": "team-ring"}),
    (8, 4096, {"scheme": "ulysses"}),
    (8, 4096, {"scheme": "auto"}),
)


def planned() -> Iterator[str]:
    """Yield one row for each cluster and length: the first choice of ``wallfacer plan``."""
    yield "| cluster | tokens | choice | ms of one layer, both passes | attention buffers |"
    yield "| --- | --- | --- | --- | --- |"
    for cluster in CLUSTERS:
        for length in LENGTHS:
            printed = StringIO()
            with redirect_stdout(printed):
                wallfacer(f"plan --cluster {cluster} --model llama3-8b --seq {length} --tp 1 --json".split())
            best = json.loads(printed.getvalue())["best"][0]
            seconds, buffers = best["seconds"], best["buffers_gb"]
            yield f"| {cluster} | {length} | {best['grid']} | {1e3 * seconds:.2f} | {buffers:.2f} GB |"


def simulated() -> Iterator[str]:
    """Yield one row for each of :data:`SCHEMES`: attention calls, simulated time and buffers."""
    yield "| P | tokens per rank | scheme, grid | attention calls | ms of one layer, both passes | attention buffers |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for cp_size, tokens, arguments in SCHEMES:
        cluster = load_cluster("h100-8x8" if cp_size <= 64 else "h100-1024x8")
        cluster = replace(cluster, nodes=max(1, cp_size // cluster.gpus_per_node))
        plan = make_plan(cp_size=cp_size, tokens=tokens, **HEADS, **arguments)
        choice = Choice(AttentionJob(cluster, Shape(tokens, **HEADS, head_dim=128), cp_size), plan)
        calls = " / ".join(str(sum(len(op.tiles) for op in one.attends)) for one in choice.schedules(0))
        name = f"{arguments['scheme']}, {plan.grid}"
        figures = f"{1e3 * choice.simulation.seconds:.2f} | {choice.buffer_bytes / 1e9:.2f} GB"
        yield f"| {cp_size} | {tokens:,} | {name} | {calls} | {figures} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("planned", "simulated"), help="one table")
    options = parser.parse_args(argv)
    for name, table in (("planned", planned), ("simulated", simulated)):
        if options.only in (None, name):
            for line in table():
                print(line, flush=True)
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
