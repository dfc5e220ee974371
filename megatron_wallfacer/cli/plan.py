"""Implement ``wallfacer plan``: choose sizes, flags and grid for a model on a cluster, or predict one grid."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.outputs import check_output
from megatron_wallfacer.cli.table import show_table
from megatron_wallfacer.errors import WallfacerError

if TYPE_CHECKING:
    from megatron_wallfacer.planning.configuration import Request
    from megatron_wallfacer.planning.report import Report

#: Options that only a search allows, and options that only the prediction of one grid allows.
_SEARCH_ONLY = ("max_seq", "grids", "plot", "untested_optimizers")
_SIZES = ("head_size", "team_size", "kv_team_size", "ring_inner_size")
_GRID_ONLY = (*_SIZES, "placement", "head_groups", "keep_gathered_q", "recompute", "microbatches")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``plan``."""
    parser = commands.add_parser("plan", help="choose sizes, flags and grid for a model on a cluster, with the reason")
    parser.add_argument("--cluster", default="h100-8x8", help="a preset or a YAML file (default: h100-8x8)")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes, instead of those of the cluster file")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="devices per node, at most as in the file")
    parser.add_argument("--memory", type=float, metavar="GB", help="memory per rank, instead of the device's")
    parser.add_argument("--model", default="llama3-8b", help="a transformer by name (default: llama3-8b)")
    parser.add_argument("--seq", default="1M", metavar="TOKENS", help="length, such as 128K or 1M (default: 1M)")
    parser.add_argument("--full-mask", action="store_true", help="no pair is masked, instead of a causal mask")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor-parallel size (default: searched; 1 with --scheme)")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages (default: 1)")
    parser.add_argument("--cp", type=int, metavar="N", help="context-parallel size (default: all remaining ranks)")
    parser.add_argument("--cuda-graphs", action="store_true", help="count the memory of --wallfacer-cuda-graphs")
    parser.add_argument(
        "--untested-optimizers",
        action="store_true",
        help="search Megatron's optimizer flags that no test here uses, too",
    )
    parser.add_argument("--max-seq", action="store_true", help="find the longest sequence instead of planning --seq")
    parser.add_argument("--grids", action="store_true", help="print grids of attention in the best configuration")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the flags of the first row as a preset")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write one attention layer as a Perfetto trace")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the best grids and the named schemes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_grid_arguments(parser.add_argument_group("one grid instead of a search"))
    parser.set_defaults(run=run_plan)


def _add_grid_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--scheme", help="predict this scheme, as in --wallfacer-scheme")
    for size in _SIZES:
        axis = size.removesuffix("_size")
        group.add_argument(f"--{size.replace('_', '-')}", type=int, metavar="N", help=f"ranks of the {axis} axis")
    group.add_argument("--placement", help="teams-adjacent, rings-adjacent, head-first, ring-first or an axis order")
    group.add_argument("--head-groups", type=int, metavar="N", help="head groups that are pipelined")
    group.add_argument("--keep-gathered-q", action="store_true", help="keep gathered queries for backward")
    group.add_argument("--recompute", help="none, keep-attention (default) or full")
    group.add_argument("--microbatches", type=int, metavar="N", help="sequences per replica and step (default: 1)")


def run_plan(arguments: argparse.Namespace) -> int:
    """Search for a configuration or predict a grid, print the report, and write the files."""
    for name in ("save", "trace", "plot"):
        check_output(f"--{name}", getattr(arguments, name))
    _check_combination(arguments)
    report = _report(arguments)
    if not arguments.json:
        _print(report)
    if report.error is not None:
        raise report.error
    if arguments.json:
        print(json.dumps(report.fields(), indent=2))
    _write(arguments, report)
    return 0


def _check_combination(arguments: argparse.Namespace) -> None:
    unfit, rule = (_SEARCH_ONLY, "without") if arguments.scheme else (_GRID_ONLY, "with")
    for name in unfit:
        if (value := getattr(arguments, name)) not in (None, False):
            flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise WallfacerError(f"{flag}: must be used {rule} --scheme, because --scheme predicts one grid")


def _report(arguments: argparse.Namespace) -> Report:
    from megatron_wallfacer.planning.plan_reports import grid_report, longest_report, search_report

    request = _request(arguments)
    if arguments.scheme:
        options = {name: getattr(arguments, name) for name in _GRID_ONLY}
        given = {name: value for name, value in options.items() if value is not None}
        return grid_report(request, arguments.scheme, **given)
    return longest_report(request) if arguments.max_seq else search_report(request, grids=arguments.grids)


def _request(arguments: argparse.Namespace) -> Request:
    from megatron_wallfacer.planning.cluster_file import load_cluster, part_of
    from megatron_wallfacer.planning.configuration import Request
    from megatron_wallfacer.planning.model import model_named, token_count

    cluster = part_of(load_cluster(arguments.cluster, arguments.nodes), arguments.gpus_per_node, arguments.memory)
    sizes = {name: getattr(arguments, name) for name in ("tp", "pp", "cp", "cuda_graphs")}
    tokens, causal = token_count(arguments.seq), not arguments.full_mask
    optimizers = "all" if arguments.untested_optimizers else "tested"
    return Request(model_named(arguments.model), cluster, tokens, causal=causal, optimizers=optimizers, **sizes)


def _print(report: Report) -> None:
    for part in report.parts:
        if isinstance(part, str):
            print(part)
        else:
            show_table(part.headings, part.rows)


def _write(arguments: argparse.Namespace, report: Report) -> None:
    job = f"--cluster {arguments.cluster} --model {arguments.model}"
    if arguments.save:
        from megatron_wallfacer.planning.configuration_flags import configuration_flags, save_flags

        length = "--max-seq" if arguments.max_seq else f"--seq {arguments.seq}"
        save_flags(arguments.save, configuration_flags(report.first), f"wallfacer plan {job} {length}")
    if arguments.trace:
        from megatron_wallfacer.planning.simulated_trace import write_trace

        write_trace(report.first.choice.spans(), arguments.trace)
    if arguments.plot:
        from megatron_wallfacer.plots.plans import draw_plans

        ranks = f"{report.first.sizes.cp} context-parallel ranks"
        draw_plans(
            arguments.plot,
            report.grid_rows(),
            f"{arguments.model}, {arguments.seq} tokens on {arguments.cluster}, {ranks}",
        )
