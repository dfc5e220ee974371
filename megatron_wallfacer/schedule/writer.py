"""Writing a schedule: operations in order, names and what they stand for."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.schedule.ops import Assemble, Fold, Load, Message, Move, Op, Start, Store, Value

#: Kinds of messages, told apart by their tags. A pass has at most one of a kind between two ranks for each head group,
#: bundle and visit.
KINDS = ("split", "join", "gather", "entry", "regather", "block", "sum", "close", "home", "scatter", "unenter", "exit")
BUNDLES = ("q", "kv", "dout")


class Writer:
    """The part of a program that belongs to one head group.

    Args:
        part: of the heads; ``group`` of ``groups`` on this rank.
        program: operations so far, of all groups.
        values: what each name stands for, of all groups.
    """

    def __init__(self, part: int, group: int, groups: int, program: list[Op], values: dict[str, Value]) -> None:
        self.part, self.group, self.groups = part, group, groups
        self.program, self.values = program, values

    def name(self, what: str, of: str) -> str:
        """A name of this group's, for a bundle or a side."""
        return f"{what}.{of}.{self.group}"

    def value(self, name: str, payload: tuple[str, ...], chunks: Sequence[int], part: int | None = None) -> str:
        """Say what a name stands for."""
        self.values[name] = Value(payload, tuple(sorted(chunks)), self.part if part is None else part)
        return name

    def load(self, name: str, payload: tuple[str, ...], chunks: Sequence[int], part: int | None = None) -> str:
        """Name some heads of the rank's own tensors."""
        self.program.append(Load(self.value(name, payload, chunks, part)))
        return name

    def assemble(self, name: str, sources: Sequence[str]) -> str:
        """One value out of several; only once, if asked again."""
        if name not in self.values:
            chunks = [chunk for source in sources for chunk in self.values[source].chunks]
            self.value(name, self.values[sources[0]].payload, chunks)
            self.program.append(Assemble(name, tuple(sources)))
        return name

    def fold(self, source: str, into: str) -> None:
        """Merge or add."""
        self.program.append(Fold(source, into))

    def store(self, *sources: str) -> None:
        """Put into the rank's results."""
        self.program.append(Store(sources))

    def message(
        self, peer: int, value: str, kind: str, bundle: str, visit: int = 0, chunks: Sequence[int] | None = None
    ) -> Message:
        """One end of a message; all rows unless chunks are given."""
        tag = ((visit * len(KINDS) + KINDS.index(kind)) * len(BUNDLES) + BUNDLES.index(bundle)) * self.groups
        rows = self.values[value].chunks if chunks is None else tuple(sorted(chunks))
        return Message(peer, value, rows, tag + self.group)

    def start(self, axis: str, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Begin a move of the tensors of what arrives; nothing where there is no message."""
        if sends or receives:
            payload = self.values[(receives or sends)[0].value].payload
            self.program.append(Start(Move(axis, payload, tuple(sends), tuple(receives))))
