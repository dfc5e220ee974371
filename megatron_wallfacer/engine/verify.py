"""A verified pass: every message is compared with its source, and all ranks stop where one differs.

The same compiled pass runs. Before its first message the ranks compare what they are about to do, and whether their own
tensors are finite. A checksum is taken of the source of what a rank sends, and of what it receives as soon as it has
arrived. After the last step the ranks exchange and compare them. Nothing waits for a GPU but the two comparisons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron_wallfacer.engine.checksum import checksum
from megatron_wallfacer.engine.compiled import CompiledPass
from megatron_wallfacer.engine.execute import allocate, count_received, run_steps
from megatron_wallfacer.engine.failures import pass_name
from megatron_wallfacer.engine.timeline import Observer, Pass, combined, no_observer
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.engine.verify_exchange import Sum, compare_passes, compare_sums
from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.schedule.messages import MessageTensor, TransferTensors, message_tensors
from megatron_wallfacer.schedule.ops import Op, SendRecv, Transfer
from megatron_wallfacer.schedule.program import WORKSPACE, Operand, Program

if TYPE_CHECKING:
    from megatron_wallfacer.engine.call import Call

#: The rank's own tensors that a model makes; out, lse and delta come from the engine, and lse may be infinite.
_GIVEN = ("q", "k", "v", "dout")
_tensors: WeakKeyDictionary[CompiledPass, dict[int, TransferTensors]] = WeakKeyDictionary()


class VerifiedRun:
    """Runs the passes of a call as :func:`megatron_wallfacer.engine.execute.execute` does, verified.

    Args:
        call: the call of attention.
    """

    def __init__(self, call: Call) -> None:
        self._plan, self._mask, self._layer = call.plan, call.mask, call.layer

    def __call__(
        self,
        compiled: CompiledPass,
        inputs: Sequence[Tensor],
        given: Sequence[Tensor],
        transfers: Transfers,
        observer: Observer,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run one pass; arguments and result are those of ``execute``. Collective over the context-parallel group.

        Raises:
            WallfacerError: on every rank of the context-parallel group, because ranks differ in what they run, a tensor
                of one is not finite, or what one received is not what was sent.
        """
        groups, program = transfers.groups, compiled.program
        where = pass_name(compiled.label.name, self._layer)
        own = {name: x for name, x in zip(program.inputs, inputs, strict=True) if name in _GIVEN}
        described = {
            "pass": compiled.label.name,
            "layer": self._layer,
            "plan": self._plan,
            "mask": self._mask,
            "shape": (program.shape, inputs[0].dtype),
        }
        compare_passes(groups, where, described, own, compiled.device)
        results, kept, workspace = allocate(compiled)
        sums = _Checksums(compiled, [*inputs, *given, *results, *kept, workspace])
        run_steps(compiled, sums.buffers, sums if observer is no_observer else combined([sums, observer]))
        compare_sums(groups, where, sums.sent, sums.received, compiled.device)
        count_received(compiled, transfers)
        return results, kept


class _Checksums:
    """An observer that takes checksums of what is sent, and of what has arrived.

    Attributes:
        buffers: of the pass.
        sent, received: the checksums so far.
    """

    def __init__(self, compiled: CompiledPass, buffers: Sequence[Tensor]) -> None:
        program = compiled.program
        inputs = dict(zip(program.inputs, buffers, strict=False))
        self.buffers, self.sent, self.received = list(buffers), list[Sum](), list[Sum]()
        self._numbers = {name: number for number, name in enumerate(_names(program))}
        dtype = next(x.dtype for name, x in inputs.items() if name in ("q", "out"))
        self._dtypes = {"input": dtype, "wide": accumulation_dtype(dtype)}
        if compiled not in _tensors:
            _tensors[compiled] = message_tensors(program, {name: x.stride() for name, x in inputs.items()})
        self._tensors: Mapping[int, TransferTensors] = _tensors[compiled]

    @contextmanager
    def __call__(self, what: Pass | Op | Transfer) -> Iterator[None]:
        """Take the checksums of a transfer once it has started, or has been waited for."""
        yield
        if isinstance(what, SendRecv):
            # What is on its way does not change, so its source is as it was before it was packed.
            self.sent += map(self._sum, self._tensors[id(what.transfer)].sends)
        elif isinstance(what, Transfer):
            self.received += map(self._sum, self._tensors[id(what)].receives)

    def _sum(self, tensor: MessageTensor) -> Sum:
        return tensor, checksum([self._view(piece) for piece in tensor.pieces])

    def _view(self, operand: Operand) -> Tensor:
        base = self.buffers[self._numbers[operand.buffer]]
        base = base.view(self._dtypes[operand.view]) if operand.view in self._dtypes else base
        return torch.as_strided(base, operand.shape, operand.strides, base.storage_offset() + operand.offset)


def _names(program: Program) -> tuple[str, ...]:
    """Names of the buffers of a pass in their order."""
    results = (result.name for result in program.results)
    return (*program.inputs, *program.given, *results, *(name for name, _ in program.kept), WORKSPACE)
