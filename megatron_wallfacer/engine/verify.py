"""Passes with verification: every message is compared with its source, and all ranks raise an error if one differs.

A pass with verification runs the same steps as any other pass. Before the first message the ranks compare their
arguments, and check that their local tensors are finite. Each rank computes a checksum of each tensor that it sends,
and of each tensor that it receives. After the last step the ranks compare the checksums. Only the comparisons of
arguments and of checksums synchronize the host with the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron_wallfacer.engine.compiled import CompiledPass
from megatron_wallfacer.engine.execute import PassResults, Tensors, allocate, count_received, run_steps
from megatron_wallfacer.engine.failures import pass_name
from megatron_wallfacer.engine.timeline import Observer, Pass, combined, no_observer
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.engine.verify_exchange import Sum, compare_passes, compare_sums
from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.schedule.messages import MessageTensor, TransferTensors, message_tensors
from megatron_wallfacer.schedule.ops import Op, SendRecv, Transfer
from megatron_wallfacer.schedule.program import Operand

if TYPE_CHECKING:
    from megatron_wallfacer.engine.call import Call

#: Local tensors that must be finite. The engine computes out, lse and delta itself, and lse may be infinite.
_GIVEN = ("q", "k", "v", "dout")
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
#: Largest number of elements that a checksum converts to 64 bits at a time: 32 MiB.
_ELEMENTS = 2**22
_SEEDS = {"row": 1, "place": 2}
_tensors: WeakKeyDictionary[CompiledPass, dict[int, TransferTensors]] = WeakKeyDictionary()


class VerifiedRun:
    """A function that runs a pass like :func:`megatron_wallfacer.engine.execute.execute`, and verifies all messages."""

    def __init__(self, call: Call) -> None:
        self._plan, self._mask, self._layer = call.plan, call.mask, call.layer

    def __call__(
        self, compiled: CompiledPass, inputs: Tensors, given: Tensors, transfers: Transfers, observer: Observer
    ) -> PassResults:
        """Run one pass like ``execute``. Compare arguments between ranks, and received messages with sent messages.

        The call is collective over the context-parallel group.

        Raises:
            WallfacerError: Ranks differ in their arguments, a tensor of one rank is not finite, or a received message
                differs from the sent message. Every rank of the context-parallel group raises the error.
        """
        groups, program = transfers.groups, compiled.program
        where = pass_name(compiled.label.name, self._layer)
        local = {name: x for name, x in zip(program.inputs, inputs, strict=True) if name in _GIVEN}
        described = {
            "pass": compiled.label.name,
            "layer": self._layer,
            "plan": self._plan,
            "mask": self._mask,
            "shape": (program.shape, inputs[0].dtype),
        }
        compare_passes(groups, where, described, local, compiled.device)
        results, kept, workspace = allocate(compiled)
        sums = _Checksums(compiled, [*inputs, *given, *results, *kept, workspace])
        run_steps(compiled, sums.buffers, sums if observer is no_observer else combined([sums, observer]))
        compare_sums(groups, where, sums.sent, sums.received, compiled.device)
        count_received(compiled, transfers)
        return results, kept


class _Checksums:
    def __init__(self, compiled: CompiledPass, buffers: Tensors) -> None:
        program = compiled.program
        inputs = dict(zip(program.inputs, buffers, strict=False))
        self.buffers, self.sent, self.received = list(buffers), list[Sum](), list[Sum]()
        self._numbers = {name: number for number, name in enumerate(program.buffers)}
        dtype = next(x.dtype for name, x in inputs.items() if name in ("q", "out"))
        self._dtypes = {"input": dtype, "wide": accumulation_dtype(dtype)}
        if compiled not in _tensors:
            _tensors[compiled] = message_tensors(program, {name: x.stride() for name, x in inputs.items()})
        self._tensors: Mapping[int, TransferTensors] = _tensors[compiled]

    @contextmanager
    def __call__(self, what: Pass | Op | Transfer) -> Iterator[None]:
        """Compute checksums: of sent tensors when a transfer has started, and of received tensors when it has ended."""
        yield
        if isinstance(what, SendRecv):
            # Rows in flight do not change, so the source still equals the message.
            self.sent += map(self._sum, self._tensors[id(what.transfer)].sends)
        elif isinstance(what, Transfer):
            self.received += map(self._sum, self._tensors[id(what)].receives)

    def _sum(self, tensor: MessageTensor) -> Sum:
        return tensor, checksum([self._view(piece) for piece in tensor.pieces])

    def _view(self, operand: Operand) -> Tensor:
        base = self.buffers[self._numbers[operand.buffer]]
        base = base.view(self._dtypes[operand.view]) if operand.view in self._dtypes else base
        return torch.as_strided(base, operand.shape, operand.strides, base.storage_offset() + operand.offset)


def checksum(pieces: Tensors) -> Tensor:
    """Return the checksum of consecutive rows as an int64 scalar on their device, without waiting for the device.

    Each element is read as an integer, and multiplied by an odd number that depends on the place in the row. The sum of
    these products is the sum of the row. Its bits are mixed, and it is multiplied by an odd number that depends on the
    row. The checksum is the total over all rows, modulo 2^64. A single flipped bit always changes the checksum. Several
    flipped bits leave the checksum unchanged with a probability near 2^-64.

    Args:
        pieces: tensors ``[rows, ...]`` with any strides, whose shapes are equal except for the number of rows.
    """
    device, first = pieces[0].device, 0
    total = torch.zeros((), dtype=torch.int64, device=device)
    places = _odd("place", prod(pieces[0].shape[1:]), device)
    rows = _odd("row", sum(len(piece) for piece in pieces), device)
    for piece in pieces:
        step = max(1, _ELEMENTS // max(1, places.numel()))
        for some in piece.split(step):
            integers = some.reshape(len(some), -1).view(_INTEGERS[some.element_size()])
            sums = torch.mul(integers, places).sum(-1)
            # Without the mixing, changes of several rows could cancel if they are multiples of each other.
            sums ^= (sums >> 32) & 0xFFFFFFFF
            total += (sums * rows[first : first + len(some)]).sum()
            first += len(some)
    return total


@lru_cache(maxsize=64)
def _odd(kind: str, length: int, device: torch.device) -> Tensor:
    """Return pseudo-random odd integers that are equal on all ranks, int64 ``[length]``."""
    generator = torch.Generator().manual_seed(_SEEDS[kind])
    numbers = torch.randint(-(2**62), 2**62, (length,), generator=generator, dtype=torch.int64)
    return ((numbers << 1) | 1).to(device)
