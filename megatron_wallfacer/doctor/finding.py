"""Findings of checks, and how a check runs that may raise an exception itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_wallfacer.errors import WallfacerError

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One row of the report.

    Attributes:
        name: name of the check.
        status: ``problem`` where training would fail or run slowly, ``note`` for other information.
        result: result of the check.
        remedy: command or change that solves the problem; empty for none.
    """

    name: str
    status: Status
    result: str
    remedy: str = ""


#: Function that makes one check. It imports libraries when it is called.
Check = Callable[[], Iterable[Finding]]


def run_check(name: str, check: Check, remedy: str) -> Iterator[Finding]:
    """Return the findings of a check. An exception becomes a problem of one line.

    Args:
        name: name of the check.
        check: function to call.
        remedy: remedy after an exception.
    """
    try:
        yield from check()
    except WallfacerError as error:
        yield Finding(name, "problem", _one_line(error), remedy)
    # A broken library may raise any exception, or exit.
    except (Exception, SystemExit) as error:
        yield Finding(name, "problem", f"{type(error).__name__}: {_one_line(error)}".removesuffix(": "), remedy)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
