"""Implement ``wallfacer bench``: measure attention with several schemes, one after another in each round.

torchrun --nproc-per-node 4 --no-python wallfacer bench --schemes ring team-ring wallfacer --seq 8192
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.torchrun_job import add_measurement_arguments, check_torchrun, dtype_of
from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan
from megatron_wallfacer.schedule.volume import Shape

if TYPE_CHECKING:
    import torch

    from megatron_wallfacer.schedule.plan import Plan
    from megatron_wallfacer.tuning.scheme_times import SchemeTimes

_COUNTS = {
    "--seq": (8192, "tokens of the whole sequence"),
    "--q-heads": (8, "query heads"),
    "--kv-heads": (2, "kv heads"),
    "--head-dim": (64, "channels per head"),
    "--batch": (1, "sequences"),
}
_HEADINGS = (
    "scheme", "grid", ">ms", ">forward", ">backward", ">fastest", ">slowest", ">ratio", ">tokens/s",
    ">TFLOP/s per rank", ">difference",
)  # fmt: skip


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``bench``."""
    parser = commands.add_parser("bench", help="under torchrun: time attention of named schemes on the job's own ranks")
    parser.add_argument(
        "--schemes", nargs="+", choices=SCHEMES, default=["ring", "team-ring"], metavar="NAME",
        help="values of --wallfacer-scheme; the first is the reference (default: ring team-ring)",
    )  # fmt: skip
    for flag, (default, noun) in _COUNTS.items():
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{noun} (default: {default})")
    add_measurement_arguments(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--csv", action="store_true", help="print comma-separated values")
    parser.set_defaults(run=run_bench)


def run_bench(arguments: argparse.Namespace) -> int:
    """Time the schemes and print the results. All ranks of the job must call this function.

    Returns:
        The exit code: 1 if outputs or gradients of the schemes differ by more than the tolerance, else 0.
    """
    check_torchrun("bench")
    ranks = int(os.environ["WORLD_SIZE"])
    # Check before creating the process group: other ranks of the group would wait for a rank that has an error.
    shape, plans = _shape(arguments, ranks), _plans(arguments, ranks)
    from megatron_wallfacer.tuning.job import process_group

    with process_group() as device:
        results = _time(arguments, plans, shape, device)
    if os.environ["RANK"] == "0":
        _print(arguments, results, f"{arguments.seq} tokens, {ranks} ranks, {shape.q_heads} x {shape.head_dim} q heads")
    return 0 if all(result.agrees for result in results) else 1


def _shape(arguments: argparse.Namespace, ranks: int) -> Shape:
    for name in ("seq", "q_heads", "kv_heads", "head_dim", "batch", "repeats"):
        if getattr(arguments, name) < 1:
            raise OptionError(name, getattr(arguments, name), "a positive number")
    if arguments.q_heads % arguments.kv_heads:
        raise OptionError("kv_heads", arguments.kv_heads, f"a divisor of {arguments.q_heads} query heads")
    if arguments.seq % (2 * ranks):
        raise OptionError("seq", arguments.seq, f"a multiple of 2 x {ranks} ranks")
    tokens = arguments.seq // ranks
    return Shape(tokens, arguments.q_heads, arguments.kv_heads, arguments.head_dim, batch=arguments.batch)


def _plans(arguments: argparse.Namespace, ranks: int) -> list[Plan]:
    sizes = {"q_heads": arguments.q_heads, "kv_heads": arguments.kv_heads, "tokens": arguments.seq // ranks}
    plans = []
    for scheme in arguments.schemes:
        try:
            plans.append(make_plan(scheme, ranks, **sizes))
        except OptionError as error:
            raise WallfacerError(f"--schemes {scheme}: {error}") from error
    return plans


def _time(arguments: argparse.Namespace, plans: list[Plan], shape: Shape, device: torch.device) -> list[SchemeTimes]:
    import torch.distributed as dist

    from megatron_wallfacer.kernels import select_kernel
    from megatron_wallfacer.tuning.attention_times import AttentionWorkload, largest_differences, time_plans
    from megatron_wallfacer.tuning.job import progress_bar
    from megatron_wallfacer.tuning.scheme_times import scheme_times

    dtype = dtype_of(arguments, device)
    select_kernel(arguments.kernel, device=device, dtype=dtype, head_dim=shape.head_dim)
    workload = AttentionWorkload(shape, dtype, device, causal=not arguments.full_mask, kernel=arguments.kernel)
    differences = largest_differences(plans, workload)
    with progress_bar(len(plans) * (arguments.repeats + 1), shown=dist.get_rank() == 0) as done:
        times = time_plans(plans, [workload] * len(plans), repeats=arguments.repeats, done=done)
    return scheme_times(arguments.schemes, plans, times, differences, workload)


def _print(arguments: argparse.Namespace, results: list[SchemeTimes], title: str) -> None:
    from megatron_wallfacer.cli.table import as_json, show_table
    from megatron_wallfacer.planning.report import number
    from megatron_wallfacer.tuning.scheme_times import as_csv

    if arguments.json:
        print(as_json(results))
    elif arguments.csv:
        print(as_csv(results), end="")
    else:
        rows = []
        for result in results:
            passes = (result.median_ms, result.forward_ms, result.backward_ms)
            times = (*passes, result.fastest_ms, result.slowest_ms, result.ratio)
            difference = f"{result.difference:.1e}" + ("" if result.agrees else " TOO LARGE")
            rates = (number(result.tokens_s, 0), f"{result.tflops:.3g}")
            rows.append((result.scheme, result.grid, *map(number, times), *rates, difference))
        print(title)
        show_table(_HEADINGS, rows)
        verdict = "agree" if all(result.agrees for result in results) else "DO NOT AGREE"
        print(f"Outputs and gradients {verdict}: {results[0].tolerance:.0e} of the largest entry is allowed.")
