"""The ranks: forks of this process, each in its namespace, that carry out jobs.

torch is imported once, before the fork; the pages are shared.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.cluster import inside
from benchmarks.cluster.wiring import Wiring
from megatron_wallfacer.errors import WallfacerError

_PORT = 29500
_LAST_WORDS = 4000


class RankFailed(WallfacerError):
    """A rank raised, died or did not answer; the message has its traceback."""


class Ranks:
    """One torch.distributed gloo world inside a cluster, as a context manager.

    Args:
        wiring: of a cluster that is up.
        make_state: called on each rank with its number; what it returns is the first argument of each job.
        timeout_s: seconds that a job or a collective may take.
    """

    def __init__(self, wiring: Wiring, make_state: Callable[[int], Any], *, timeout_s: float = 300.0) -> None:
        self._timeout_s = timeout_s
        self._logs = tempfile.TemporaryDirectory(prefix=wiring.prefix)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        # Not the machine's default method: a fork shares the import of torch, and the modules of peers.
        context = mp.get_context("fork")
        try:
            for rank in range(wiring.topology.ranks):
                ours, theirs = context.Pipe()
                args = (rank, wiring, make_state, timeout_s, theirs, self._log(rank))
                process = context.Process(target=_serve, args=args, daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Processes of the ranks."""
        return [process.pid for process in self._processes]

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """``[job(state, *args)]`` of every rank, in rank order.

        Raises:
            RankFailed: a rank raised, died or did not answer in time.
        """
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((job, args))
            except OSError:
                raise self._death(rank) from None
        results: dict[int, Any] = {}
        while missing := [rank for rank in range(len(self._pipes)) if rank not in results]:
            by_pipe = {self._pipes[rank]: rank for rank in missing}
            ready = wait(list(by_pipe), timeout=self._timeout_s)
            if not ready:
                raise RankFailed(f"ranks {missing} did not answer within {self._timeout_s:g} s")
            for pipe in ready:
                results[by_pipe[pipe]] = self._answer(by_pipe[pipe], pipe)
        return [results[rank] for rank in sorted(results)]

    def _answer(self, rank: int, pipe: Connection) -> Any:
        try:
            good, value = pipe.recv()
        except (EOFError, OSError):
            raise self._death(rank) from None
        if not good:
            raise RankFailed(f"rank {rank} failed:\n{value}")
        return value

    def _death(self, rank: int) -> RankFailed:
        self._processes[rank].join(1.0)
        words = Path(self._log(rank)).read_text(errors="replace")[-_LAST_WORDS:]
        return RankFailed(f"rank {rank} ended with code {self._processes[rank].exitcode}\n{words}")

    def _log(self, rank: int) -> str:
        return str(Path(self._logs.name) / f"rank{rank}.log")

    def close(self) -> None:
        """Kill the ranks. They hold nothing that is worth an orderly end."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._logs.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _serve(
    rank: int, wiring: Wiring, make_state: Callable[[int], Any], timeout_s: float, pipe: Connection, log: str
) -> None:
    inside.die_with_parent()
    _redirect(log)
    inside.enter(wiring.namespace(rank))
    inside.sharpen_timers()
    inside.keep_memory()
    state: Any = None
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        try:
            if state is None:
                _join_world(rank, wiring, timeout_s)
                state = make_state(rank)
            pipe.send((True, job(state, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _join_world(rank: int, wiring: Wiring, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    address = f"tcp://{wiring.address(0)}:{_PORT}"
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=wiring.topology.ranks, timeout=limit)


def _redirect(log: str) -> None:
    """What a rank says goes to its log: sixteen voices on one terminal help nobody."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target in (1, 2):
        os.dup2(descriptor, target)
