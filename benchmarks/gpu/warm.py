"""Training on CPU ranks without a start-up per rank: the stand-in for torchrun in a smoke run.

Importing PyTorch and Megatron takes seconds of processor time. This process does it once, and each rank of each run
is a fork of it. What a rank runs is what ``python -m megatron_wallfacer`` runs: the launcher with the same arguments.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.training_runs.training_log import Iteration, parse_iteration

TIMEOUT_S = 150.0
_PR_SET_PDEATHSIG = 1


def train(
    script: Path, ranks: int, arguments: Sequence[str], log: Path, seen: Callable[[Iteration], None]
) -> list[Iteration]:
    """Run a Megatron script on forks of this process, like :func:`megatron_wallfacer.training_runs.local_run.train`.

    Raises:
        WallfacerError: a rank failed or did not end in time; with the last lines of the log.
    """
    prepare()
    log.write_text("", encoding="utf-8")
    # A folder of its own, because a rank that is killed leaves its files; a short name, because Megatron's checkpoint
    # writer puts a socket there, whose path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="wf-") as folder, _store() as port:
        pids = [_fork(rank, ranks, port, [str(script), *arguments], log, folder) for rank in range(ranks)]
        codes = _wait(pids, time.monotonic() + TIMEOUT_S)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    iterations = [one for one in map(parse_iteration, lines) if one is not None]
    for one in iterations:
        seen(one)
    if any(codes) or not iterations:
        last = "\n".join(lines[-15:])
        raise WallfacerError(f"training on {ranks} ranks ended with exit codes {codes}; see {log}:\n{last}")
    return iterations


@functools.cache
def prepare() -> None:
    """Import what every rank needs, before anything asks PyTorch for CUDA: a fork of that process could not start.

    The CPU runtime comes first: Megatron binds names that it replaces.
    """
    from megatron_wallfacer.megatron import cpu_runtime

    cpu_runtime.install()
    import megatron.core.tokenizers.text
    import megatron.training  # noqa: F401

    import megatron_wallfacer.megatron.hooks
    import megatron_wallfacer.megatron.launcher  # noqa: F401


@contextmanager
def _store() -> Iterator[int]:
    """Serve the store of a job on a port that the kernel chooses, and yield the port.

    In a fork, because the server has threads and ranks are forks of this process.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            from torch.distributed import TCPStore

            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(writing, str(store.port).encode())
            os.close(writing)
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        with os.fdopen(reading) as pipe:
            yield int(pipe.read())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _fork(rank: int, ranks: int, port: int, argv: list[str], log: Path, folder: str) -> int:
    """Start one rank; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_rank(rank, ranks, port, argv, log, folder)
    return pid


def _be_rank(rank: int, ranks: int, port: int, argv: list[str], log: Path, folder: str) -> NoReturn:
    """In the fork: train, and never return."""
    code = 1
    try:
        # The rank ends with the process that waits for it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout.reconfigure(line_buffering=True)
        tempfile.tempdir = folder
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (rank, rank, ranks, ranks, "127.0.0.1", port)
        os.environ.update(zip(names, map(str, values), strict=True))
        # As under torchrun: another process serves the store.
        os.environ.update({"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"})
        from megatron_wallfacer.megatron.launcher import main as launch

        code = launch(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: it would unwind into the code of the process that was forked.
        os._exit(code)


def _wait(pids: Sequence[int], deadline: float) -> list[int]:
    """Exit codes of all ranks; a failed rank ends the others, and so does the deadline."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.02)
    return [codes[pid] for pid in pids]
