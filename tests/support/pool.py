"""One pool of gloo workers per world size, kept for the whole test session.

A forkserver imports torch once and forks the workers, so 16 ranks start in seconds. A job is a
module-level function; it runs on every rank and its results come back in rank order. Results should be
plain data or numpy: a torch tensor would travel as a file descriptor of its own.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_S = 120
#: Imported once, before the fork. torch imports the last one, with all of sympy, in its first backward pass: 1.4 s of
#: processor time for each worker.
PRELOADED = ["torch", "torch.distributed", "megatron_wallfacer.attention", "torch.fx.experimental.symbolic_shapes"]


class Pool:
    """``size`` processes that share one gloo world."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._store = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = (rank, size, str(Path(self._store.name) / "store"), theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """``[job(rank, *args) for rank in range(size)]``, each on its own rank.

        Raises:
            AssertionError: a rank raised, died, or did not answer in time; with its traceback.
        """
        for pipe in self._pipes:
            pipe.send((job, args))
        results: dict[int, Any] = {}
        while missing := [rank for rank in range(len(self._pipes)) if rank not in results]:
            ready = wait([self._pipes[rank] for rank in missing], timeout=TIMEOUT_S)
            assert ready, f"ranks {missing} did not answer within {TIMEOUT_S} s"
            for pipe in ready:
                rank = self._pipes.index(pipe)
                ok, value = pipe.recv()
                assert ok, f"rank {rank}:\n{value}"
                results[rank] = value
        return [results[rank] for rank in sorted(results)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._store.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # A collection would look at all that was imported, and so copy its pages.
    gc.freeze()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_S)
    )
    while True:
        job, args = pipe.recv()
        try:
            pipe.send((True, job(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
