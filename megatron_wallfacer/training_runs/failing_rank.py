"""Which rank failed first, and its last error lines, from the log of torchrun with ``--tee 3``.

torchrun's own summary comes last in a log and has no error of a rank. Where several ranks fail within a second it names
the lowest of them, and ranks that only lost the connection to the first one fail as well.
"""

from __future__ import annotations

import math
import re
import signal
from collections import defaultdict
from dataclasses import dataclass, field

#: Lines that are shown of a rank: of a traceback as many before the exception, and as many from it on; else the last.
FRAMES, MESSAGE, LAST = 6, 6, 15
#: A line as ``--tee`` marks it, as PyTorch marks a traceback, or both.
_RANK_LINE = re.compile(r"(?:\[(?!rank)\w+?(?P<local>\d+)\]:)?(?:\[rank(?P<rank>\d+)\]: ?)?(?P<text>.*)")
_SUMMARY = re.compile(
    r"^ +time +: (\S+)\n +host +: .*\n +rank +: (\d+) \(local_rank: (\d+)\)\n +exitcode +: (-?\d+) ", re.MULTILINE
)
_TRACEBACK = "Traceback (most recent call last)"
#: Errors of a rank whose peer has gone.
_PEER_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|ncclRemoteError|DistNetworkError", re.IGNORECASE
)


@dataclass(frozen=True)
class Failure:
    """How a rank failed.

    Attributes:
        rank: of the whole job.
        exit_code: of its process, negative for a signal; None where torchrun names none.
        lines: its last error lines.
        time: when torchrun saw it end, as text that sorts; empty where it names none.
    """

    rank: int
    exit_code: int | None
    lines: tuple[str, ...]
    time: str = ""

    @property
    def follows(self) -> bool:
        """The rank only lost the connection to another one, or torchrun ended it."""
        return self.exit_code == -signal.SIGTERM or bool(_PEER_LOST.search("\n".join(self.lines)))

    def __str__(self) -> str:
        return "\n".join((f"rank {self.rank} failed first, {_ending(self.exit_code)}:", *self.lines))


@dataclass
class _Output:
    """Lines of one rank.

    Attributes:
        lines: without prefixes.
        places: of each line in the log.
    """

    lines: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @property
    def traceback(self) -> int | None:
        """Index of the last traceback's first line."""
        return next((i for i in reversed(range(len(self.lines))) if _TRACEBACK in self.lines[i]), None)

    @property
    def place(self) -> float:
        """Where the error begins in the log."""
        if self.traceback is not None:
            return self.places[self.traceback]
        return self.places[-1] if self.places else math.inf


def first_failure(log: str) -> Failure | None:
    """Return the first rank that failed; None where the log shows no failing rank.

    Args:
        log: stdout and stderr of torchrun on one node, with ``--tee 3``.
    """
    outputs: defaultdict[int, _Output] = defaultdict(_Output)
    for place, line in enumerate(log.splitlines()):
        found = _RANK_LINE.match(line)
        if found and (rank := found["local"] or found["rank"]):
            output = outputs[int(rank)]
            output.lines.append(found["text"])
            output.places.append(place)
    ends = _SUMMARY.findall(log)
    codes = {int(local): (int(rank), int(code)) for _, rank, local, code in ends}
    times = {int(local): time for time, _, local, _ in ends}
    by_itself = {local for local, (_, code) in codes.items() if code != -signal.SIGTERM}
    failed = by_itself | {local for local, output in outputs.items() if output.traceback is not None}
    if not failed:
        return None

    def order(local: int) -> tuple[bool, bool, float, int]:
        _, code = codes.get(local, (local, None))
        lines = _excerpt(outputs[local], code)
        # A rank that torchrun ended is not the first, unless the others have only lost their peer: its error may take
        # longer to end the process than the news of it.
        return bool(_PEER_LOST.search("\n".join(lines))), code == -signal.SIGTERM, outputs[local].place, local

    local = min(failed, key=order)
    number, code = codes.get(local, (local, None))
    return Failure(number, code, tuple(_excerpt(outputs[local], code)), times.get(local, ""))


def failure_text(log: str) -> str:
    """Return the first failure as text; the last lines of a log that shows none."""
    failure = first_failure(log)
    return "\n".join(("its last lines:", *log.splitlines()[-LAST:])) if failure is None else str(failure)


def _excerpt(output: _Output, code: int | None) -> list[str]:
    """The lines to show: around the exception, or the last ones where no exception ended the process."""
    if output.traceback is None or code not in (1, -signal.SIGTERM, None):
        return [line for line in output.lines if line.strip()][-LAST:]
    lines = output.lines[output.traceback :]
    exception = next((i for i, line in enumerate(lines) if i and line and not line[0].isspace()), len(lines) - 1)
    return lines[max(0, exception - FRAMES) : exception + MESSAGE]


def _ending(code: int | None) -> str:
    if code is None:
        return "and torchrun names no exit code"
    return f"ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit code {code}"
