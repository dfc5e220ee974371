"""Define one entry of a preset: a flag or an environment variable with its values and its location."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """File and line number of an entry. The file name is empty if the entry was typed on the command line."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "command line"


COMMAND_LINE = Location()
#: Values of CUDA_VISIBLE_DEVICES with which the launcher trains on the CPU.
NO_GPU = ("", "-1", "NoDevFiles")


@dataclass(frozen=True)
class PresetEntry:
    """A flag with its values, or a variable with its value.

    Attributes:
        name: name such as ``--num-layers`` or ``NCCL_DEBUG``.
        values: values as text, an empty tuple for a switch, or None to remove the flag.
        location: file and line of the entry.
    """

    name: str
    values: tuple[str, ...] | None
    location: Location

    @property
    def arguments(self) -> list[str]:
        """Flag and values as arguments of a command; empty for a removed flag."""
        return [] if self.values is None else [self.name, *self.values]
