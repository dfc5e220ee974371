"""The emitter, which appends the operations of one head group to a schedule and names values."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.schedule.ops import TENSORS, Concat, Message, Op, RowSet, SendRecv, Transfer, Value

#: Kinds of messages, which have different tags. A pass sends at most one message of a kind between two ranks for each
#: combination of head group, tensor group and ring step.
KINDS = (
    "split",
    "join",
    "gather",
    "entry",
    "regather",
    "block",
    "sum",
    "close",
    "return",
    "scatter",
    "unenter",
    "exit",
)


class OpEmitter:
    """Emitter that appends the operations of one head group to the ``program`` of a rank.

    All head groups of the rank share one ``program`` and one ``values``. ``group`` is the index of the head group, and
    ``head_slice`` the index of its head slice.
    """

    def __init__(self, head_slice: int, group: int, groups: int, program: list[Op], values: dict[str, Value]) -> None:
        self.head_slice, self.group, self.groups = head_slice, group, groups
        self.program, self.values = program, values

    def name(self, label: str | RowSet, tensors: str) -> str:
        """Return a name that is unique in the head group. ``tensors`` names a tensor group, or an operand."""
        return f"{label}.{tensors}.{self.group}"

    def value(
        self,
        name: str,
        payload: tuple[str, ...],
        chunks: Sequence[int],
        *,
        head_slice: int | None = None,
        rows: RowSet | None = None,
    ) -> str:
        """Define a :class:`Value`, and return its name. The default ``head_slice`` is the head group's."""
        head_slice = self.head_slice if head_slice is None else head_slice
        self.values[name] = Value(payload, tuple(sorted(chunks)), head_slice, rows)
        return name

    def concat(self, name: str, sources: Sequence[str], rows: RowSet | None = None) -> str:
        """Concatenate values, unless the result exists already, and return the name of the result."""
        if name not in self.values:
            chunks = [chunk for source in sources for chunk in self.values[source].chunks]
            self.value(name, self.values[sources[0]].payload, chunks, rows=rows)
            self.program.append(Concat(name, tuple(sources)))
        return name

    def message(
        self, peer: int, value: str, kind: str, tensors: str, step: int = 0, chunks: Sequence[int] | None = None
    ) -> Message:
        """Describe a message for its sender or its receiver. By default the message has all rows of ``value``."""
        tag = (step * len(KINDS) + KINDS.index(kind)) * len(TENSORS) + list(TENSORS).index(tensors)
        rows = self.values[value].chunks if chunks is None else tuple(sorted(chunks))
        return Message(peer, value, rows, tag * self.groups + self.group)

    def send_recv(self, axis: str, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Append an operation that starts a transfer along an axis, unless there are no messages."""
        if sends or receives:
            payload = self.values[(receives or sends)[0].value].payload
            self.program.append(SendRecv(Transfer(axis, payload, tuple(sends), tuple(receives))))
