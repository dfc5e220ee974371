"""A command's own job: its process group from torchrun, and a bar on its first rank."""

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
def job_device() -> Iterator[torch.device]:
    """The rank's device while there is a process group of all ranks: NCCL on GPUs, gloo on CPUs."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
        # Nobody takes down its end of a group while another rank is still in it.
        forget_groups()
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def progress(total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar; used as ``with progress(...) as done: ... done()``."""
    # On stderr: stdout is for whoever reads the figures.
    with Progress(console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("timing", total=total)
        yield lambda: bar.advance(task)
