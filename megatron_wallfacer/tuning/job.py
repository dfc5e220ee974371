"""Create the process group of a command under torchrun, and show a progress bar on rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from megatron_wallfacer.attention.functional import forget_groups


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Create the process group of all ranks (NCCL on GPUs, gloo on CPUs), and destroy the group at the end.

    Yields:
        The device of this rank.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
        # Wait, because no rank may destroy a group that another rank still uses.
        forget_groups()
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def progress_bar(total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr if ``shown``. Stdout has the results.

    Yields:
        A function to call after each step.
    """
    with Progress(console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("timing", total=total)
        yield lambda: bar.advance(task)
