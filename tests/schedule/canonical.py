"""The canonical form of a schedule: what it does, without the names of operations and values.

Operations are labelled by letters that do not change, values are numbered in the order of their first use. So two
schedules have the same form if and only if they transfer the same tensors between the same ranks, and compute and
accumulate the same tiles, in the same order. ``canonical_digests.json`` has a digest of the forms of every scheme.
``python -m tests.schedule.canonical`` writes the file anew, after a deliberate change of schedules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import product
from pathlib import Path

from megatron_wallfacer.schedule.mask import Mask, chunk_mask_of
from megatron_wallfacer.schedule.ops import (
    Accumulate,
    Attend,
    Concat,
    Message,
    Op,
    PostRecv,
    Schedule,
    SendRecv,
    Transfer,
    View,
    WriteResult,
)
from megatron_wallfacer.schedule.plan import RING_VARIANTS, Plan, RingVariant
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan

DIGESTS = Path(__file__).with_name("canonical_digests.json")
CP_SIZES = (4, 8, 16)
#: Options of schemes that have more than one kind of schedule.
VARIANTS = {
    "ring": ({}, {"bidirectional": True}),
    "team-ring": ({}, {"team_size": 2}, {"team_size": 2, "kv_team_size": 2}, {"head_size": 2, "team_size": 2}),
    "wallfacer": ({}, {"kv_order": "permuted"}),
}
CHUNK_TOKENS = 4
#: A window of one chunk: most chunk pairs are empty, those on the diagonals are partial.
WINDOW = Mask(left=CHUNK_TOKENS)
#: Mask, head groups, whether gathered queries are kept, and the work of a shard, which decides what is merged.
PASSES = (
    (True, 1, False, None),
    (False, 1, False, None),
    (True, 2, True, None),
    (True, 1, True, 0),
    (WINDOW, 2, True, None),
)


def canonical_form(schedule: Schedule) -> str:
    """Return the canonical form, one line per operation."""
    return "\n".join(_Form(schedule).lines())


def digest_keys() -> Iterator[str]:
    """Yield every key of the file of digests: scheme, P, pass and ring variant."""
    for scheme, cp_size, pass_name, variant in product(SCHEMES, CP_SIZES, ("forward", "backward"), RING_VARIANTS):
        yield f"{scheme} P={cp_size} {pass_name} {variant}"


def digest(key: str) -> str:
    """Return the digest of all schedules of a key: of every variant, mask, number of head groups, and rank."""
    scheme, cp_size, pass_name, variant = key.split()
    build = forward_schedule if pass_name == "forward" else backward_schedule
    found = sha256()
    for plan in _plans(scheme, int(cp_size.removeprefix("P=")), variant):
        for mask, groups, keep_gathered_q, work in PASSES:
            options = {"causal": mask}
            if isinstance(mask, Mask):
                options = {"chunk_mask": chunk_mask_of(mask, plan.grid.cp_size, CHUNK_TOKENS)}
            for rank in range(plan.grid.cp_size):
                schedule = build(
                    replace(plan, shard_work=work), rank, groups=groups, keep_gathered_q=keep_gathered_q, **options
                )
                found.update(canonical_form(schedule).encode())
    return found.hexdigest()[:16]


def _plans(scheme: str, cp_size: int, variant: RingVariant) -> Iterator[Plan]:
    for options in VARIANTS.get(scheme, ({},)):
        if options.get("team_size", 1) * options.get("kv_team_size", 1) * options.get("head_size", 1) <= cp_size:
            plan = make_plan(scheme, cp_size, **options)
            yield replace(plan, forward=variant, backward=variant)


class _Form:
    """The canonical form of one schedule, while it is written."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.numbers: dict[str, int] = {}

    def lines(self) -> Iterator[str]:
        schedule = self.schedule
        yield f"rank {schedule.rank}/{schedule.cp_size} slices {schedule.head_slices} backward {schedule.backward:d}"
        yield from map(self._operation, schedule.ops)
        # Named values have no order of their own: they are sorted by name.
        yield f"given {sorted(map(self._value, schedule.given))} kept {sorted(map(self._value, schedule.keeps))}"
        yield from (f"{number} = {self._meaning(name)}" for name, number in self.numbers.items())

    def _operation(self, op: Op) -> str:
        match op:
            case View(into=into):
                return f"L {self._value(into)}"
            case Concat(into=into, sources=sources):
                return f"C {self._value(into)} {self._values(sources)}"
            case PostRecv(transfer=transfer):
                return f"P {self._transfer(transfer)}"
            case SendRecv(transfer=transfer):
                return f"S {self._transfer(transfer)}"
            case Accumulate(source=source, into=into):
                return f"A {self._value(source)} {self._value(into)}"
            case WriteResult(sources=sources):
                return f"W {self._values(sources)}"
        assert isinstance(op, Attend)
        into = self._values([name for name in (op.q_into, op.kv_into) if name is not None])
        tiles = [(*tile.rows, *tile.cols, "causal" * tile.causal, "partial" * tile.partial) for tile in op.tiles]
        return f"T {self._values(op.q)} {self._values(op.kv)} {into} {tiles}"

    def _transfer(self, transfer: Transfer) -> str:
        ends = [[self._message(message) for message in end] for end in (transfer.sends, transfer.receives)]
        return f"{transfer.axis} {list(transfer.payload)} sends {ends[0]} receives {ends[1]}"

    def _message(self, message: Message) -> tuple[object, ...]:
        return message.peer, self._value(message.value), message.chunks, message.tag

    def _values(self, names: Sequence[str]) -> list[int]:
        return [self._value(name) for name in names]

    def _value(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))

    def _meaning(self, name: str) -> str:
        value = self.schedule.values[name]
        return f"{list(value.payload)} chunks {value.chunks} slice {value.head_slice}"


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps({key: digest(key) for key in digest_keys()}, indent=0) + "\n")
