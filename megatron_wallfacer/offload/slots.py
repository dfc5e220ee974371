"""Which tensors of a step go to host memory, in which order they come back, and the slots that hold them meanwhile."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_wallfacer.offload.order import Pass

#: Layers of one model chunk, from 0, in the groups that backward recomputes together.
Groups = Sequence[Sequence[int]]


class Key(NamedTuple):
    """What is copied: tensors of one layer and one micro-batch.

    Attributes:
        chunk: number of the model chunk on its rank, from 0.
        layer: number of the layer in its chunk, from 0.
        micro_batch: number of the micro-batch in the step, from 0.
    """

    chunk: int
    layer: int
    micro_batch: int


class Use(NamedTuple):
    """One event of a step: a layer hands its tensors over in forward, or takes them in backward.

    Attributes:
        stores: True in forward.
        key: what is handed over or taken.
    """

    stores: bool
    key: Key


class Slot(NamedTuple):
    """A part of host memory.

    Attributes:
        nbytes: its size.
        number: its number among the slots of this size, from 0.
    """

    nbytes: int
    number: int


@dataclass(frozen=True)
class SlotPlan:
    """The events of a step, and a slot for each tensor between its two events.

    Attributes:
        uses: events in their order.
        slots: slot by key. No two keys that are in host memory at the same time have the same one.
    """

    uses: tuple[Use, ...]
    slots: Mapping[Key, Slot]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.nbytes for slot in set(self.slots.values()))


def uses_of_step(passes: Sequence[Pass], groups: Mapping[int, Groups]) -> tuple[Use, ...]:
    """Return the events of a step.

    Layers run in ascending order in forward. In backward the last group comes first; its layers are recomputed, and so
    take their tensors, in ascending order.

    Args:
        passes: passes of the step, in their order.
        groups: by chunk, layers whose tensors are in host memory.
    """
    uses = []
    for step in passes:
        of_chunk = groups.get(step.chunk, ())
        ordered = reversed(of_chunk) if step.backward else of_chunk
        layers = [layer for group in ordered for layer in group]
        uses += [Use(not step.backward, Key(step.chunk, layer, step.micro_batch)) for layer in layers]
    return tuple(uses)


def assign_slots(uses: Sequence[Use], nbytes: Mapping[tuple[int, int], int]) -> SlotPlan:
    """Return the plan with the fewest slots of each size.

    The slot that became free first is used again first: its copy to the device has most likely ended.

    Args:
        uses: events of a step.
        nbytes: bytes of a slot by (chunk, layer).
    """
    free: defaultdict[int, deque[Slot]] = defaultdict(deque)
    made: defaultdict[int, int] = defaultdict(int)
    slots: dict[Key, Slot] = {}
    for stores, key in uses:
        size = nbytes[key.chunk, key.layer]
        if not stores:
            free[size].append(slots[key])
        elif free[size]:
            slots[key] = free[size].popleft()
        else:
            slots[key] = Slot(size, made[size])
            made[size] += 1
    return SlotPlan(tuple(uses), slots)


def first_layers(groups: Mapping[int, Groups], count: int) -> dict[int, Groups]:
    """Return the first ``count`` layers of a rank, all chunks counted together, in their groups.

    Backward reads the last layers first, so these are the ones that stay on the device.

    Args:
        groups: by chunk, all layers whose tensors could be in host memory.
        count: number of layers.
    """
    chosen: dict[int, Groups] = {}
    for chunk in sorted(groups):
        kept = []
        for group in groups[chunk]:
            layers = tuple(group[:count])
            count -= len(layers)
            kept += [layers] if layers else []
        chosen[chunk] = tuple(kept)
    return chosen
