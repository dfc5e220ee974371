"""The steps of a pass over all ranks: what each computes, and what begins to move before that.

A rank's steps are its groups of tiles (``Attend``). A move belongs to the step of the next group of tiles that the rank
that sends it begins, so it is on its way while that step's tiles are computed; what starts after the last tiles is a
step of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_wallfacer.schedule.ops import Attend, Message, Move, Schedule, Start
from megatron_wallfacer.schedule.sides import ALL, OTHERS, OWN, visit_number
from megatron_wallfacer.schedule.volume import STATISTICS, Shape, rows_elements

#: In words, whose rows a value holds that is named so; other names are those of visits.
_ROWS = {OWN: "own", OTHERS: "the team's", ALL: "own and the team's"}

MoveKind = tuple[str, tuple[str, ...]]


class Blocks:
    """Sets of chunks by number, each written into the page once."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, ...], int] = {}

    def number(self, chunks: tuple[int, ...]) -> int:
        """The number of a set."""
        return self._numbers.setdefault(chunks, len(self._numbers))

    @property
    def all(self) -> list[tuple[int, ...]]:
        """The sets, in the order of their numbers."""
        return list(self._numbers)


@dataclass
class Step:
    """What all ranks do in one step.

    Attributes:
        tiles: ``rank, query block, key block, first row, end, first column, end, causal`` of each, one after another.
        moves: by axis and tensors, ``from, to, block`` of each message, one after another.
        words: received by each rank, in units of n*H.
        across: of all words, those that come from another node.
        computes: how many ranks compute whose queries against whose keys.
    """

    tiles: list[int] = field(default_factory=list)
    moves: dict[MoveKind, list[int]] = field(default_factory=lambda: defaultdict(list))
    words: Counter[int] = field(default_factory=Counter)
    across: float = 0.0
    computes: Counter[tuple[str, str]] = field(default_factory=Counter)


def steps(schedules: Sequence[Schedule], nodes: Sequence[int], shape: Shape, blocks: Blocks) -> list[Step]:
    """The steps of one pass.

    Args:
        schedules: of every rank.
        nodes: by rank, its node.
        shape: of a rank's shard, for words.
        blocks: takes up the chunks that are named.
    """
    found: dict[int, Step] = defaultdict(Step)
    for schedule in schedules:
        at = 0
        for op in schedule.ops:
            if isinstance(op, Attend):
                _add_tiles(found[at], schedule, op, blocks)
                at += 1
            elif isinstance(op, Start):
                for message in op.move.sends:
                    _add_message(found[at], schedule, op.move, message, nodes, shape, blocks)
    return [found[index] for index in range(max(found, default=-1) + 1)]


def step_fields(found: Sequence[Step]) -> list[dict[str, Any]]:
    """As written into the page, with the sums up to and with each step."""
    received: Counter[int] = Counter()
    rows = []
    for step in found:
        received.update(step.words)
        rows.append(
            {
                "says": _says(step),
                "tiles": step.tiles,
                "moves": [
                    {"axis": axis, "payload": list(payload), "ends": ends}
                    for (axis, payload), ends in step.moves.items()
                ],
                "words": _rounded(max(step.words.values(), default=0.0)),
                "sum": _rounded(max(received.values(), default=0.0)),
                "all": _rounded(sum(step.words.values())),
                "across": _rounded(step.across),
            }
        )
    return rows


def _add_tiles(step: Step, schedule: Schedule, attend: Attend, blocks: Blocks) -> None:
    q, kv = (blocks.number(schedule.values[names[0]].chunks) for names in (attend.q, attend.kv))
    for tile in attend.tiles:
        step.tiles += [schedule.rank, q, kv, *tile.rows, *tile.cols, int(tile.causal)]
    step.computes[_whose(attend.q[0], "queries"), _whose(attend.kv[0], "keys")] += 1


def _add_message(
    step: Step, schedule: Schedule, move: Move, message: Message, nodes: Sequence[int], shape: Shape, blocks: Blocks
) -> None:
    step.moves[move.axis, move.payload] += [schedule.rank, message.peer, blocks.number(message.chunks)]
    words = sum(
        rows_elements(schedule, shape, tensor, len(message.chunks))
        for tensor in move.payload
        if tensor not in STATISTICS
    )
    step.words[message.peer] += words / shape.unit
    step.across += words / shape.unit * (nodes[schedule.rank] != nodes[message.peer])


def _whose(name: str, rows: str) -> str:
    """In words, whose rows a value holds: its name begins with that."""
    whose = name.split(".", 1)[0]
    if whose in _ROWS:
        return f"{_ROWS[whose]} {rows}"
    return f"the {rows} of visit {visit_number(whose)}"


def _says(step: Step) -> str:
    """One or two sentences."""
    everybody = sum(step.computes.values())
    computes = "; ".join(
        (f"{count} ranks compute " if len(step.computes) > 1 else f"All {everybody} ranks compute ")
        + f"{q} against {k}"
        for (q, k), count in step.computes.most_common(3)
    )
    moves = ", ".join(
        f"{'+'.join(payload)} along {axis} ({len(ends) // 3} messages)" for (axis, payload), ends in step.moves.items()
    )
    tail = "on their way meanwhile" if computes else "on their way"
    sentences = (
        f"{computes}." if computes else "No tiles are left.",
        f"{moves}: {tail}." if moves else "Nothing moves.",
    )
    return " ".join(sentences)


def _rounded(words: float) -> float:
    return round(words, 4)
