"""Tensors come back as they were, copies are issued in time, every copy is waited for, and no slot is used early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.offload.copies import DeferredCopies, Record
from megatron_wallfacer.offload.host import HostSlots
from megatron_wallfacer.offload.order import Pipeline, passes_of_step
from megatron_wallfacer.offload.queue import OffloadQueue, Stored
from megatron_wallfacer.offload.slots import Key, SlotPlan, Use, assign_slots, uses_of_step
from megatron_wallfacer.planning.inventory import PIPELINE_SLOTS, SLOTS

LAYERS, TOKENS = 3, 40
PIPELINES = {
    "no pipeline": Pipeline(),
    "1F1B": Pipeline(2, 0),
    "interleaved, first stage": Pipeline(2, 0, 2),
    "interleaved, last stage": Pipeline(2, 1, 2),
}
MICRO_BATCHES = 4


def plan_of(pipeline: Pipeline, micro_batches: int) -> SlotPlan:
    chunks = range(pipeline.chunks or 1)
    groups = {chunk: [(layer,) for layer in range(LAYERS)] for chunk in chunks}
    nbytes = {(chunk, layer): 512 + 256 for chunk in chunks for layer in range(LAYERS)}
    return assign_slots(uses_of_step(passes_of_step(pipeline, micro_batches), groups), nbytes)


def tensors_of(key: Key) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(TOKENS, 3, generator=generator), torch.randn(TOKENS, generator=generator).bfloat16()


class Step:
    """Runs the events of steps as layers would, and records them among the copies."""

    def __init__(self, pipeline: Pipeline, copies: DeferredCopies | None = None, *, micro_batches: int = 4) -> None:
        self.records: list[Record | Key] = []
        self.plan = plan_of(pipeline, micro_batches)
        self.queue = OffloadQueue(
            "--flag",
            partial(plan_of, pipeline),
            lambda: micro_batches,
            HostSlots(self.plan.slots.values(), pinned=False),
            copies or DeferredCopies(self.records.append),
        )

    def run(self) -> None:
        """One step. Backward compares what it takes.

        Raises:
            AssertionError: a tensor is not what it was.
        """
        stored: dict[Key, Stored] = {}
        for use in self.plan.uses:
            if use.stores:
                stored[use.key] = self.queue.store(use.key.chunk, use.key.layer, tensors_of(use.key))
            else:
                got = self.queue.load(stored.pop(use.key))
                for tensor, expected in zip(got, tensors_of(use.key), strict=True):
                    assert torch.equal(tensor, expected)
                # As a layer does at the end of its backward pass.
                del got, tensor
            self.records.append(use.key)
        assert self.queue.waiting == 0


@pytest.mark.parametrize("name", PIPELINES)
def test_tensors_come_back_in_every_step(name: str) -> None:
    step = Step(PIPELINES[name])
    for _ in range(3):
        step.run()


@pytest.mark.parametrize("name", PIPELINES)
def test_copies_are_in_time_and_waited_for(name: str) -> None:
    step = Step(PIPELINES[name])
    for _ in range(2):
        step.run()
    check_records([record for record in step.records if isinstance(record, Record)])
    uses, loads, done = [*step.plan.uses] * 2, [use.key for use in [*step.plan.uses] * 2 if not use.stores], 0
    for record in step.records:
        if isinstance(record, Key):
            # When a layer is done, its copy to the host was issued.
            done += 1
        elif record.what == "to host":
            assert uses[done].stores
        elif record.what == "to device":
            # The copy of the next layer in backward is issued before that layer takes it: at most one is ahead.
            key, ahead = loads.pop(0), [use.key for use in uses[done:] if not use.stores]
            assert key in ahead[:2]
            assert uses[done] != Use(False, key)


def check_records(records: list[Record]) -> None:
    """Check the order of copies.

    Raises:
        AssertionError: a copy was not waited for, or a slot was used before its last copy had ended.
    """
    copies = {record.number: record for record in records if record.what.startswith("to ")}
    waits = [record.number for record in records if record.what == "wait"]
    assert sorted(set(waits)) == sorted(copies)
    last: dict[int, Record] = {}
    waited: set[int] = set()
    for record in records:
        if record.what == "wait":
            waited.add(record.number)
        elif record.what.startswith("to "):
            previous = last.get(record.addresses[0])
            # In turns: to the host, then from there; each runs after the one before it on the same slot.
            assert record.what == ("to host" if previous is None or previous.what == "to device" else "to device")
            assert record.after == (None if previous is None else previous.number)
            if record.what == "to host" and previous is not None:
                assert previous.number in waited
            last[record.addresses[0]] = record


class Forgetful(DeferredCopies):
    """Does not wait for copies of one direction."""

    def __init__(self, direction: str) -> None:
        super().__init__(self._note)
        self._direction, self._of = direction, {}

    def _note(self, record: Record) -> None:
        self._of[record.number] = record.what if record.what != "wait" else self._of.get(record.number)

    def wait(self, issued: object) -> None:
        if self._of[issued.number] != self._direction:
            super().wait(issued)


@pytest.mark.parametrize("direction", ["to host", "to device"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_removed_wait_fails(name: str, direction: str) -> None:
    with pytest.raises(AssertionError):
        Step(PIPELINES[name], Forgetful(direction)).run()


def test_a_slot_that_is_written_before_its_copy_to_the_device_fails() -> None:
    class Unordered(DeferredCopies):
        def copy(self, direction: str, pairs: list, after: object) -> object:
            issued = super().copy(direction, pairs, None)
            if direction == "to host":
                self._run_until(issued)
            return issued

    step = Step(PIPELINES["no pipeline"], Unordered(), micro_batches=1)
    step.queue._slots = type("OneSlot", (), {"__getitem__": lambda _, slot: memory, "__contains__": lambda *_: True})()
    memory = torch.empty(768, dtype=torch.uint8)
    with pytest.raises(AssertionError):
        step.run()


@pytest.mark.parametrize("name", PIPELINES)
def test_device_buffers_are_as_many_as_the_inventory_counts(name: str) -> None:
    layers = SLOTS if name == "no pipeline" else SLOTS + PIPELINE_SLOTS
    held: list[Callable[[], bool]] = []
    most = 0

    class Counting(DeferredCopies):
        """Counts the tensors that are copied: sources in forward, targets in backward."""

        def copy(self, direction: str, pairs: Sequence[tuple[Tensor, Tensor]], after: object) -> object:
            nonlocal most
            held.extend(torch._C._WeakTensorRef(pair[direction == "to host"]).expired for pair in pairs)
            issued = super().copy(direction, pairs, after)
            most = max(most, sum(not expired() for expired in held))
            return issued

    Step(PIPELINES[name], Counting()).run()
    assert most == 2 * layers  # two tensors of each layer


def test_another_order_is_an_error() -> None:
    step = Step(PIPELINES["no pipeline"])
    step.queue.store(0, 0, tensors_of(Key(0, 0, 0)))
    with pytest.raises(
        WallfacerError, match=r"has forward of layer 3 of model chunk 1 for micro-batch 1 where .* 2 of"
    ):
        step.queue.store(0, 2, tensors_of(Key(0, 2, 0)))


def test_a_tensor_that_is_too_large_is_an_error() -> None:
    step = Step(PIPELINES["no pipeline"])
    with pytest.raises(WallfacerError, match="a layer's tensors take 1024 bytes, not the 768"):
        step.queue.store(0, 0, (torch.zeros(256),))


def test_more_micro_batches_than_there_are_slots_for_is_an_error() -> None:
    step = Step(PIPELINES["1F1B"], micro_batches=1)
    step.queue._micro_batches = lambda: 2
    with pytest.raises(
        WallfacerError, match="a step of 2 micro-batches needs more host memory than --global-batch-size"
    ):
        step.queue.store(0, 0, tensors_of(Key(0, 0, 0)))


def test_a_step_may_have_fewer_micro_batches() -> None:
    step = Step(PIPELINES["1F1B"])
    step.run()
    step.queue._micro_batches, step.plan = (lambda: 2), plan_of(PIPELINES["1F1B"], 2)
    step.run()
