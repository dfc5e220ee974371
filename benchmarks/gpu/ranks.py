"""Ranks of torchrun that measure together on one card, and where their messages go."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks.gpu.report import device_of
from megatron_wallfacer.attention import forget_groups
from megatron_wallfacer.engine.loaded_nccl import loaded_nccl
from megatron_wallfacer.presets.shared_gpus import NodeGpus, share_gpus

Answer = TypeVar("Answer")
#: A rank that waits longer for the others at a row's end has lost them.
PATIENCE = timedelta(seconds=120)


@dataclass(frozen=True)
class Ranks:
    """This rank among those that measure together.

    Attributes:
        rank: index of this rank.
        size: number of ranks.
        control: gloo group for decisions and errors, apart from what is measured; None for one process.
        transfers: ``direct`` or ``staged``, as :func:`megatron_wallfacer.attention` takes it.
    """

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    transfers: str = "direct"

    def first(self, answer: Answer) -> Answer:
        """Return rank 0's answer."""
        return self.all(answer)[0]

    def all(self, answer: Answer) -> list[Answer]:
        """Return the answer of every rank."""
        if self.control is None:
            return [answer]
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, answer, group=self.control)
        return answers


ALONE = Ranks()


def join_ranks(options: argparse.Namespace) -> Ranks:
    """Join the ranks of torchrun: NCCL on a GPU, unless ``options.backend`` is gloo; gloo on a CPU.

    Several ranks may share a GPU: over NCCL from 2.30 on, by ``NCCL_MULTI_RANK_GPU_ENABLE=1``, over gloo by messages
    through host memory.
    """
    device = device_of(options)
    backend = options.backend or ("nccl" if device.type == "cuda" else "gloo")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    arguments: dict[str, Any] = {}
    if device.type == "cuda":
        count = torch.cuda.device_count()
        torch.cuda.set_device(rank % count)
        sharing = share_gpus(NodeGpus(count, loaded_nccl()), size, ("--distributed-backend", backend))
        if rank == 0 and sharing.line:
            print(sharing.line, file=sys.stderr)
        os.environ.update({name: os.environ.get(name, value) for name, value in sharing.environment.items()})
        if backend == "nccl":
            arguments["device_id"] = torch.device("cuda", rank % count)
    dist.init_process_group(backend, timeout=PATIENCE, **arguments)
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    staged = backend == "gloo" and device.type == "cuda"
    return Ranks(rank, size, control, "staged" if staged else "direct")


def leave(ranks: Ranks) -> None:
    """Destroy every process group, on all ranks together."""
    ranks.all(None)
    forget_groups()
    dist.destroy_process_group()
