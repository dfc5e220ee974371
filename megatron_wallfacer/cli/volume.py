"""Implement ``wallfacer volume``: compare the communication volume of every scheme with the lower bounds."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import astuple

from megatron_wallfacer.cli.table import as_json, show_table
from megatron_wallfacer.planning.report import number
from megatron_wallfacer.schedule.scheme_volumes import SchemeVolume, scheme_volumes

SIZES, GROUPS, Q_HEADS = (16, 64, 256, 1024), (1, 4, 8), 64


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``volume``."""
    parser = commands.add_parser("volume", help="count the elements that each scheme makes a rank receive")
    sizes, groups = (" ".join(map(str, default)) for default in (SIZES, GROUPS))
    parser.add_argument(
        "--cp-size", type=int, nargs="+", default=SIZES, metavar="P", help=f"context-parallel sizes (default: {sizes})"
    )
    parser.add_argument(
        "--group", type=int, nargs="+", default=GROUPS, metavar="N", help=f"query heads per kv head (default: {groups})"
    )
    parser.add_argument("--q-heads", type=int, default=Q_HEADS, metavar="N", help="query heads of a rank (default: 64)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_volume)


def run_volume(arguments: argparse.Namespace) -> int:
    """Print the volume of every scheme."""
    volumes = scheme_volumes(arguments.cp_size, arguments.group, arguments.q_heads)
    if arguments.json:
        print(as_json(volumes))
    else:
        _print(volumes)
    return 0


def _print(volumes: Iterable[SchemeVolume]) -> None:
    print("Communication volume: elements received per rank for one layer, in units of one Q shard.")
    print("/bound: divided by the lower bound for undivided heads (below 1, heads are divided);")
    print("/whole: divided by the lower bound for whole shards.")
    passes = (">fwd", ">/bound", ">/whole", ">bwd", ">/bound", ">/whole")
    show_table((">P", ">q/kv", "scheme", "grid", *passes), map(_cells, volumes))


def _cells(row: SchemeVolume) -> tuple[str, ...]:
    cp_size, group, scheme, grid, *numbers = astuple(row)
    return str(cp_size), str(group), scheme, grid, *map(number, numbers)
