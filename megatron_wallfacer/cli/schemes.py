"""Implement ``wallfacer schemes``: print volume, messages and buffers of every scheme for one number of ranks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import astuple, dataclass

from megatron_wallfacer.cli.table import as_json, show_table
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.report import number
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.memory import peak_bytes
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.scheme_volumes import DOES_NOT_FIT, NAMED, named_plan
from megatron_wallfacer.schedule.volume import Shape, messages, received_elements

CP_SIZE, Q_HEADS, KV_HEADS, HEAD_DIM = 16, 32, 8, 128
_COUNTS = {
    "--cp-size": (CP_SIZE, "P", "context-parallel ranks"),
    "--q-heads": (Q_HEADS, "N", "query heads of a rank"),
    "--kv-heads": (KV_HEADS, "N", "kv heads of a rank"),
}
#: Headings of the table and, for the columns of numbers, digits after the decimal point.
_HEADINGS = ("scheme", "grid", "ring fwd, bwd", ">volume fwd", ">bwd", ">messages fwd", ">bwd", ">buffers fwd", ">bwd")
_DIGITS = (2, 2, 0, 0, 1, 1)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``schemes``."""
    parser = commands.add_parser("schemes", help="list the schemes: grid, volume, messages and buffers at one size")
    for flag, (default, metavar, noun) in _COUNTS.items():
        parser.add_argument(flag, type=int, default=default, metavar=metavar, help=f"{noun} (default: {default})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_schemes)


def run_schemes(arguments: argparse.Namespace) -> int:
    """Print the costs of every scheme."""
    q_heads, kv_heads = arguments.q_heads, arguments.kv_heads
    if q_heads < 1:
        raise OptionError("q_heads", q_heads, "a positive number")
    if kv_heads < 1 or q_heads % kv_heads:
        raise OptionError("kv_heads", kv_heads, f"a divisor of {q_heads} query heads")
    shape = Shape(tokens=2, q_heads=q_heads, kv_heads=kv_heads, head_dim=HEAD_DIM)
    costs = scheme_costs(arguments.cp_size, shape)
    if arguments.json:
        print(as_json(costs))
    else:
        show_table(_HEADINGS, map(_cells, costs))
    return 0


@dataclass(frozen=True)
class SchemeCosts:
    """Costs of one scheme for one layer, on the busiest rank.

    Attributes:
        scheme: name of the scheme.
        grid: axis sizes with the least volume. For an unsupported scheme ``grid`` has an error text, and all
            numbers are None.
        ring_variants: pass-KV or pass-Q in forward and in backward; a dash if there is no ring.
        forward_volume, backward_volume: elements received, in units of one Q shard.
        forward_messages, backward_messages: messages received.
        forward_buffers, backward_buffers: peak memory of a pass, in units of one Q shard with two bytes per element.
            Partial results and gradients have four bytes per element. The peak includes results of the pass, but no
            local inputs.
    """

    scheme: str
    grid: str
    ring_variants: str = "-"
    forward_volume: float | None = None
    backward_volume: float | None = None
    forward_messages: int | None = None
    backward_messages: int | None = None
    forward_buffers: float | None = None
    backward_buffers: float | None = None


def scheme_costs(cp_size: int, shape: Shape) -> Iterator[SchemeCosts]:
    """Yield the costs of every scheme."""
    for scheme in NAMED:
        plan = named_plan(scheme, cp_size, shape)
        if plan is None:
            yield SchemeCosts(scheme, DOES_NOT_FIT)
            continue
        rank, groups = busiest_rank(plan), head_groups(plan, shape.q_heads, shape.kv_heads)
        forward = forward_schedule(plan, rank, groups=groups)
        backward = backward_schedule(plan, rank, groups=groups)
        shard = shape.bytes("q")
        yield SchemeCosts(
            scheme=scheme,
            grid=str(plan.grid),
            ring_variants=f"{plan.forward}, {plan.backward}" if plan.grid.ring > 1 else "-",
            forward_volume=received_elements(forward, shape) / shape.unit,
            backward_volume=received_elements(backward, shape) / shape.unit,
            forward_messages=messages(forward),
            backward_messages=messages(backward),
            forward_buffers=peak_bytes(forward, shape) / shard,
            backward_buffers=peak_bytes(backward, shape) / shard,
        )


def _cells(costs: SchemeCosts) -> tuple[str, ...]:
    scheme, grid, ring_variants, *numbers = astuple(costs)
    return scheme, grid, ring_variants, *map(number, numbers, _DIGITS)
