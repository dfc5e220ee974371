"""Megatron training runs for the tests, without starting an interpreter for each rank of each run.

`train` hands the run to a `rank_server`, a process that has imported torch and Megatron once and forks the ranks. The
test process itself is never forked. What runs in each rank is what `python -m megatron_wallfacer` runs: the launcher.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.job_store import job_store

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "pretrain_gpt.py"
"""Runs with the installed megatron-core. A checkout's script brings its own `megatron`, and gets a server for it."""

GRACE_S = 10.0


@dataclass(frozen=True)
class Iteration:
    """What one training iteration gave, with all digits of fp32 (losses) and fp64 (norm)."""

    number: int
    losses: dict[str, float]
    grad_norm: float | None
    seconds: float
    """When it was logged, on the machine's monotonic clock."""

    @property
    def loss(self) -> float:
        """The language model's loss."""
        return self.losses["lm loss"]


@dataclass(frozen=True)
class RankResult:
    """How one rank fared."""

    rank: int
    exit_code: int
    """Of the process; negative: ended by that signal."""
    end: str
    """'ended' by itself, 'killed at the time limit', or 'killed after rank R had failed'."""
    output: str
    """stdout and stderr together; for a rank that was killed, with the stacks of its threads."""
    iterations: tuple[Iteration, ...]
    """As logged by this rank: no losses except on the last pipeline stage."""
    ended: float
    """When, on the machine's monotonic clock; infinity for a rank that was killed."""


@dataclass(frozen=True)
class RunResult:
    """How a whole run fared."""

    ranks: tuple[RankResult, ...]
    seconds: float

    @property
    def exit_codes(self) -> list[int]:
        """Of each rank."""
        return [rank.exit_code for rank in self.ranks]

    @property
    def iterations(self) -> tuple[Iteration, ...]:
        """As the last rank logged them: it is on the last pipeline stage, and the one whose lines Megatron prints."""
        return self.ranks[-1].iterations

    @property
    def losses(self) -> list[float]:
        """The language model's loss of each iteration."""
        return [iteration.loss for iteration in self.iterations]

    @property
    def grad_norms(self) -> list[float | None]:
        """Gradient norm before clipping, of each iteration."""
        return [iteration.grad_norm for iteration in self.iterations]

    @property
    def output(self) -> str:
        """Of all ranks, one after the other."""
        return "".join(f"===== rank {rank.rank}, {rank.end}\n{rank.output}\n" for rank in self.ranks)

    def check(self) -> RunResult:
        """This result, if every rank ended well.

        Raises:
            AssertionError: One did not; with the last lines of each that failed, the first to fail first.
        """
        failed = sorted((rank for rank in self.ranks if rank.exit_code != 0), key=lambda rank: rank.ended)
        if failed:
            raise AssertionError("\n".join(_report(rank) for rank in failed))
        return self


def _report(rank: RankResult, lines: int = 40) -> str:
    """How `rank` ended and the end of its output."""
    tail = "\n".join(rank.output.splitlines()[-lines:])
    return f"===== rank {rank.rank}: exit code {rank.exit_code}, {rank.end}\n{tail}"


def train(
    nproc: int,
    args: list[str],
    *,
    script: Path | str = SCRIPT,
    timeout_s: float = 120,
    env: dict[str, str] | None = None,
    grace_s: float = GRACE_S,
) -> RunResult:
    """Run `python -m megatron_wallfacer script args` on `nproc` CPU ranks of this machine.

    Args:
        nproc: Number of ranks. Each computes with one thread.
        args: Megatron's arguments, as typed.
        script: Megatron script. If a `megatron` package lies next to it, that one is used.
        timeout_s: After this time every rank writes down its stacks and is killed.
        env: Variables for the ranks. They are set after torch and Megatron were imported: what those read at import
            has no effect.
        grace_s: When a rank fails, the others have this long to end by themselves before they are killed.

    Returns:
        Whatever happened; call `check()` on it where success is expected.
    """
    script = Path(script).resolve()
    folder = Path(tempfile.mkdtemp(prefix="wallfacer-run-"))
    try:
        with job_store() as rendezvous:
            reply = _server(_checkout_of(script)).ask(
                {
                    "ranks": nproc,
                    "argv": [str(script), *args],
                    "env": rendezvous | (env or {}),
                    "folder": str(folder),
                    "timeout_s": timeout_s,
                    "grace_s": grace_s,
                }
            )
        ranks = tuple(_rank_result(folder, rank, reply) for rank in range(nproc))
        return RunResult(ranks, reply["seconds"])
    finally:
        shutil.rmtree(folder)


def _rank_result(folder: Path, rank: int, reply: dict[str, Any]) -> RankResult:
    """Collect what rank `rank` left in `folder`."""
    log, record = folder / f"rank{rank}.log", folder / f"rank{rank}.jsonl"
    entries = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    iterations = tuple(
        Iteration(entry["iteration"], entry["losses"], entry["grad_norm"], entry["seconds"])
        for entry in entries
        if "iteration" in entry
    )
    ended = next((entry["ended"] for entry in entries if "ended" in entry), math.inf)
    output = log.read_text(errors="replace") if log.exists() else ""
    return RankResult(rank, reply["codes"][rank], reply["ends"][rank], output, iterations, ended)


def _checkout_of(script: Path) -> str | None:
    """The folder whose `megatron` package the script will import, None for the installed one."""
    return str(script.parent) if (script.parent / "megatron").is_dir() else None


class _Server:
    """One `rank_server` process."""

    def __init__(self, checkout: str | None) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "tests.support.rank_server", str(writing)]
        # One thread a rank, as under torchrun. It also keeps the server single-threaded: OpenBLAS starts its at import.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        # Importing Megatron is noisy; what the server says matters only if it dies.
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            command + ([checkout] if checkout else []),
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._words,
            pass_fds=(writing,),
        )
        os.close(writing)
        self._answers = os.fdopen(reading)
        threads = self._answer()["threads"]
        assert threads == 1, f"the rank server has {threads} threads; a fork would copy one of them"

    def ask(self, run: dict[str, Any]) -> dict[str, Any]:
        """Have `run` carried out."""
        self._process.stdin.write(json.dumps(run).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            AssertionError: The server ended instead; with its last words.
        """
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            self._words.seek(0)
            raise AssertionError(f"the rank server ended with code {code}:\n{self._words.read()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End the server, and with it what it started."""
        self._process.stdin.close()
        self._process.wait()
        self._answers.close()
        self._words.close()


@functools.cache
def _server(checkout: str | None) -> _Server:
    """The server for one `megatron` package, started when first asked for and ended with this process."""
    server = _Server(checkout)
    atexit.register(server.close)
    return server
