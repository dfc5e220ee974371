"""Implement ``wallfacer view``: write an HTML page that steps through the schedules of a grid."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_wallfacer.cli.outputs import check_output
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan
from megatron_wallfacer.schedule.volume import Shape

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``view``."""
    parser = commands.add_parser("view", help="write an HTML page that steps through the transfers and tiles of a grid")
    parser.add_argument("--cp-size", type=int, default=16, metavar="P", help="ranks, at most 64 (default: 16)")
    parser.add_argument("--scheme", choices=SCHEMES, default="auto", help="value of --wallfacer-scheme (default: auto)")
    parser.add_argument("--ranks-per-node", type=int, default=4, metavar="N", help="ranks per node (default: 4)")
    parser.add_argument("--q-heads", type=int, default=Q_HEADS, metavar="N", help=f"query heads (default: {Q_HEADS})")
    parser.add_argument("--kv-heads", type=int, default=KV_HEADS, metavar="N", help=f"kv heads (default: {KV_HEADS})")
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument("--causal", dest="causal", action="store_true", default=True, help="causal mask (default)")
    mask.add_argument("--full", dest="causal", action="store_false", help="no mask")
    parser.add_argument(
        "--out", type=Path, default=Path("grid.html"), metavar="FILE", help="HTML file to write (default: grid.html)"
    )
    parser.set_defaults(run=run_view)


def run_view(arguments: argparse.Namespace) -> int:
    """Write the HTML page of a grid."""
    from megatron_wallfacer.plots.viewer import page_html
    from megatron_wallfacer.plots.viewer.data import check_sizes, page_data

    check_sizes(arguments.cp_size, arguments.ranks_per_node)
    q_heads, kv_heads = arguments.q_heads, arguments.kv_heads
    if min(q_heads, kv_heads) < 1 or q_heads % kv_heads:
        raise OptionError("kv_heads", kv_heads, f"a divisor of {q_heads} query heads, both positive")
    plan = make_plan(arguments.scheme, arguments.cp_size, q_heads=q_heads, kv_heads=kv_heads)
    shape = Shape(tokens=2, q_heads=q_heads, kv_heads=kv_heads, head_dim=HEAD_DIM)
    check_output("--out", arguments.out)
    data = page_data(plan, shape, causal=arguments.causal, ranks_per_node=arguments.ranks_per_node)
    arguments.out.write_text(page_html(data), encoding="utf-8")
    steps = ", ".join(f"{len(one['steps'])} steps {one['name']}" for one in data["passes"])
    print(f"{arguments.out}: {plan.scheme}, {plan.grid}; {steps}")
    return 0
