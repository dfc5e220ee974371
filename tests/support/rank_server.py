"""A process that has imported torch and Megatron once and forks ranks on request. Started by `megatron_runs`.

Starting a rank takes five seconds of processor time, nearly all of it imports. This process pays them once, stays
single-threaded (what a fork copies is one thread), and each rank is a fork of it. Requests come as lines of JSON on
stdin, answers go as lines of JSON to the descriptor named on the command line; end of input, also when the test session
is killed, ends the server and whatever it started.

    python -m tests.support.rank_server ANSWER_DESCRIPTOR [FOLDER_OF_A_MEGATRON_CHECKOUT]
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import inspect
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

POLL_S = 0.02
TRACEBACK_S = 1.0
"""How long a rank that ran out of time gets to write down where it stands."""

PR_SET_PDEATHSIG = 1
#: What Megatron imports while it trains: seconds, if eight ranks do it on two cores.
ON_THE_WAY = ("megatron.core.models.mimo", "megatron.training.datasets.sft_dataset")


def main(answer: int, checkout: str | None) -> None:
    """Import everything, then serve requests until stdin ends."""
    # The launcher puts the script's folder at this place; the repository's own entry stays behind it.
    sys.path.insert(0, checkout or "")
    _warm_up()
    _answer(answer, {"threads": len(os.listdir("/proc/self/task"))})
    pending = b""
    while chunk := os.read(0, 65536):
        pending += chunk
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            _answer(answer, _serve(json.loads(line), answer))


def _warm_up() -> None:
    """What every rank would import by itself. The CPU runtime comes first: Megatron binds names that it replaces."""
    from megatron_wallfacer.megatron import cpu_runtime

    cpu_runtime.install()
    import megatron.core.tokenizers.text  # brings the transformers package
    import megatron.training  # noqa: F401

    import megatron_wallfacer.megatron.hooks
    import megatron_wallfacer.megatron.launcher  # noqa: F401

    for name in ON_THE_WAY:
        # Not every version has them.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    _read_sources_once()
    # A collection in a rank would look at all that was imported, and so copy its pages.
    gc.freeze()


def _read_sources_once() -> None:
    """Megatron takes the help of its flags from the sources of its classes, and each rank would parse those anew."""
    from megatron.training.arguments import add_megatron_arguments

    inspect.getsource = functools.cache(inspect.getsource)
    # Nobody changes a syntax tree that Megatron has read a help text from.
    ast.parse = functools.cache(ast.parse)
    add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def _answer(descriptor: int, message: dict[str, Any]) -> None:
    """Send one line."""
    os.write(descriptor, json.dumps(message).encode() + b"\n")


def _serve(run: dict[str, Any], answer: int) -> dict[str, Any]:
    """Fork the ranks of one run and see them to their end.

    Args:
        run: `ranks`, `argv`, `env`, `folder`, `port`, `timeout_s`, `grace_s`; see `megatron_runs.train`.
        answer: Descriptor that the ranks must not keep.

    Returns:
        `codes`, exit code of each rank (negative: the signal that ended it), `ends`, how each came about, `seconds`.
    """
    started = time.monotonic()
    pids = []
    for rank in range(run["ranks"]):
        pid = os.fork()
        if pid == 0:
            _be_rank(run, rank, answer)
        pids.append(pid)
    try:
        codes, ends = _watch(pids, started + run["timeout_s"], run["grace_s"])
    except EOFError:
        shutil.rmtree(run["folder"])  # nobody is left to do it
        raise
    return {"codes": codes, "ends": ends, "seconds": time.monotonic() - started}


def _watch(pids: list[int], deadline: float, grace_s: float) -> tuple[list[int], list[str]]:
    """Wait for all; end those that outlive `deadline`, or a failed one by more than `grace_s`."""
    codes: dict[int, int] = {}
    killed_for: str | None = None
    marks: dict[int, str] = {}
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            codes[rank] = os.waitstatus_to_exitcode(status)
            _end_group(pid)
            marks.setdefault(rank, "ended")
            if codes[rank] != 0 and killed_for is None:
                killed_for = f"killed after rank {rank} had failed"
                deadline = min(deadline, time.monotonic() + grace_s)
        if len(codes) < len(pids) and time.monotonic() > deadline:
            alive = [rank for rank in range(len(pids)) if rank not in codes]
            marks |= dict.fromkeys(alive, killed_for or "killed at the time limit")
            _kill([pids[rank] for rank in alive])
            deadline = float("inf")
        if select.select([0], [], [], POLL_S)[0]:
            # Nobody writes during a run: this is the end of input, the test session is gone.
            _kill([pids[rank] for rank in range(len(pids)) if rank not in codes])
            raise EOFError("the test session ended during a run")
    return [codes[rank] for rank in range(len(pids))], [marks[rank] for rank in range(len(pids))]


def _kill(pids: list[int]) -> None:
    """Have each write its stack, then end it with all that it started."""
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(TRACEBACK_S)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        _end_group(pid)


def _end_group(pid: int) -> None:
    """Kill what rank `pid`, leader of a process group, has started: data loaders, a checkpoint writer's manager."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _be_rank(run: dict[str, Any], rank: int, answer: int) -> NoReturn:
    """In the child: become rank `rank` of `run`, and never return."""
    code = 1
    folder = Path(run["folder"])
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(answer)
        _redirect(folder / f"rank{rank}.log")
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        # What a killed rank leaves behind then goes with the folder.
        tempfile.tempdir = str(folder)
        os.environ.update(_rank_variables(run, rank))
        os.environ.update(run["env"])
        _record_training(folder / f"rank{rank}.jsonl")
        from megatron_wallfacer.megatron.launcher import main as launch

        code = launch(run["argv"])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Others fail because this rank's sockets close, which is later: the stamps tell cause from consequence.
        _append(folder / f"rank{rank}.jsonl", {"ended": time.monotonic()})
        # Not sys.exit: it would unwind into the server's loop, and taking the interpreter down costs half a second.
        os._exit(code)


def _redirect(log: Path) -> None:
    """stdin from nowhere, stdout and stderr into `log`."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    sys.stdout.reconfigure(line_buffering=True)


def _rank_variables(run: dict[str, Any], rank: int) -> dict[str, str]:
    """What torchrun would set on one machine; how ranks find their store is among the variables of the run."""
    ranks = str(run["ranks"])
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
    }


def _append(path: Path, record: dict[str, Any]) -> None:
    """Add one line of JSON."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _record_training(path: Path) -> None:
    """Write losses and gradient norm of each iteration to `path` with all their digits.

    Megatron prints the gradient norm with three decimals: not enough to compare runs. Its `training_log` receives the
    numbers themselves, on every rank; the losses are empty except on the last pipeline stage.
    """
    import megatron.training.training as training

    original: Callable[..., Any] = training.training_log
    signature = inspect.signature(original)

    @functools.wraps(original)  # the plugin looks at the signature
    def training_log(*args: Any, **kwargs: Any) -> Any:
        values = signature.bind(*args, **kwargs).arguments
        norm = values["grad_norm"]
        record = {
            "iteration": values["iteration"],
            "losses": {name: float(loss) for name, loss in values["loss_dict"].items()},
            "grad_norm": None if norm is None else float(norm),
            "seconds": time.monotonic(),
        }
        _append(path, record)
        return original(*args, **kwargs)

    training.training_log = training_log


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
