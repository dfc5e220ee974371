"""Implement ``wallfacer tune``: measure links and kernels, time the planner's best grids, and save the fastest grid.

torchrun --nproc-per-node 8 --no-python wallfacer tune --model llama3-8b --seq 128K --save best.yaml
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.outputs import check_output
from megatron_wallfacer.cli.torchrun_job import add_measurement_arguments, check_torchrun, dtype_of
from megatron_wallfacer.errors import WallfacerError

if TYPE_CHECKING:
    import torch

    from megatron_wallfacer.planning.choice import Choice
    from megatron_wallfacer.planning.cluster import Cluster

#: Schemes that are always timed as references.
REFERENCES = ("ring", "double-ring")
NO_HOST_LINK = "host_link: not measured, CPU ranks have no link to host memory; tensors are not kept on the host"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``tune``."""
    parser = commands.add_parser("tune", help="under torchrun: time the planner's best grids on the job's own ranks")
    parser.add_argument("--model", default="llama3-8b", help="name of a transformer (default: llama3-8b)")
    parser.add_argument("--seq", default="128K", metavar="TOKENS", help="length such as 128K or 1M (default: 128K)")
    parser.add_argument("--heads-of", type=int, default=1, metavar="TP", help="tensor-parallel size (default: 1)")
    add_measurement_arguments(parser)
    parser.add_argument("--top", type=int, default=4, metavar="N", help="number of grids to time (default: 4)")
    parser.add_argument("--cluster-out", type=Path, metavar="FILE", help="cluster file to write, with the measurements")
    parser.add_argument("--save", type=Path, metavar="FILE", help="preset to write, with the flags of the fastest grid")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_tune)


def run_tune(arguments: argparse.Namespace) -> int:
    """Measure the cluster, search for grids, measure the best grids, and print the results.

    All ranks of the job must call this function.
    """
    check_torchrun("tune")
    from megatron_wallfacer.tuning.job import process_group

    if os.environ["RANK"] == "0":
        check_output("--cluster-out", arguments.cluster_out)
        check_output("--save", arguments.save)
    with process_group() as device:
        _tune(arguments, device)
    return 0


def _tune(arguments: argparse.Namespace, device: torch.device) -> None:
    import torch.distributed as dist

    from megatron_wallfacer.planning.choice import AttentionJob
    from megatron_wallfacer.planning.model import model_named, token_count
    from megatron_wallfacer.planning.search import named_choices, search
    from megatron_wallfacer.tuning.attention_times import time_choices
    from megatron_wallfacer.tuning.cluster import measure_cluster
    from megatron_wallfacer.tuning.job import progress_bar

    ranks, is_first = dist.get_world_size(), dist.get_rank() == 0
    tokens = token_count(arguments.seq)
    if tokens % (2 * ranks):
        raise WallfacerError(f"--seq {arguments.seq}: must be a multiple of 2 x {ranks} ranks")
    dtype = dtype_of(arguments, device)
    shape = replace(model_named(arguments.model).shape(tokens // ranks, tp=arguments.heads_of), itemsize=dtype.itemsize)
    cluster = measure_cluster(shape, dtype, device, arguments.kernel)
    job = AttentionJob(cluster, shape, ranks, not arguments.full_mask)
    references = (choice for choice in named_choices(job, REFERENCES) if choice.can_be_simulated)
    candidates = [*search(job).best[: arguments.top], *references]
    with progress_bar(len(candidates) * (arguments.repeats + 1), shown=is_first) as done:
        options = {"kernel": arguments.kernel, "repeats": arguments.repeats, "done": done}
        seconds = time_choices(candidates, dtype, device, **options)
    if is_first:
        _report(arguments, cluster, sorted(zip(candidates, seconds, strict=True), key=lambda pair: pair[1]))


def _report(arguments: argparse.Namespace, cluster: Cluster, timed: list[tuple[Choice, float]]) -> None:
    """Print the results with the fastest grid first, and write the files."""
    from megatron_wallfacer.planning.configuration_flags import grid_flags, save_flags

    if arguments.json:
        print(as_json(cluster, timed))
    else:
        _print(cluster, timed)
    if arguments.cluster_out:
        import yaml

        from megatron_wallfacer.tuning.cluster import cluster_entries

        arguments.cluster_out.write_text(yaml.safe_dump(cluster_entries(cluster), sort_keys=False))
    if arguments.save:
        save_flags(arguments.save, grid_flags(timed[0][0]), "wallfacer tune")


def _print(cluster: Cluster, timed: list[tuple[Choice, float]]) -> None:
    from megatron_wallfacer.cli.table import show_table
    from megatron_wallfacer.planning.report import number

    print(cluster)
    host_link = f"host_link: {number(cluster.host_link)} GB/s per device and direction, all devices at once"
    print(host_link if cluster.offers_host_memory else NO_HOST_LINK)
    rows = []
    for choice, seconds in timed:
        grid, predicted = choice.plan.grid, number(1e3 * choice.simulation.seconds)
        rows.append((choice.name or "-", str(grid), predicted, number(1e3 * seconds), ", ".join(grid.placement)))
    show_table(("scheme", "grid", ">predicted ms", ">measured ms", "placement"), rows)


def as_json(cluster: Cluster, timed: list[tuple[Choice, float]]) -> str:
    """Return the measured cluster, and the predicted and measured seconds of each grid."""
    from megatron_wallfacer.tuning.cluster import cluster_entries

    grids = [
        {
            "name": choice.name or "",
            "grid": str(choice.plan.grid),
            "placement": choice.plan.grid.placement,
            "predicted_s": choice.simulation.seconds,
            "measured_s": seconds,
        }
        for choice, seconds in timed
    ]
    return json.dumps({"cluster": cluster_entries(cluster), "grids": grids}, indent=2)
