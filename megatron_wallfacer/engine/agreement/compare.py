"""Comparison of the records of ranks. Each difference is one line of text. No messages are sent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

#: Largest number of characters of a value in a message.
SHOWN = 120


@dataclass(frozen=True)
class Record:
    """The settings of one rank, as texts by name.

    Attributes:
        settings: values that must be equal on all ranks.
        derived: values that are computed from the settings, and must be equal too. They are compared only if all
            settings are equal.
        labels: values whose differences between ranks only cause a warning.
        strict: whether this rank requires a comparison. If no rank does, differences are not reported.
    """

    settings: Mapping[str, str | None]
    derived: Mapping[str, str | None] = field(default_factory=dict)
    labels: Mapping[str, str | None] = field(default_factory=dict)
    strict: bool = True

    def to_text(self) -> str:
        """Return the record as JSON. Equal records have equal texts."""
        return json.dumps(vars(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> Record:
        """Return the record that the JSON text of :meth:`to_text` describes."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison between ranks.

    Attributes:
        errors: one line for each setting that differs.
        warnings: one line for each of :attr:`Record.labels` that differs between ranks.
    """

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_text(self) -> str:
        """Return the verdict as JSON."""
        return json.dumps([self.errors, self.warnings])

    @classmethod
    def from_text(cls, text: str) -> Verdict:
        """Return the verdict that the JSON text of :meth:`to_text` describes."""
        errors, warnings = json.loads(text)
        return cls(tuple(errors), tuple(warnings))


def compare(records: Mapping[int, Record]) -> Verdict:
    """Return the differences between the records of ranks. A record object that ranks share is compared only once."""
    if not any(record.strict for record in records.values()):
        return Verdict()
    ranks: dict[int, tuple[list[int], Record]] = {}
    for rank, record in sorted(records.items()):
        ranks.setdefault(id(record), ([], record))[0].append(rank)
    groups = ranks.values()
    errors = _differences([(members, record.settings) for members, record in groups])
    labels = _differences([(members, record.labels) for members, record in groups])
    warnings = tuple(line for name, line in labels.items() if name not in errors)
    errors = errors or _differences([(members, record.derived) for members, record in groups])
    return Verdict(tuple(errors.values()), warnings)


def difference(name: str, values: Mapping[int, str | None]) -> str | None:
    """Return a line with each different value and the ranks that have it; None if all ranks have the same value.

    The value is None on a rank that does not have the setting ``name``.
    """
    holders: dict[str | None, list[int]] = {}
    for rank, value in sorted(values.items()):
        holders.setdefault(value, []).append(rank)
    if len(holders) < 2:
        return None
    # Of equally large sets of ranks, the set with the lowest rank comes last: its value is probably the intended one.
    ordered = sorted(holders.items(), key=lambda held: (len(held[1]), -held[1][0]))
    parts = [
        f"{ranks_text(ranks)} {'has' if len(ranks) == 1 else 'have'} {_value(name if i == 0 else '', value)}"
        for i, (value, ranks) in enumerate(ordered)
    ]
    return ", ".join(parts)


def ranks_text(ranks: Iterable[int]) -> str:
    """Return ranks as a phrase: ``rank 2``, ``ranks 0, 1, 3``, ``ranks 0-5, 7``."""
    ordered = sorted(ranks)
    runs: list[list[int]] = [[ordered[0]]]
    for before, rank in pairwise(ordered):
        if rank == before + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(parts)}"


def _differences(groups: list[tuple[list[int], Mapping[str, str | None]]]) -> dict[str, str]:
    """Return a message for each setting that differs, by name of the setting. Ranks in one group have equal values."""
    names = dict.fromkeys(name for _, values in groups for name in values)
    found = {
        name: difference(name, {rank: values.get(name) for members, values in groups for rank in members})
        for name in names
    }
    return {name: line for name, line in found.items() if line is not None}


def _value(name: str, value: str | None) -> str:
    """Return a setting as text: ``--x 1``, ``--x`` if the value is empty, ``no --x`` for None. Omit an empty name."""
    if value is None:
        return f"no {name}" if name else "none"
    short = value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
    return f"{name} {short}".strip() or "it"
