"""Define the arguments and checks of ``tune`` and ``bench``, which measure on the ranks of a torchrun job."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from megatron_wallfacer.errors import WallfacerError

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def add_measurement_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that measure attention."""
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="dtype of q, k, v (default: bf16, fp32 on CPUs)")
    parser.add_argument("--full-mask", action="store_true", help="no mask, instead of a causal one")
    parser.add_argument("--kernel", default="auto", help="value of --wallfacer-kernel (default: auto)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each (default: 5)")


def check_torchrun(command: str) -> None:
    """Check that a command runs under torchrun.

    Raises:
        WallfacerError: torchrun has not started this process.
    """
    if "RANK" not in os.environ:
        raise WallfacerError(
            f"{command}: must run under torchrun: torchrun --nproc-per-node N --no-python wallfacer {command} ..."
        )


def dtype_of(arguments: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Return the dtype of ``--dtype``, or the default dtype of a device."""
    import torch

    return getattr(torch, DTYPES[arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")])
