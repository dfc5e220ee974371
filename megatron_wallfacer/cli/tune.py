"""``wallfacer tune``: measure a job's links and kernels, time the planner's best few there, and keep the winner.

torchrun --nproc-per-node 8 --no-python wallfacer tune --model llama3-8b --seq 128K --save best.yaml
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_wallfacer.cli.outputs import check_output
from megatron_wallfacer.errors import WallfacerError

if TYPE_CHECKING:
    import torch

    from megatron_wallfacer.planning.choice import AttentionJob, Choice
    from megatron_wallfacer.planning.cluster import Cluster

_DTYPES = ("bfloat16", "float16", "float32")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``tune``."""
    parser = commands.add_parser("tune", help="under torchrun: time the planner's best grids on the job's own ranks")
    parser.add_argument("--model", default="llama3-8b", help="a transformer by name (default: llama3-8b)")
    parser.add_argument("--seq", default="128K", metavar="TOKENS", help="length, such as 128K or 1M (default: 128K)")
    parser.add_argument("--full-mask", action="store_true", help="all pairs are live, instead of a causal half")
    parser.add_argument("--heads-of", type=int, default=1, metavar="TP", help="heads of one of so many tensor ranks")
    parser.add_argument("--dtype", choices=_DTYPES, help="of q, k, v (default: bfloat16 on GPUs, float32 on CPUs)")
    parser.add_argument("--kernel", default="auto", help="as --wallfacer-kernel (default: auto)")
    parser.add_argument("--top", type=int, default=4, metavar="N", help="grids that are timed (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="times of each (default: 5)")
    parser.add_argument("--cluster-out", type=Path, metavar="FILE", help="write what was measured as a cluster file")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the winner's flags as a preset")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_tune)


def run_tune(arguments: argparse.Namespace) -> int:
    """Measure, search, time, print. Collective over the job's ranks.

    Raises:
        WallfacerError: not under torchrun, what was asked for does not fit, or a file cannot be written.
    """
    if "RANK" not in os.environ:
        raise WallfacerError(
            "tune: must run under torchrun: torchrun --nproc-per-node N --no-python wallfacer tune ..."
        )
    from megatron_wallfacer.tuning.job import job_device

    if os.environ["RANK"] == "0":
        check_output("--cluster-out", arguments.cluster_out)
        check_output("--save", arguments.save)
    with job_device() as device:
        _tune(arguments, device)
    return 0


def _tune(arguments: argparse.Namespace, device: torch.device) -> None:
    import torch
    import torch.distributed as dist

    from megatron_wallfacer.planning.choice import AttentionJob
    from megatron_wallfacer.planning.model import model_named, token_count
    from megatron_wallfacer.planning.search import search
    from megatron_wallfacer.tuning.contest import time_choices
    from megatron_wallfacer.tuning.job import progress

    ranks, first = dist.get_world_size(), dist.get_rank() == 0
    tokens = token_count(arguments.seq)
    if tokens % (2 * ranks):
        raise WallfacerError(f"--seq {arguments.seq}: must be a multiple of 2 x {ranks} ranks")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    shape = replace(model_named(arguments.model).shape(tokens // ranks, tp=arguments.heads_of), itemsize=dtype.itemsize)
    cluster = _measured(shape, dtype, device, arguments.kernel)
    job = AttentionJob(cluster, shape, ranks, not arguments.full_mask)
    chosen = _to_be_timed(job, search(job).best, arguments.top)
    with progress(len(chosen) * (arguments.repeats + 1), shown=first) as done:
        options = {"kernel": arguments.kernel, "repeats": arguments.repeats, "done": done}
        times = time_choices(chosen, dtype, device, **options)
    if first:
        _report(arguments, cluster, chosen, times)


def _measured(shape: Any, dtype: torch.dtype, device: torch.device, kernel: str) -> Cluster:
    """The job's own cluster, the same on every rank."""
    from megatron_wallfacer.kernels import select_kernel
    from megatron_wallfacer.planning.cluster import Cluster, LinkSpeed
    from megatron_wallfacer.tuning.device_rates import measure_device
    from megatron_wallfacer.tuning.host_memory import host_memory
    from megatron_wallfacer.tuning.links import cards_of_node, link
    from megatron_wallfacer.tuning.nodes import hosts_of_job, nodes_of

    nodes, each = nodes_of(hosts_of_job())
    pairs = [(rank, rank + 1) for rank in range(0, each - 1, 2)]
    inside = link(pairs, device) if pairs else (float("inf"), 0.0)
    between = cards_of_node(nodes, each, device)
    chosen = select_kernel(kernel, device=device, dtype=dtype, head_dim=shape.head_dim)
    measured = measure_device(chosen, shape, dtype, device)
    host_link, host_memory_gb = host_memory(device)

    def as_link(rate: float, latency_us: float) -> LinkSpeed:
        return LinkSpeed(None if rate == float("inf") else rate, latency_us)

    return Cluster(
        "this job",
        nodes,
        each,
        as_link(*inside),
        as_link(*between[:2]),
        measured,
        nics=between[2],
        transport="nccl" if device.type == "cuda" else "gloo",
        host_link=host_link,
        host_memory_gb=host_memory_gb,
    )


def _to_be_timed(job: AttentionJob, best: tuple[Choice, ...], top: int) -> list[Choice]:
    """The best few, and the ring and double ring beside them, as what users would have otherwise."""
    from megatron_wallfacer.planning.search import named_choices

    return [*best[:top], *(one for one in named_choices(job, ("ring", "double-ring")) if one.can_be_simulated)]


def _report(arguments: argparse.Namespace, cluster: Cluster, choices: list[Choice], times: list[float]) -> None:
    from megatron_wallfacer.planning.configuration_flags import grid_flags, save_flags

    timed = sorted(zip(choices, times, strict=True), key=lambda pair: pair[1])
    if arguments.json:
        print(_shown_as_json(cluster, timed))
    else:
        _show(cluster, timed)
    if arguments.cluster_out:
        arguments.cluster_out.write_text(_as_yaml(cluster))
    if arguments.save:
        save_flags(arguments.save, grid_flags(timed[0][0]), "wallfacer tune")


def _show(cluster: Cluster, timed: list[tuple[Choice, float]]) -> None:
    from megatron_wallfacer.cli.table import figure, show_table
    from megatron_wallfacer.tuning.host_memory import NO_DEVICE

    print(cluster)
    measured = f"host_link: {figure(cluster.host_link)} GB/s per device and direction, all devices at once"
    print(measured if cluster.offers_host_memory else NO_DEVICE)
    rows = []
    for choice, seconds in timed:
        grid, predicted = choice.plan.grid, figure(1e3 * choice.simulation.seconds)
        rows.append((choice.name or "-", str(grid), predicted, figure(1e3 * seconds), ", ".join(grid.placement)))
    show_table(("scheme", "grid", ">predicted ms", ">measured ms", "nearest first"), rows)


def _shown_as_json(cluster: Cluster, timed: list[tuple[Choice, float]]) -> str:
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
    return json.dumps({"cluster": _as_mapping(cluster), "grids": grids}, indent=2)


def _as_yaml(cluster: Cluster) -> str:
    import yaml

    return yaml.safe_dump(_as_mapping(cluster), sort_keys=False)


def _as_mapping(cluster: Cluster) -> dict[str, Any]:
    """What a cluster file says."""
    found = {name: value for name, value in asdict(cluster).items() if name not in ("name", "levels")}
    found["device"] = {name: value for name, value in found["device"].items() if value != float("inf")}
    return {name: value for name, value in found.items() if value is not None}
