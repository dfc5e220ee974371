"""What the measurements on a GPU share: options, kernels, tables, and where they are saved."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_wallfacer.kernels import KERNELS, select_kernel
from megatron_wallfacer.kernels.protocol import Kernel


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every measurement."""
    parser.add_argument("--out", type=Path, help="folder for the table (default: print it only)")
    parser.add_argument("--kernel", choices=KERNELS, default="auto", help="the local kernel (default: auto)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed (default: 5)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs; figures mean nothing")


def device_of(options: argparse.Namespace) -> torch.device:
    """The device to measure on."""
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def kernel_of(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel to measure.

    Raises:
        OptionError: it cannot serve these tensors.
    """
    return select_kernel(options.kernel, device=device, dtype=dtype, head_dim=options.head_dim)


def relative_error(got: Tensor, want: Tensor) -> Tensor:
    """Root mean square of the difference over that of what is right."""
    return torch.linalg.vector_norm(got.double() - want) / torch.linalg.vector_norm(want)


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(folder: Path | None, name: str, text: str) -> None:
    """Print, and write ``NAME.md`` into the folder if there is one."""
    print(text, flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
