"""``wallfacer plan``: which sizes, flags and grid for this model on this cluster, and why."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.outputs import check_output
from megatron_wallfacer.cli.plan_flags import command_line, configuration_flags, save_flags
from megatron_wallfacer.cli.plan_grids import grid_rows, grids_summary, show_grids
from megatron_wallfacer.cli.plan_table import ROWS, configuration_row, memory_line, show_configurations
from megatron_wallfacer.cli.simulate import add_job_arguments, token_count
from megatron_wallfacer.errors import OptionError

if TYPE_CHECKING:
    from megatron_wallfacer.planning.cluster import Cluster
    from megatron_wallfacer.planning.configuration import Configuration, Request
    from megatron_wallfacer.planning.configurations import Offered


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``plan``."""
    parser = commands.add_parser("plan", help="find sizes, flags and grid for a model on a cluster, and say why")
    add_job_arguments(parser, tp=None)
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="in place of those of the cluster")
    parser.add_argument("--max-seq", action="store_true", help="find the longest sequence instead of planning --seq")
    parser.add_argument("--memory", type=float, metavar="GB", help="per rank, in place of the device's")
    parser.add_argument("--cuda-graphs", action="store_true", help="count what --wallfacer-cuda-graphs holds")
    parser.add_argument("--grids", action="store_true", help="print grids of attention in the best configuration too")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the best one's flags as a preset")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a layer of the best one as a Perfetto trace")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the best and the named schemes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_plan)


def run_plan(arguments: argparse.Namespace) -> int:
    """Search, print, and write what was asked for.

    Raises:
        OptionError: nothing fits.
        WallfacerError: a file cannot be written.
    """
    from megatron_wallfacer.planning.configurations import configurations

    for name in ("save", "trace", "plot"):
        check_output(f"--{name}", getattr(arguments, name))
    cluster = _cluster(arguments)
    request = _request(arguments, cluster)
    if arguments.max_seq:
        return _longest(arguments, request)
    offered = configurations(request)
    if not offered.best:
        raise _does_not_fit(request, offered.leanest, shown=not arguments.json)
    if arguments.json:
        print(_as_json(offered))
    else:
        _show(request, offered, grids=arguments.grids)
    _write(arguments, offered)
    return 0


def _cluster(arguments: argparse.Namespace) -> Cluster:
    from megatron_wallfacer.planning.load import load_cluster

    cluster = load_cluster(arguments.cluster, arguments.nodes)
    if arguments.gpus_per_node is not None:
        if not 1 <= arguments.gpus_per_node <= cluster.gpus_per_node:
            raise OptionError("gpus_per_node", arguments.gpus_per_node, f"from 1 to {cluster.gpus_per_node}")
        cluster = cluster.with_gpus_per_node(arguments.gpus_per_node)
    if arguments.memory is None:
        return cluster
    if not arguments.memory > 0:
        raise OptionError("memory", f"{arguments.memory:g}", "a positive number of GB")
    return replace(cluster, device=replace(cluster.device, memory_gb=arguments.memory))


def _request(arguments: argparse.Namespace, cluster: Cluster) -> Request:
    from megatron_wallfacer.planning.configuration import Request
    from megatron_wallfacer.planning.model import model_named

    return Request(
        model_named(arguments.model),
        cluster,
        token_count(arguments.seq),
        tp=arguments.tp,
        pp=arguments.pp,
        cp=arguments.cp,
        causal=not arguments.full_mask,
        cuda_graphs=arguments.cuda_graphs,
    )


