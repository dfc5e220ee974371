"""Move tensors of one kind to host memory in forward and back to the device in backward."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.offload.copies import Copies
from megatron_wallfacer.offload.host import ALIGNMENT, HostSlots, slot_bytes
from megatron_wallfacer.offload.slots import Key, Slot, SlotPlan, Use


class Spec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Stored(NamedTuple):
    """Tensors of one layer in a slot of host memory. ``issued`` is the handle of the copies to the host."""

    key: Key
    specs: tuple[Spec, ...]
    slot: Slot
    issued: Any


class OffloadQueue:
    """Queue that copies tensors of layers to host memory in forward, and back to the device in backward.

    While layer i+1 runs forward, the tensors of layer i are copied to the host. At the end of layer i+1 the device
    waits for this copy. While backward computes layer i+1, the tensors of layer i are copied to the device. The device
    holds the tensors of at most two layers, or of three layers with pipeline parallelism.

    Args:
        flag: command-line flag that switches the queue on. Error messages contain it.
        plan_of: function that returns the plan of a step, given the number of micro-batches.
        micro_batches: function that returns the number of micro-batches of the next step.
        slots: slots in host memory, allocated for the plan with the most slots.
        copies: object that issues copies.
    """

    def __init__(
        self,
        flag: str,
        plan_of: Callable[[int], SlotPlan],
        micro_batches: Callable[[], int],
        slots: HostSlots,
        copies: Copies,
    ) -> None:
        self._flag, self._plan_of, self._micro_batches = flag, plan_of, micro_batches
        self._slots, self._copies = slots, copies
        #: Handle of the last copies from each slot. The next copy into a slot must run after them.
        self._read: dict[Slot, Any] = {}
        self._stored: dict[Key, Stored] = {}
        self._uses: deque[Use] = deque()
        self._to_load: deque[Key] = deque()
        self._counts: Counter[tuple[int, int]] = Counter()
        self._plan: SlotPlan | None = None
        #: Tensors and handle of the running copies to the host, and of those to the device.
        self._leaving: tuple[tuple[Tensor, ...], Any] | None = None
        self._arriving: tuple[tuple[Tensor, ...], Any] | None = None

    @property
    def waiting(self) -> int:
        """Number of stored (layer, micro-batch) entries that backward has not loaded yet."""
        return len(self._stored)

    def store(self, chunk: int, layer: int, tensors: Sequence[Tensor]) -> Stored:
        """Issue the copy of a layer's tensors to host memory, and return the argument of :meth:`load`.

        Raises:
            WallfacerError: The layers do not run in the planned order, or the tensors are larger than their slot.
        """
        if not self._uses:
            self._begin_step()
        key = Key(chunk, layer, self._counts[chunk, layer])
        self._counts[chunk, layer] += 1
        self._take(Use(True, key))
        assert self._plan is not None
        slot = self._plan.slots[key]
        sources = tuple(tensor.detach().contiguous() for tensor in tensors)
        specs = tuple(Spec(tuple(source.shape), source.dtype) for source in sources)
        pairs = list(zip(self._parts(slot, specs), sources, strict=True))
        issued = self._copies.copy("to host", pairs, self._read.pop(slot, None))
        self._let_go()
        self._leaving = sources, issued
        self._stored[key] = Stored(key, specs, slot, issued)
        self._prefetch()
        return self._stored[key]

    def load(self, stored: Stored) -> tuple[Tensor, ...]:
        """Return a layer's tensors on the device. Kernels launched after this call may read the tensors.

        Raises:
            WallfacerError: The layers do not run in the planned order.
        """
        self._take(Use(False, stored.key))
        self._let_go()
        self._prefetch()
        assert self._arriving is not None
        targets, issued = self._arriving
        self._copies.wait(issued)
        self._arriving = None
        self._read[stored.slot] = issued
        del self._stored[stored.key]
        self._prefetch()
        return targets

    def _begin_step(self) -> None:
        micro_batches = self._micro_batches()
        self._plan = self._plan_of(micro_batches)
        if not all(slot in self._slots for slot in self._plan.slots.values()):
            raise WallfacerError(
                f"{self._flag}: must be left out, because a step of {micro_batches} micro-batches needs more host "
                "memory than --global-batch-size"
            )
        self._uses.extend(self._plan.uses)
        self._to_load.extend(use.key for use in self._plan.uses if not use.stores)
        self._counts.clear()

    def _take(self, use: Use) -> None:
        """Advance to the next event of the plan, and check that it is the given event."""
        expected = self._uses.popleft() if self._uses else None
        if use != expected:
            raise WallfacerError(
                f"{self._flag}: must be left out, because the step has {_text(use)} where Megatron's pipeline schedule "
                f"has {'nothing' if expected is None else _text(expected)}"
            )

    def _parts(self, slot: Slot, specs: Sequence[Spec]) -> list[Tensor]:
        sizes = [torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs]
        if slot_bytes(sizes) > slot.nbytes:
            raise WallfacerError(
                f"{self._flag}: must be left out, because a layer's tensors take {slot_bytes(sizes)} bytes, not the "
                f"{slot.nbytes} of --seq-length and --micro-batch-size"
            )
        memory, start, parts = self._slots[slot], 0, []
        for size, spec in zip(sizes, specs, strict=True):
            parts.append(memory[start : start + size].view(spec.dtype).view(spec.shape))
            start += -(-size // ALIGNMENT) * ALIGNMENT
        return parts

    def _let_go(self) -> None:
        """Free the device tensors of the previous layer after their copy."""
        if self._leaving is not None:
            self._copies.wait(self._leaving[1])
            self._leaving = None

    def _prefetch(self) -> None:
        """Start the next copy to the device, unless one is pending or the next tensors are not on the host yet."""
        if self._arriving is not None or not self._to_load or self._to_load[0] not in self._stored:
            return
        stored = self._stored[self._to_load.popleft()]
        targets = tuple(self._copies.allocate(*spec) for spec in stored.specs)
        pairs = list(zip(targets, self._parts(stored.slot, stored.specs), strict=True))
        self._arriving = targets, self._copies.copy("to device", pairs, stored.issued)


def _text(use: Use) -> str:
    key = use.key
    return (
        f"{'forward' if use.stores else 'backward'} of layer {key.layer + 1} of model chunk {key.chunk + 1} "
        f"for micro-batch {key.micro_batch + 1}"
    )
