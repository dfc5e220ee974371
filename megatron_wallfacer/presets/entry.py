"""One line of a preset: a flag or a variable, its words, and where it was written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Where something was written.

    Attributes:
        file: as it is named in messages; empty for the command line.
        line: from 1.
    """

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "command line"


COMMAND_LINE = Origin()


@dataclass(frozen=True)
class Setting:
    """A flag with its words, or a variable with its one.

    Attributes:
        name: ``--num-layers`` or ``NCCL_DEBUG``.
        words: none for a switch; None where a flag is to be left out.
        origin: where.
    """

    name: str
    words: tuple[str, ...] | None
    origin: Origin

    @property
    def typed(self) -> list[str]:
        """As on a command line."""
        return [] if self.words is None else [self.name, *self.words]
