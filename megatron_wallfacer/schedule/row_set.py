"""Row sets: which rows of an operand a value holds, from the point of view of one rank."""

from __future__ import annotations

from typing import Literal, NamedTuple


class RowSet(NamedTuple):
    """Rows of one operand at one rank.

    Attributes:
        kind: ``local``: the rank's own shard. ``gathered``: the shards of the other ranks of its team. ``team``: local
            and gathered rows in one block. ``step``: the block of a ring step, received from another rank.
        step: ring step of a received block; 0 for the other kinds, which belong to the first ring step.
    """

    kind: Literal["local", "gathered", "team", "step"]
    step: int = 0

    def __str__(self) -> str:
        return f"step{self.step}" if self.kind == "step" else self.kind


LOCAL, GATHERED, TEAM = RowSet("local"), RowSet("gathered"), RowSet("team")


def received(step: int) -> RowSet:
    """Return the row set of the block that a ring step receives."""
    return RowSet("step", step)
