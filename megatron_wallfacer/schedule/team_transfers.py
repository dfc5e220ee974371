"""Transfers within a team, which gather rows before their use and return the results of gathered rows afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_wallfacer.schedule.head_group import HeadGroup
from megatron_wallfacer.schedule.operands import after, opposite_pairs
from megatron_wallfacer.schedule.ops import GATHERED, LOCAL, TENSORS


class TeamTransfers:
    """Gathers and scatters of one head group."""

    def __init__(self, group: HeadGroup) -> None:
        self.group, self.operands, self.emitter = group, group.operands, group.emitter

    def gather(self, tensors: str, side: str) -> None:
        """Send the local rows to every other rank of the team, and receive the rows of the other ranks."""
        ranks, operands = self.operands.team(side), self.operands
        if len(ranks) > 1 and tensors == "q" and operands.backward and self.group.keep_gathered_q:
            name, chunks = self.emitter.name(GATHERED, "q"), operands.chunks("q", GATHERED)
            self.group.given.append(self.emitter.value(name, TENSORS["q"], chunks, rows=GATHERED))
            return
        local = self.group.tensor_rows(tensors, side, LOCAL)
        self.exchange("gather", tensors, operands.axis(side), local, {peer: operands.shard(peer) for peer in ranks})

    def exchange(self, kind: str, tensors: str, axis: str, source: str, chunks: Mapping[int, tuple[int, ...]]) -> None:
        """Exchange tensors with all other ranks of a team: send ``source``, and receive chunks of each rank.

        ``chunks`` maps each rank of the team to the ids of the chunks that it sends.
        """
        emitter, peers = self.emitter, after(self.operands.rank, tuple(chunks))
        names = {peer: emitter.name(f"from{peer}", tensors) for peer in peers}
        for peer, name in names.items():
            emitter.value(name, TENSORS[tensors], chunks[peer])
        sends = [emitter.message(peer, source, kind, tensors) for peer in peers]
        receives = [emitter.message(peer, name, kind, tensors) for peer, name in names.items()]
        emitter.send_recv(axis, sends, receives)

    def scatter(self, side: str, peers: Sequence[int], source: str | None = None) -> None:
        """Send results of gathered rows back to some ranks, and receive results of local rows from equally many ranks.

        By default ``source`` is the accumulator of gathered rows.
        """
        operands = self.operands
        origins = dict(opposite_pairs(operands.rank, operands.team(side)))
        source = source or self.group.accumulator_name(side, GATHERED)
        into = self.group.accumulator(side, LOCAL)
        ends = [(peer, origins[peer], operands.shard(peer)) for peer in peers]
        self.return_rows("scatter", side, operands.axis(side), source, into, ends, operands.shard(operands.rank))

    def return_rows(
        self,
        kind: str,
        side: str,
        axis: str,
        source: str,
        into: str,
        ends: Sequence[tuple[int, int, Sequence[int]]],
        chunks: Sequence[int],
    ) -> None:
        """Send rows of the value ``source`` to their origin ranks, and receive partial results of local rows.

        ``ends`` has elements (destination, origin, sent chunk ids). For each element this rank sends one message to
        ``destination``, and receives one message from ``origin``. Received messages contain ``chunks``, and are later
        added to the accumulator ``into``.
        """
        emitter, sends, receives = self.emitter, [], []
        for destination, origin, sent in ends:
            arriving = emitter.value(emitter.name(f"{kind}{origin}", side), self.operands.results(side), chunks)
            sends.append(emitter.message(destination, source, kind, side, chunks=sent))
            receives.append(emitter.message(origin, arriving, kind, side))
            self.group.add_arriving(into, arriving)
        emitter.send_recv(axis, sends, receives)