def _longest(arguments: argparse.Namespace, request: Request) -> int:
    from megatron_wallfacer.cli.plan_longest import longest_as_json, show_longest
    from megatron_wallfacer.planning.configurations import configurations
    from megatron_wallfacer.planning.longest import longest

    found = longest(request)
    if not found:
        short = replace(request, tokens=2 * request.cluster.ranks)
        raise _no_sequence_fits(configurations(short).leanest, shown=not arguments.json)
    if arguments.json:
        print(longest_as_json(found))
    else:
        print(f"{request.cluster}; {memory_line(request.cluster)}")
        print(f"{request.model.name}, longest sequence; predicted, of a step; norms and SwiGLU fused\n")
        show_longest(found)
    if arguments.save:
        flags = configuration_flags(found[0].configuration)
        save_flags(arguments.save, flags, f"wallfacer plan --max-seq --cluster {arguments.cluster}")
    return 0


def _show(request: Request, offered: Offered, *, grids: bool) -> None:
    best = offered.best[0]
    print(f"{request.cluster}; {memory_line(request.cluster)}")
    print(f"{request.model.name}, {request.tokens:,} tokens; predicted, of a step; norms and SwiGLU fused\n")
    show_configurations(offered.best[:ROWS])
    more = len(offered.best) - ROWS
    print(
        f"\n{offered.considered} combinations in closed form, the likeliest simulated"
        + (f"; {more} more fit (--json)" if more > 0 else "")
    )
    print(f"The first: {command_line(configuration_flags(best))}")
    if grids:
        first, named = grid_rows(offered.grids, best)
        print(f"\nGrids of attention, one layer, both passes; {_groups(best)}\n")
        show_grids([*first, *named])
        print(f"\n{grids_summary(offered.grids, best.choice.job)}")


def _as_json(offered: Offered) -> str:
    best, named = grid_rows(offered.grids, offered.best[0])
    return json.dumps(
        {
            "configurations": [asdict(configuration_row(one)) for one in offered.best],
            "best": [asdict(row) for row in best],
            "named": [asdict(row) for row in named],
        },
        indent=2,
    )


def _does_not_fit(request: Request, leanest: Configuration, *, shown: bool) -> OptionError:
    """The error, after a table of what the leanest configuration holds."""
    from megatron_wallfacer.cli.memory_table import show_memory
    from megatron_wallfacer.planning.inventory import peak

    if shown:
        show_memory(leanest)
    (moment, nbytes), host_gb = peak(leanest.buffers), leanest.step.host_gb
    host = f", {host_gb:.0f} GB of host memory per node" if host_gb else ""
    return OptionError(
        "seq",
        request.tokens,
        f"shorter, or on more ranks: the leanest configuration needs {nbytes / 1e9:.0f} GB per rank of "
        f"{request.cluster.device.memory_gb:g} ({moment}){host}",
    )


def _no_sequence_fits(leanest: Configuration, *, shown: bool) -> OptionError:
    """The error where even two tokens per rank do not fit, after the same table."""
    from megatron_wallfacer.cli.memory_table import show_memory

    if shown:
        show_memory(leanest)
    cluster, needed_gb = leanest.request.cluster, leanest.step.memory_gb
    return OptionError(
        "nodes",
        cluster.nodes,
        f"more: for {leanest.request.tokens} tokens the leanest configuration needs {needed_gb:.0f} GB per rank of "
        f"{cluster.device.memory_gb:g}",
    )


def _groups(configuration: Configuration) -> str:
    sizes = asdict(configuration.spread).items()
    return ", ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one rank"


def _write(arguments: argparse.Namespace, offered: Offered) -> None:
    best = offered.best[0]
    if arguments.save:
        asked = f"wallfacer plan --cluster {arguments.cluster} --model {arguments.model} --seq {arguments.seq}"
        save_flags(arguments.save, configuration_flags(best), asked)
    if arguments.trace:
        from megatron_wallfacer.planning.trace import write_trace

        write_trace(best.choice.spans(), arguments.trace)
    if arguments.plot:
        from megatron_wallfacer.cli.pictures.plans import draw_plans

        rows, named = grid_rows(offered.grids, best)
        ranks = f"{best.spread.cp} context-parallel ranks"
        title = f"{arguments.model}, {arguments.seq} tokens on {arguments.cluster}, {ranks}"
        draw_plans(arguments.plot, [*rows, *named], title)
