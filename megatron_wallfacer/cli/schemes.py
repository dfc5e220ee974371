"""``wallfacer schemes``: every scheme by name at one size, and what it costs. Counted from the schedules."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_wallfacer.cli.table import as_json, figure, show_table
from megatron_wallfacer.cli.words import DOES_NOT_FIT, NAMED, named_plan
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.memory import peak_bytes
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape, messages, words

CP_SIZE, Q_HEADS, KV_HEADS, HEAD_DIM = 16, 32, 8, 128


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``schemes``."""
    parser = commands.add_parser("schemes", help="list the schemes: grid, words, messages and buffers at one size")
    counts = {
        "--cp-size": (CP_SIZE, "P", "context-parallel ranks"),
        "--q-heads": (Q_HEADS, "N", "query heads of a rank"),
        "--kv-heads": (KV_HEADS, "N", "kv heads of a rank"),
    }
    for flag, (default, metavar, what) in counts.items():
        parser.add_argument(flag, type=int, default=default, metavar=metavar, help=f"{what} (default: {default})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_schemes)


def run_schemes(arguments: argparse.Namespace) -> int:
    """Print the table."""
    found = rows(arguments.cp_size, arguments.q_heads, arguments.kv_heads)
    if arguments.json:
        print(as_json(found))
    else:
        show(found)
    return 0


@dataclass(frozen=True)
class Row:
    """One scheme; figures of one rank for one layer and one pass.

    Attributes:
        scheme, grid: its name and axes, or why there are none; then the rest is None.
        riders: what rides the ring in forward and backward; a dash without a ring.
        forward_words, backward_words: received, in units of n*H.
        forward_messages, backward_messages: received, with the head groups that the heads allow.
        forward_buffers, backward_buffers: most that is held at once beside the rank's own tensors, in units of a query
            shard in the dtype of the inputs (two bytes; partial results and gradients have four).
    """

    scheme: str
    grid: str
    riders: str = "-"
    forward_words: float | None = None
    backward_words: float | None = None
    forward_messages: int | None = None
    backward_messages: int | None = None
    forward_buffers: float | None = None
    backward_buffers: float | None = None


def rows(cp_size: int = CP_SIZE, q_heads: int = Q_HEADS, kv_heads: int = KV_HEADS) -> Iterator[Row]:
    """Every scheme, with the axes that move the fewest words.

    Args:
        cp_size: P.
        q_heads, kv_heads: heads of a rank.

    Raises:
        OptionError: a size that is no group size, or heads that cannot be grouped.
    """
    if q_heads < 1:
        raise OptionError("q_heads", q_heads, "a positive number")
    if kv_heads < 1 or q_heads % kv_heads:
        raise OptionError("kv_heads", kv_heads, f"a divisor of {q_heads} query heads")
    shape = Shape(tokens=2, q_heads=q_heads, kv_heads=kv_heads, head_dim=HEAD_DIM)
    for scheme in NAMED:
        yield _row(scheme, cp_size, shape)


def show(found: Iterable[Row]) -> None:
    """One line a row; forward and backward side by side."""
    figures = (">words fwd", ">bwd", ">messages fwd", ">bwd", ">buffers fwd", ">bwd")
    rows = (
        (
            row.scheme,
            row.grid,
            row.riders,
            figure(row.forward_words),
            figure(row.backward_words),
            figure(row.forward_messages, 0),
            figure(row.backward_messages, 0),
            figure(row.forward_buffers, 1),
            figure(row.backward_buffers, 1),
        )
        for row in found
    )
    show_table(("scheme", "grid", "riders", *figures), rows)


def _row(scheme: str, cp_size: int, shape: Shape) -> Row:
    plan = named_plan(scheme, cp_size, shape)
    if plan is None:
        return Row(scheme, DOES_NOT_FIT)
    rank, groups = busiest_rank(plan), head_groups(plan, shape.q_heads, shape.kv_heads)
    forward = forward_schedule(plan, rank, groups=groups)
    backward = backward_schedule(plan, rank, groups=groups)
    shard = shape.bytes("q")
    return Row(
        scheme=scheme,
        grid=str(plan.grid),
        riders=f"{plan.forward}, {plan.backward}" if plan.grid.ring > 1 else "-",
        forward_words=words(forward, shape) / shape.unit,
        backward_words=words(backward, shape) / shape.unit,
        forward_messages=messages(forward),
        backward_messages=messages(backward),
        forward_buffers=peak_bytes(forward, shape) / shard,
        backward_buffers=peak_bytes(backward, shape) / shard,
    )
