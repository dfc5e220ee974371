"""Find the rank that failed first, and its last error lines, in the log of torchrun with ``--tee 3``.

torchrun's own summary at the end of a log does not contain a rank's error. If several ranks fail within 1 s, the
summary names the lowest rank. Ranks that lose the connection to the failed rank also fail.
"""

from __future__ import annotations

import math
import re
import signal
from collections import defaultdict
from dataclasses import dataclass, field

#: Lines to show of a rank: before the exception in a traceback, from the exception on, and without a traceback.
FRAMES, MESSAGE, LAST = 6, 6, 15
#: Line with the prefix of ``--tee``, the prefix of PyTorch's tracebacks, or both prefixes.
_RANK_LINE = re.compile(r"(?:\[(?!rank)\w+?(?P<local>\d+)\]:)?(?:\[rank(?P<rank>\d+)\]: ?)?(?P<text>.*)")
_SUMMARY = re.compile(
    r"^ +time +: (\S+)\n +host +: .*\n +rank +: (\d+) \(local_rank: (\d+)\)\n +exitcode +: (-?\d+) ", re.MULTILINE
)
_TRACEBACK = "Traceback (most recent call last)"
#: Errors of a rank whose peer has ended.
_PEER_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|ncclRemoteError|DistNetworkError", re.IGNORECASE
)


@dataclass(frozen=True)
class Failure:
    """Failure of one rank.

    Attributes:
        rank: global rank of the process.
        exit_code: exit code of the process, negative for a signal, or None if torchrun prints no exit code.
        lines: last error lines of the rank.
        time: time at which the process ended, as sortable text; empty if torchrun prints no time.
    """

    rank: int
    exit_code: int | None
    lines: tuple[str, ...]
    time: str = ""

    @property
    def follows(self) -> bool:
        """Whether another rank had failed before. Then torchrun stops this rank, or its connection is lost."""
        return self.exit_code == -signal.SIGTERM or bool(_PEER_LOST.search("\n".join(self.lines)))

    def __str__(self) -> str:
        return "\n".join((f"rank {self.rank} failed first, {_ending(self.exit_code)}:", *self.lines))


@dataclass
class _Output:
    """Output lines of one rank without torchrun's prefixes, and the number of each line in the log."""

    lines: list[str] = field(default_factory=list)
    line_numbers: list[int] = field(default_factory=list)

    @property
    def traceback(self) -> int | None:
        """Index of the first line of the last traceback."""
        return next((i for i in reversed(range(len(self.lines))) if _TRACEBACK in self.lines[i]), None)

    @property
    def error_line(self) -> float:
        """Line number in the log where the error starts."""
        if self.traceback is not None:
            return self.line_numbers[self.traceback]
        return self.line_numbers[-1] if self.line_numbers else math.inf


def first_failure(log: str) -> Failure | None:
    """Return the rank that failed first, or None if the log has no failed rank.

    The log is stdout and stderr of torchrun on one node, with ``--tee 3``.
    """
    outputs: defaultdict[int, _Output] = defaultdict(_Output)
    for number, line in enumerate(log.splitlines()):
        match = _RANK_LINE.match(line)
        if match and (rank := match["local"] or match["rank"]):
            output = outputs[int(rank)]
            output.lines.append(match["text"])
            output.line_numbers.append(number)
    ends = {int(local): (int(rank), int(code), time) for time, rank, local, code in _SUMMARY.findall(log)}
    not_ended_by_torchrun = {local for local, (_, code, _) in ends.items() if code != -signal.SIGTERM}
    failed = not_ended_by_torchrun | {local for local, output in outputs.items() if output.traceback is not None}
    if not failed:
        return None

    def order(local: int) -> tuple[bool, bool, float, int]:
        _, code, _ = ends.get(local, (local, None, ""))
        lines = _excerpt(outputs[local], code)
        # Prefer ranks that torchrun did not end. But a rank that torchrun ended precedes ranks that only lost a
        # connection, because the process of the rank that failed first may end last.
        return bool(_PEER_LOST.search("\n".join(lines))), code == -signal.SIGTERM, outputs[local].error_line, local

    local = min(failed, key=order)
    rank, code, time = ends.get(local, (local, None, ""))
    return Failure(rank, code, tuple(_excerpt(outputs[local], code)), time)


def failure_text(log: str) -> str:
    """Return the first failure in a log as text. If no rank has failed, return the last lines of the log."""
    failure = first_failure(log)
    return "\n".join(("its last lines:", *log.splitlines()[-LAST:])) if failure is None else str(failure)


def _excerpt(output: _Output, code: int | None) -> list[str]:
    """Return the lines around the exception, or the last lines if the process ended without an exception."""
    if output.traceback is None or code not in (1, -signal.SIGTERM, None):
        return [line for line in output.lines if line.strip()][-LAST:]
    lines = output.lines[output.traceback :]
    exception = next((i for i, line in enumerate(lines) if i and line and not line[0].isspace()), len(lines) - 1)
    return lines[max(0, exception - FRAMES) : exception + MESSAGE]


def _ending(code: int | None) -> str:
    if code is None:
        return "exit code unknown"
    return f"ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit code {code}"
