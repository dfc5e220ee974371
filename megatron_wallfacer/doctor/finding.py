"""What a check says, and how a check that fails itself is told from one that finds something."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_wallfacer.errors import WallfacerError

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: of what was looked at.
        status: ``problem`` is what training would stumble over; ``note`` is worth knowing.
        found: what is there.
        remedy: what to do; empty where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


#: Looks at one thing; what it needs is imported when it is called.
Check = Callable[[], Iterable[Finding]]


def examined(name: str, check: Check, remedy: str) -> Iterator[Finding]:
    """What a check finds; whatever it raises is a problem in one line.

    Args:
        name: of the problem then.
        check: to be run.
        remedy: of the problem then.
    """
    try:
        yield from check()
    except WallfacerError as error:
        yield Finding(name, "problem", _one_line(error), remedy)
    # Libraries that are broken raise what they like, and some end the process.
    except (Exception, SystemExit) as error:
        yield Finding(name, "problem", f"{type(error).__name__}: {_one_line(error)}".removesuffix(": "), remedy)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
