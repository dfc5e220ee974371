"""Lower a schedule: give every value its place in memory, and every operation its steps.

Where rows of an accumulator have been written is known here, so the program writes them the first time and merges or
adds after that; rows that nothing reaches are filled before they are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.attn_tile import AttnTile
from megatron_wallfacer.schedule.batches import joined_calls
from megatron_wallfacer.schedule.copies import STRIDED, Pair, permutation, strided
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK, runs, shard_chunks
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.memory import (
    OwnPart,
    aliases,
    own_key,
    own_parts,
    own_views,
    proxy_key,
    result_tensors,
    rows_key,
    value_key,
)
from megatron_wallfacer.schedule.ops import Move, Op, Schedule
from megatron_wallfacer.schedule.places import Places
from megatron_wallfacer.schedule.program import (
    WORKSPACE,
    Add,
    AttendBackward,
    AttendForward,
    Copy,
    Exchange,
    Fill,
    Merge,
    Operand,
    OutProxy,
    Packet,
    Permute,
    Piece,
    PostReceives,
    Program,
    SendReceive,
    Step,
    Transfer,
    Wait,
)
from megatron_wallfacer.schedule.rows import (
    Accumulator,
    Range,
    Rows,
    common_rows,
    contiguous,
    cut,
    cut_heads,
    placed_rows,
)
from megatron_wallfacer.schedule.tiles import Tile
from megatron_wallfacer.schedule.volume import Shape
from megatron_wallfacer.schedule.workspace import aligned

#: Steps of an operation, or of the wait for a move.
Labelled = tuple[Op | Move, tuple[Step, ...]]
_EMPTY = {"lse": float("-inf")}
_PARTIAL_OUT = frozenset(ops.PARTIAL_OUT)


def lower(
    schedule: Schedule,
    shape: Shape,
    mask: Mask,
    strides: Mapping[str, tuple[int, ...]],
    *,
    varlen: bool,
    sinks: bool = False,
    all_to_all: bool = False,
) -> Program:
    """Return the program of one pass.

    Args:
        schedule: the pass of one rank.
        shape: sizes of the rank's shard.
        mask: which pairs of partial tiles are unmasked.
        strides: of the rank's own tensors ``[tokens / P, batch, heads, channels]``, statistics without channels: in
            forward q, k, v; in backward dout, out, lse, delta too, and q, k, v unless they were exchanged along the
            head axis.
        varlen: the kernel takes several documents in one call.
        sinks: sinks are merged into the output after the pass, so it stays in the accumulation dtype.
        all_to_all: the backend of the messages has this collective; it then makes each head exchange.
    """
    return _Lowering(schedule, shape, mask, strides, varlen=varlen, sinks=sinks, all_to_all=all_to_all).run()


class _Lowering:
    """The program so far, and where the rows of each value are."""

    def __init__(
        self,
        schedule: Schedule,
        shape: Shape,
        mask: Mask,
        strides: Mapping[str, tuple[int, ...]],
        *,
        varlen: bool,
        sinks: bool,
        all_to_all: bool,
    ) -> None:
        self.schedule, self.shape, self.mask, self.strides = schedule, shape, mask, strides
        self.varlen, self.all_to_all = varlen, all_to_all
        self.places = Places(schedule, shape, strides, sinks=sinks)
        self.views, self.aliases = own_views(schedule), aliases(schedule)
        self.results = {tensor: self.places.result(tensor) for tensor in result_tensors(schedule)}
        self.values: dict[str, Rows] = {}
        self.sums: dict[str, Accumulator] = {}
        self.proxies: dict[tuple[str, ...], Operand] = {}
        self.packets: dict[str, Operand] = {}
        self.own_parts = {part.start: part for part in own_parts(schedule)}
        self.exchanged = {(part.reader, part.source): part for part in self.own_parts.values()}
        self.transfers: list[Transfer | Exchange] = []
        self.started: dict[int, int] = {}
        self.coming: dict[str, tuple[int, Move]] = {}
        self.stored: Counter[tuple[str, int]] = Counter()
        self.steps: list[Labelled] = []

    def run(self) -> Program:
        schedule = self.schedule
        for name in schedule.given:
            self.values[name] = self.places.packed(name, name, 0)
        for index, op in enumerate(schedule.ops):
            self._wait(ops.reads(op))
            self.steps.append((op, tuple(self._steps(index, op))))
        for op in schedule.ops:
            # Nothing reads what such a move brings, so nothing has waited for it.
            if isinstance(op, ops.Start) and not op.move.receives:
                self.steps.append((op.move, (Wait(self.started[id(op.move)]),)))
        return Program(
            schedule=schedule,
            shape=self.shape,
            inputs=tuple(self.strides),
            given=schedule.given,
            results=tuple(self.results.values()),
            kept=tuple((name, self.places.nbytes(schedule.values[name])) for name in schedule.keeps),
            workspace_bytes=self.places.placement.nbytes,
            operands=self.places.operands,
            transfers=tuple(self.transfers),
            steps=tuple(self.steps),
            received=self._received(),
        )

    def _wait(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.coming:
                number, move = self.coming[name]
                self.steps.append((move, (Wait(number),)))
                for message in move.receives:
                    del self.coming[message.value]

    def _steps(self, index: int, op: Op) -> Iterator[Step]:
        match op:
            case ops.Load(into=name):
                self.values[name] = self.places.own(name)
            case ops.Assemble(into=name, sources=sources):
                yield from self._assemble(index, name, sources)
            case ops.Expect(move=move):
                yield PostReceives(self._number_of(move))
            case ops.Start(move=move):
                yield from self._start(index, move)
            case ops.Attend():
                yield from (self._attend_backward if self.schedule.backward else self._attend_forward)(op)
            case ops.Fold(source=source, into=into):
                yield from self._fold(source, into)
            case ops.Store(sources=sources):
                yield from self._store(index, sources)

    # --- values ---

    def _read(self, name: str) -> tuple[Rows, tuple[Step, ...]]:
        """A value that is complete now, and the steps that make it so: rows that nothing has reached are filled."""
        name = self.aliases.get(name, name)
        if name not in self.sums:
            return self.values[name], ()
        total = self.sums[name]
        empty = [
            (self.places.number(cut(operand, rows)), _EMPTY.get(tensor, 0.0))
            for rows in total.unwritten()
            for tensor, operand in total.rows.tensors.items()
        ]
        return total.rows, (Fill(tuple(empty)),) if empty else ()

    def _sum(self, name: str) -> Accumulator:
        if name not in self.sums:
            rows = self.places.buffer(name)
            self.sums[name] = Accumulator(rows, len(rows.chunks) * self.places.chunk)
        return self.sums[name]

    def _tensors(self, names: Iterable[str]) -> dict[str, Operand]:
        """Tensors of values that have the same rows. Tiles read inputs only, so nothing need be filled."""
        return {
            tensor: operand
            for name in names
            for tensor, operand in self.values[self.aliases.get(name, name)].tensors.items()
        }

    # --- copies and messages ---

    def _assemble(self, index: int, name: str, sources: Sequence[str]) -> Iterator[Step]:
        if name in self.aliases:
            return
        whole = self.values[name] = self.places.buffer(name)
        pairs: list[Pair] = []
        for source in sources:
            rows, fill = self._part(index, source)
            yield from fill
            pairs += self._row_pairs(rows, whole, rows.chunks)
        yield from self._copy(pairs)

    def _part(self, reader: int, name: str) -> tuple[Rows, tuple[Step, ...]]:
        """What an operation reads of a value: of the source of a head exchange, the part that stays on the rank."""
        part = self.exchanged.get((reader, name))
        return self._read(name) if part is None else (self._own_part(part, "received"), ())

    def _own_part(self, part: OwnPart, end: str) -> Rows:
        mine = shard_chunks(self.schedule.rank, self.schedule.cp_size)
        return self.places.placed(part.source, own_key(part.start, end), mine)

    def _row_pairs(self, source: Rows, into: Rows, chunks: Iterable[int]) -> list[Pair]:
        """(into, source) of some chunks that both have."""
        return [
            (cut(into.tensors[tensor], self.places.rows(here)), cut(operand, self.places.rows(there)))
            for there, here in common_rows(source.chunks, into.chunks, chunks)
            for tensor, operand in source.tensors.items()
        ]

    def _copy(self, pairs: Sequence[Pair]) -> Iterator[Step]:
        """One step for some copies: strided pairs where they are few, else a permutation where they are one."""
        few = strided(pairs)
        if len(few) > STRIDED and (found := permutation(pairs, self.places.itemsize, self.shape.accumulate_itemsize)):
            yield Permute(self.places.number(found.into), self.places.number(found.source), found.index)
        elif few:
            yield Copy(self.places.numbers_of(few))

    def _number_of(self, move: Move) -> int:
        """The number of a move's transfer; its receives get their buffers when it is first named."""
        if id(move) not in self.started:
            self.started[id(move)] = len(self.transfers)
            self.transfers.append(Transfer(move.channel, (), ()))
            for message in move.receives:
                self.values[message.value] = self.places.buffer(message.value)
        return self.started[id(move)]

    def _start(self, index: int, move: Move) -> Iterator[Step]:
        packets, pairs = [], []
        for position, message in enumerate(move.sends):
            rows, fill = self._read(message.value)
            yield from fill
            packet, copied = self._packet(rows, message, rows_key(index, position))
            packets.append(packet)
            pairs += copied
        part = self.own_parts.get(index)
        if part is not None:
            into = self._own_part(part, "sent")
            pairs += self._row_pairs(self._read(part.source)[0], into, into.chunks)
        yield from self._copy(pairs)
        number = self._number_of(move)
        if part is not None and self.all_to_all:
            self.transfers[number] = self._exchange(move, part, packets)
        else:
            if part is not None:
                yield Copy(
                    self.places.numbers_of([(self._own_packet(part, "received"), self._own_packet(part, "sent"))])
                )
            ends = self._ends(move.sends, packets), self._ends(move.receives, self._arriving(move))
            self.transfers[number] = Transfer(move.channel, *ends, move.payload)
        self.coming |= {message.value: (number, move) for message in move.receives}
        yield SendReceive(number)

    def _exchange(self, move: Move, part: OwnPart, packets: Sequence[Operand]) -> Exchange:
        """An all-to-all in place of messages: all that is sent lies side by side, and all that is received."""
        ranks = sorted([self.schedule.rank, *(message.peer for message in move.sends)])
        regions = []
        for end, others in (("sent", packets), ("received", self._arriving(move))):
            peers = (message.peer for message in (move.sends if end == "sent" else move.receives))
            parts = {self.schedule.rank: self._own_packet(part, end), **dict(zip(peers, others, strict=True))}
            (length,), first = parts[ranks[0]].shape, parts[ranks[0]].offset
            length = aligned(length)
            assert [parts[rank].offset for rank in ranks] == [first + length * place for place in range(len(ranks))]
            regions.append(self.places.number(Operand(WORKSPACE, "bytes", (length * len(ranks),), (1,), first)))
        return Exchange(move.channel, tuple(ranks), *regions, move.payload)

    def _own_packet(self, part: OwnPart, end: str) -> Operand:
        packet = self._own_part(part, end).packet
        assert packet is not None
        return packet

    def _arriving(self, move: Move) -> list[Operand]:
        """The bytes of what a move brings."""
        return [packet for message in move.receives if (packet := self.values[message.value].packet) is not None]

    def _ends(self, messages: Sequence[ops.Message], packets: Sequence[Operand]) -> tuple[Packet, ...]:
        return tuple(
            Packet(message.peer, self.places.number(packet), message.tag)
            for message, packet in zip(messages, packets, strict=True)
        )

    def _packet(self, rows: Rows, message: ops.Message, key: object) -> tuple[Operand, list[Pair]]:
        """The bytes of a message, and what is copied for it: nothing, if it is a whole buffer or was copied before."""
        name = self.aliases.get(message.value, message.value)
        if message.chunks == rows.chunks:
            if rows.packet is not None:
                return rows.packet, []
            if name in self.packets:
                return self.packets[name], []
            copy = self.places.placed(name, value_key(name))
            assert copy.packet is not None
            self.packets[name] = copy.packet
        else:
            copy = self.places.placed(name, key, message.chunks)
        assert copy.packet is not None
        return copy.packet, self._row_pairs(rows, copy, message.chunks)

    def _received(self) -> Counter[tuple[str, str]]:
        found: Counter[tuple[str, str]] = Counter()
        for move in self.schedule.moves:
            for message in move.receives:
                for tensor, operand in self.values[message.value].tensors.items():
                    found[move.axis, tensor] += self.shape.itemsize_of(tensor) * prod(operand.shape)
        return found

    # --- tiles and sums ---

    def _attend_forward(self, op: ops.Attend) -> Iterator[Step]:
        q, kv, total = self._tensors(op.q), self._tensors(op.kv), self._sum(op.q_into)
        for tile in self._tiles(op):
            yield AttendForward(
                self.places.number(cut(q["q"], tile.rows)),
                self.places.number(cut(kv["k"], tile.cols)),
                self.places.number(cut(kv["v"], tile.cols)),
                tile,
                self._pieces(total, self._chunks(op.q), tile.rows),
            )

    def _attend_backward(self, op: ops.Attend) -> Iterator[Step]:
        q, kv = self._tensors(op.q), self._tensors(op.kv)
        assert op.kv_into is not None
        q_total, kv_total = self._sum(op.q_into), self._sum(op.kv_into)
        out, made = self._out(op.q, q)
        yield from made
        q = q | {"out": out}
        for tile in self._tiles(op):
            rows = {name: self.places.number(cut(q[name], tile.rows)) for name in ("dout", "q", "out", "lse")}
            cols = {name: self.places.number(cut(kv[name], tile.cols)) for name in ("k", "v")}
            q_pieces = self._pieces(q_total, self._chunks(op.q), tile.rows)
            kv_pieces = self._pieces(kv_total, self._chunks(op.kv), tile.cols)
            yield AttendBackward(**rows, **cols, tile=tile, q_pieces=q_pieces, kv_pieces=kv_pieces)

    def _out(self, names: tuple[str, ...], q: Mapping[str, Operand]) -> tuple[Operand, tuple[Step, ...]]:
        """The output of a query block: of own rows it is there, for received rows a proxy is made once."""
        if self.views.issuperset(names):
            shape = self.places.shape_of("out", CHUNKS_PER_RANK, None)
            whole = Operand("out", "own", shape, self.strides["out"], 0)
            return cut_heads(whole, self.places.heads("out", self.schedule.values[names[0]].part)), ()
        if names in self.proxies:
            return self.proxies[names], ()
        shape = q["dout"].shape
        offset = self.places.placement.offsets[proxy_key(names)] // self.shape.itemsize
        proxy = self.proxies[names] = Operand(WORKSPACE, "input", shape, contiguous(shape), offset)
        return proxy, (OutProxy(*map(self.places.number, (q["dout"], q["delta"], proxy))),)

    def _tiles(self, op: ops.Attend) -> Iterator[AttnTile]:
        """Kernel calls of an operation, rows and columns counted in its two blocks."""
        for tile in op.tiles:
            if not tile.masked:
                yield AttnTile(self.places.rows(tile.rows), self.places.rows(tile.cols), causal=tile.causal)
                continue
            first_row, first_col = tile.rows[0] * self.places.chunk, tile.cols[0] * self.places.chunk
            for rows, cols, *kind in self._calls(op, tile):
                yield AttnTile(_moved(rows, first_row), _moved(cols, first_col), *kind)

    def _calls(self, op: ops.Attend, tile: Tile) -> tuple[AttnTile, ...]:
        blocks = self._chunks(op.q)[slice(*tile.rows)], self._chunks(op.kv)[slice(*tile.cols)]
        calls = joined_calls if self.varlen and self.shape.batch == 1 else Mask.calls
        return calls(self.mask, *blocks, self.schedule.cp_size, self.places.chunk)

    def _chunks(self, names: Sequence[str]) -> tuple[int, ...]:
        return self.schedule.values[names[0]].chunks

    def _pieces(self, total: Accumulator, block: Sequence[int], rows: Range) -> tuple[Piece, ...]:
        """Where a kernel's result for some rows of a block goes. The accumulator has all rows of the block, or more."""
        parts = [
            (_moved(part, here[0] - there[0]), part, held)
            for here, there in placed_rows(rows, block, total.rows.chunks, self.places.chunk)
            for part, held in total.write(there)
        ]
        tensors = total.rows.tensors
        # In the order of the kernel's results.
        names = ops.PARTIAL_OUT if _PARTIAL_OUT.issuperset(tensors) else tuple(sorted(tensors))
        return tuple(
            Piece(
                None if len(parts) == 1 else _moved(here, -rows[0]),
                tuple(self.places.number(cut(tensors[name], part)) for name in names),
                held,
            )
            for here, part, held in parts
        )

    def _fold(self, source: str, into: str) -> Iterator[Step]:
        """Merge or add the rows that both have."""
        part, fill = self._read(source)
        yield from fill
        total = self._sum(into)
        copies: list[tuple[int, int]] = []
        merges: list[tuple[int, int, int, int]] = []
        adds: list[tuple[int, int]] = []
        both = sorted(set(part.chunks) & set(total.rows.chunks))
        for there, here in common_rows(part.chunks, total.rows.chunks, both):
            start, ahead = self.places.rows(here)[0], self.places.rows(there)[0]
            for rows, held in total.write(self.places.rows(here)):
                from_rows = _moved(rows, ahead - start)
                pair = {
                    name: (
                        self.places.number(cut(operand, rows)),
                        self.places.number(cut(part.tensors[name], from_rows)),
                    )
                    for name, operand in total.rows.tensors.items()
                }
                if not held:
                    copies += pair.values()
                elif "lse" in pair:
                    (out, part_out), (lse, part_lse) = pair["out"], pair["lse"]
                    merges.append((out, lse, part_out, part_lse))
                else:
                    adds += pair.values()
        yield from _unless_empty(Copy(tuple(copies)), Merge(tuple(merges)), Add(tuple(adds)))

    def _store(self, index: int, sources: Sequence[str]) -> Iterator[Step]:
        """Put the rank's own chunks of finished values into its results."""
        # Parts that share kv heads have the same heads: the first is stored, the others are added, one in each list.
        lists: list[list[Pair]] = []
        for source in sources:
            rows, fill = self._part(index, source)
            yield from fill
            part = self.schedule.values[source].part
            for tensor, operand in rows.tensors.items():
                heads = self.places.heads(tensor, part)
                number = self.stored[tensor, heads.start]
                self.stored[tensor, heads.start] += 1
                lists += [[] for _ in range(number + 1 - len(lists))]
                lists[number] += self._own_pairs(rows.chunks, operand, tensor, heads)
        for number, pairs in enumerate(lists):
            if pairs:
                numbers = self.places.numbers_of(strided(pairs))
                yield Add(numbers) if number else Copy(numbers)

    def _own_pairs(self, chunks: Sequence[int], operand: Operand, tensor: str, heads: range) -> Iterator[Pair]:
        """(into, source) of the rank's own chunks of a finished tensor."""
        shape, at = self.results[tensor].shape, 0
        result = cut_heads(Operand(tensor, "own", shape, contiguous(shape), 0), heads)
        for mine in runs(shard_chunks(self.schedule.rank, self.schedule.cp_size), chunks):
            first, end = self.places.rows(mine)
            yield cut(result, (at, at + end - first)), cut(operand, (first, end))
            at += end - first


def _unless_empty(*steps: Copy | Merge | Add) -> Iterator[Step]:
    return (step for step in steps if (step.parts if isinstance(step, Merge) else step.pairs))


def _moved(rows: Range, by: int) -> Range:
    return rows[0] + by, rows[1] + by
