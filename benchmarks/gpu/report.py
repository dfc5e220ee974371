"""Options, devices, kernels and errors that the measurements on a GPU share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels import KERNELS, select_kernel
from megatron_wallfacer.kernels.protocol import Kernel


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every table of rows."""
    parser.add_argument("--out", type=Path, help="folder for the table as CSV (default: print it only)")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="start no row that would end later than this (default: no limit)",
    )
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs; figures mean nothing")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every measurement on a device."""
    add_table_options(parser)
    parser.add_argument("--kernel", choices=KERNELS, default="auto", help="the local kernel (default: auto)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=128, help="channels per head (default: 128)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")


def head_counts(text: str) -> tuple[int, int]:
    """Return (query heads, kv heads) of ``Q,KV``."""
    q_heads, kv_heads = text.split(",")
    return int(q_heads), int(kv_heads)


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device to measure on."""
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def kernel_of(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the kernel to measure.

    Raises:
        OptionError: it cannot serve these tensors.
    """
    return select_kernel(options.kernel, device=device, dtype=dtype, head_dim=options.head_dim)


def serving(names: Iterable[str], options: argparse.Namespace, left_out: Callable[[str, str], None]) -> list[str]:
    """Return the kernels that are installed and serve this device and dtype.

    Args:
        names: kernels by name.
        options: device, dtype, head_dim.
        left_out: called with the name of each other kernel and the reason.
    """
    device, dtype, served = device_of(options), getattr(torch, options.dtype), []
    for name in names:
        try:
            select_kernel(name, device=device, dtype=dtype, head_dim=options.head_dim)
        except OptionError as error:
            left_out(name, f"left out: {error}")
        else:
            served.append(name)
    return served


def relative_error(got: Tensor, want: Tensor) -> Tensor:
    """Return the root mean square of the difference over that of the right values."""
    return torch.linalg.vector_norm(got.double() - want) / torch.linalg.vector_norm(want)
