"""``wallfacer bench``: time attention of named schemes on a job's ranks, in turns.

torchrun --nproc-per-node 4 --no-python wallfacer bench --schemes ring team-ring wallfacer --seq 8192
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan
from megatron_wallfacer.schedule.volume import Shape

if TYPE_CHECKING:
    import torch

    from megatron_wallfacer.schedule.plan import Plan
    from megatron_wallfacer.tuning.scheme_times import Row

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``bench``."""
    parser = commands.add_parser("bench", help="under torchrun: time attention of named schemes on the job's own ranks")
    parser.add_argument(
        "--schemes", nargs="+", choices=SCHEMES, default=["ring", "team-ring"], metavar="NAME",
        help="as --wallfacer-scheme; the first is what others are compared with (default: ring team-ring)",
    )  # fmt: skip
    counts = {
        "--seq": (8192, "tokens of the whole sequence"),
        "--q-heads": (8, "query heads"),
        "--kv-heads": (2, "kv heads"),
        "--head-dim": (64, "channels of a head"),
        "--batch": (1, "sequences"),
        "--repeats": (5, "times of each, in turns"),
    }
    for flag, (default, what) in counts.items():
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of q, k, v (default: bf16 on GPUs, fp32 on CPUs)")
    parser.add_argument("--full-mask", action="store_true", help="all pairs are live, instead of a causal half")
    parser.add_argument("--kernel", default="auto", help="as --wallfacer-kernel (default: auto)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--csv", action="store_true", help="print comma-separated values")
    parser.set_defaults(run=run_bench)


def run_bench(arguments: argparse.Namespace) -> int:
    """Time and print. Collective over the job's ranks.

    Returns:
        0; 1 where the schemes' outputs do not agree.

    Raises:
        WallfacerError: not under torchrun, or what was asked for does not fit: on every rank alike.
    """
    if "RANK" not in os.environ:
        raise WallfacerError(
            "bench: must run under torchrun: torchrun --nproc-per-node N --no-python wallfacer bench ..."
        )
    ranks = int(os.environ["WORLD_SIZE"])
    # Everything that may be refused is looked at before there is a group whose other ranks could wait.
    shape, plans = _shape(arguments, ranks), _plans(arguments, ranks)
    from megatron_wallfacer.tuning.job import job_device

    with job_device() as device:
        found = _timed(arguments, plans, shape, device)
    if os.environ["RANK"] == "0":
        _print(arguments, found, shape, ranks)
    return 0 if all(row.agrees for row in found) else 1


def _shape(arguments: argparse.Namespace, ranks: int) -> Shape:
    """Of a rank's shard.

    Raises:
        OptionError: sizes that do not fit each other.
    """
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
    heads = {"q_heads": arguments.q_heads, "kv_heads": arguments.kv_heads, "tokens": arguments.seq // ranks}
    plans = []
    for scheme in arguments.schemes:
        try:
            plans.append(make_plan(scheme, ranks, **heads))
        except OptionError as error:
            raise WallfacerError(f"--schemes {scheme}: {error}") from error
    return plans


def _timed(arguments: argparse.Namespace, plans: list[Plan], shape: Shape, device: torch.device) -> list[Row]:
    import torch
    import torch.distributed as dist

    from megatron_wallfacer.kernels import select_kernel
    from megatron_wallfacer.tuning.attention_times import Setting, largest_differences, time_plans
    from megatron_wallfacer.tuning.job import progress
    from megatron_wallfacer.tuning.scheme_times import rows

    dtype = getattr(torch, DTYPES[arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")])
    select_kernel(arguments.kernel, device=device, dtype=dtype, head_dim=shape.head_dim)
    setting = Setting(shape, dtype, device, causal=not arguments.full_mask, kernel=arguments.kernel)
    differences = largest_differences(plans, setting)
    shown = dist.get_rank() == 0
    with progress(len(plans) * (arguments.repeats + 1), shown=shown) as done:
        times = time_plans(plans, setting, repeats=arguments.repeats, done=done)
    return rows(arguments.schemes, plans, times, differences, setting)


def _print(arguments: argparse.Namespace, found: list[Row], shape: Shape, ranks: int) -> None:
    from megatron_wallfacer.tuning.scheme_times import as_csv, print_rows

    if arguments.json:
        from megatron_wallfacer.cli.table import as_json

        print(as_json(found))
    elif arguments.csv:
        print(as_csv(found), end="")
    else:
        print_rows(found, f"{arguments.seq} tokens, {ranks} ranks, {shape.q_heads} x {shape.head_dim} query heads")
