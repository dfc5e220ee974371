"""The rank that failed first and its last error lines, from torchrun's log."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.training_runs.failing_rank import LAST, failure_text, first_failure
from megatron_wallfacer.training_runs.local_run import train
from megatron_wallfacer.training_runs.training_log import Iteration

#: Rank 0 reports an iteration and waits; rank 1 raises when it has seen the report in the log.
SCRIPT = """
import os, pathlib, sys, time
if os.environ["RANK"] == "1":
    reported = pathlib.Path(sys.argv[1])
    for _ in range(1500):
        if reported.exists():
            break
        time.sleep(0.02)
    else:
        raise TimeoutError("the report is not read while the ranks run")
    def attention(tile):
        raise ValueError(f"tile {tile} is wrong")
    attention(5)
print(" [now] iteration        1/       2 | x: 1 | lm loss: 5.5E+00 | y: 2 | grad norm: 1.25 | z: 3", flush=True)
time.sleep(600)
"""

_CLOSED = "RuntimeError: [gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:8339."


def raised(rank: int, error: str) -> str:
    """A traceback as a rank of a process group prints it, under ``--tee 3``."""
    lines = ("Traceback (most recent call last):", '  File "train.py", line 9, in <module>', "    step()", error)
    return "".join(f"[default{rank}]:[rank{rank}]: {line}\n" for line in lines)


def summary(*codes: tuple[int, int]) -> str:
    """What torchrun prints last of ranks and exit codes, the last one the root cause in its opinion."""
    entries = [
        f"[{i}]:\n  time      : 2026-11-27_20:43:55\n  host      : localhost\n"
        f"  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code} (pid: 75{rank}) \n  error_file: <N/A>\n"
        f"  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html\n"
        for i, (rank, code) in enumerate(codes)
    ]
    agent = "Traceback (most recent call last):\n    raise ChildFailedError(\n"
    return f"{agent}Failures:\n{''.join(entries[:-1])}-----\nRoot Cause (first observed failure):\n{entries[-1]}====="


FIVE, SIX, MILD = "ValueError: five", "ValueError: six", "ValueError: mild"
REJECTED = "wallfacer: error: no"


@pytest.mark.parametrize(
    ("log", "rank", "code", "last"),
    [
        (raised(1, FIVE) + summary((0, -15), (1, 1)), 1, 1, FIVE),
        # Both have failed when torchrun looks: it names the lower one, which printed first as well.
        (raised(0, _CLOSED) + raised(1, FIVE) + summary((1, 1), (0, 1)), 1, 1, FIVE),
        (raised(1, FIVE) + raised(0, SIX) + summary((1, 1), (0, 1)), 1, 1, FIVE),
        # The rank whose error came first takes its time to end, and torchrun ends it.
        (raised(1, FIVE) + raised(0, _CLOSED) + summary((1, -15), (0, 1)), 1, -15, FIVE),
        # Nothing but a lost peer is known.
        ("[default1]:waiting\n" + raised(0, _CLOSED) + summary((1, -15), (0, 1)), 0, 1, _CLOSED),
        # A signal, after an exception that was logged only; an exit code, beside one.
        (raised(1, MILD) + "[default1]:Fatal: 11\n" + summary((0, -15), (1, -11)), 1, -11, "Fatal: 11"),
        (raised(0, MILD) + f"[default1]:{REJECTED}\n" + summary((0, -15), (1, 2)), 1, 2, REJECTED),
        # Of all ranks that end with the same error, the first of a node prints it.
        (f"[default1]:{REJECTED}\n" + summary((0, 2), (1, 2)), 1, 2, REJECTED),
        # torchrun was ended itself; without --tee.
        (f"[rank1]: Traceback (most recent call last):\n[rank1]: {FIVE}\n", 1, None, FIVE),
    ],
)
def test_first_failure(log: str, rank: int, code: int | None, last: str) -> None:
    failure = first_failure(log)
    assert failure is not None
    assert (failure.rank, failure.exit_code, failure.lines[-1]) == (rank, code, last)


def test_an_exception_is_shown_with_the_frames_before_and_without_what_follows() -> None:
    frames = "".join(f'[default1]:  File "f{i}.py", line 1, in f\n' for i in range(20))
    after = "".join(f"[default1]:frame #{i}: c10\n" for i in range(40))
    log = f"[default1]:Traceback (most recent call last):\n{frames}[default1]:ValueError: five\n{after}"
    text = failure_text(log + summary((0, -15), (1, 1)))
    assert text.startswith("rank 1 failed first, with exit code 1:\n")
    assert "ValueError: five" in text
    assert 'File "f19.py"' in text
    assert len(text.splitlines()) <= LAST


def test_a_log_that_shows_no_rank_is_shown_by_its_end() -> None:
    log = "".join(f"line {i}\n" for i in range(40)) + "torchrun: error: unrecognized arguments: --x\n"
    assert first_failure(log) is None
    assert failure_text(log).splitlines()[1:] == log.splitlines()[-LAST:]
    assert "ended by signal 9 (Killed)" in failure_text("[default1]:last\n" + summary((0, -15), (1, -9)))


def test_training_that_fails_shows_the_first_rank_and_keeps_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 raises, rank 0 is ended by torchrun; iterations are seen while the ranks run."""
    reported, log, launcher = tmp_path / "reported", tmp_path / "log", tmp_path / "megatron_wallfacer" / "__main__.py"
    # In the place of the launcher, which would import Megatron: `-m` looks into the working directory first.
    launcher.parent.mkdir()
    launcher.with_name("__init__.py").touch()
    launcher.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    seen: list[Iteration] = []

    def report(iteration: Iteration) -> None:
        seen.append(iteration)
        reported.touch()

    with pytest.raises(WallfacerError) as error:
        train(reported, 2, [], log, report)
    assert seen == [Iteration(1, 5.5, 1.25)]
    first, *lines = str(error.value).splitlines()
    assert first == f"training on 2 ranks ended with exit code 1; see {log}: rank 1 failed first, with exit code 1:"
    assert lines[-1] == "ValueError: tile 5 is wrong"
    assert "raise ValueError" in "".join(lines)
    assert "ChildFailedError" in log.read_text()
    (stderr,) = (tmp_path / "log-ranks").glob("*/attempt_0/1/stderr.log")
    assert "ValueError: tile 5 is wrong" in stderr.read_text()
