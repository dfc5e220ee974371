"""Run a Megatron script on ranks of this node, and read the iterations in its log while the script runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.needed_arguments import GPU_VARIABLES
from megatron_wallfacer.presets.shared_gpus import sharing_on_this_node
from megatron_wallfacer.training_runs.failing_rank import failure_text
from megatron_wallfacer.training_runs.training_log import Iteration, parse_iteration


def train(
    script: Path, ranks: int, arguments: Sequence[str], log: Path, seen: Callable[[Iteration], None]
) -> list[Iteration]:
    """Run a Megatron script under torchrun and the plugin's launcher, and pass each iteration of its log to ``seen``.

    The file ``log`` gets the whole output. torchrun writes the output of each rank into the folder ``<log>-ranks``.

    Raises:
        WallfacerError: The run fails. The message has the last error lines of the rank that failed first.
    """
    folder = log.with_name(f"{log.name}-ranks")
    shutil.rmtree(folder, ignore_errors=True)
    sharing = sharing_on_this_node(ranks, arguments, os.environ)
    if sharing.line:
        print(f"wallfacer: {sharing.line}", file=sys.stderr, flush=True)
    # -u disables buffering, so that iterations are visible at once. --tee adds the rank to each line.
    launch = ["-u", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launch += ["--tee", "3", "--log-dir", str(folder), "-m", "megatron_wallfacer"]
    command = [sys.executable, *launch, str(script), *arguments, *sharing.flags]
    # Use one thread per rank. torchrun would let a single rank use all cores, but on a busy node threads that wait for
    # each other make training ten times slower.
    environment = os.environ | sharing.environment | {"OMP_NUM_THREADS": "1"} | GPU_VARIABLES
    iterations, code = _run(command, environment, log, seen)
    if code != 0 or not iterations:
        failure = failure_text(log.read_text(errors="replace"))
        raise WallfacerError(f"training on {ranks} ranks ended with exit code {code}; see {log}: {failure}")
    return iterations


def _run(
    command: Sequence[str], environment: dict[str, str], log: Path, seen: Callable[[Iteration], None]
) -> tuple[list[Iteration], int]:
    """Run the command, and return its training iterations and its exit code. An interrupt ends all ranks."""
    iterations = []
    with log.open("w") as file:
        # A new session has a process group that contains all ranks, so one signal can end them.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=environment,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if (iteration := parse_iteration(line)) is not None:
                    iterations.append(iteration)
                    seen(iteration)
            return iterations, process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
