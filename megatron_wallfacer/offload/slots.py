"""Plan the transfers of a step to host memory and back, and assign slots of host memory to the tensors."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_wallfacer.offload.order import Pass

#: Layers of one model chunk, numbered from 0, in groups. Backward recomputes the layers of a group together.
Groups = Sequence[Sequence[int]]


class Key(NamedTuple):
    """Key of tensors that are copied together: those of one layer of a model chunk, for one micro-batch.

    All fields count from 0. Layers are numbered inside their model chunk.
    """

    chunk: int
    layer: int
    micro_batch: int


class Use(NamedTuple):
    """One event of a step: a layer stores its tensors in forward, or loads them in backward."""

    stores: bool
    key: Key


class Slot(NamedTuple):
    """A slot of host memory. ``number`` counts from 0 among the slots of the same size."""

    nbytes: int
    number: int


@dataclass(frozen=True)
class SlotPlan:
    """The order in which layers store and load tensors in a step, and the slot in host memory of each layer's tensors.

    A slot is in use from the copy to the host in forward until the copy to the device in backward.
    """

    uses: tuple[Use, ...]
    slots: Mapping[Key, Slot]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.nbytes for slot in set(self.slots.values()))


def uses_of_step(passes: Sequence[Pass], groups: Mapping[int, Groups]) -> tuple[Use, ...]:
    """Return the order in which layers store tensors in host memory and load them in a step.

    Layers run in ascending order in forward. Backward starts with the last group of layers. Backward recomputes the
    layers of a group in ascending order, and so loads their tensors in that order. For each model chunk, ``groups`` has
    the layers whose tensors are kept in host memory.
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

    The slot that was freed first is reused first, because its copy to the device has most likely ended.

    Args:
        uses: stores and loads of layers' tensors, in the order in which a step runs them.
        nbytes: bytes of the tensors of one layer, by (model chunk, layer).
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
    """Return the first ``count`` layers of a rank, grouped as in ``groups``.

    Tensors of the last layers stay on the device, because backward reads the last layers first.
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
