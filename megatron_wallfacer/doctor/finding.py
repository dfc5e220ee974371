"""Results of the checks of ``wallfacer doctor``. An exception in a check becomes a result with a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_wallfacer.errors import WallfacerError

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """Result of one check: one row of the table that ``wallfacer doctor`` prints.

    Attributes:
        name: name of the check.
        status: ``problem`` if training would fail or be slow, ``note`` for other information, else ``ok``.
        result: text that says what the check found.
        remedy: command or change that solves the problem, or empty.
    """

    name: str
    status: Status
    result: str
    remedy: str = ""


#: Function of one check. It imports libraries in its body, because an import may fail.
Check = Callable[[], Iterable[Finding]]


def run_check(name: str, check: Check, remedy: str) -> Iterator[Finding]:
    """Yield the findings of a check. If the check raises an exception, yield a finding with status ``problem``."""
    try:
        yield from check()
    except WallfacerError as error:
        yield Finding(name, "problem", _one_line(error), remedy)
    # A broken library may raise any exception, or exit.
    except (Exception, SystemExit) as error:
        yield Finding(name, "problem", f"{type(error).__name__}: {_one_line(error)}".removesuffix(": "), remedy)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
