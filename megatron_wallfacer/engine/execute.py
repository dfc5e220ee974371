"""Execution of a compiled pass: allocate buffers, create operands as views of the buffers, run the steps in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.compiled import CompiledPass
from megatron_wallfacer.engine.timeline import Observer, no_observer
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.engine.waits.progress import PROGRESS

Tensors = Sequence[Tensor]
#: Results of a pass, and the bytes of the values that it keeps for backward, in the order of the program.
PassResults = tuple[list[Tensor], list[Tensor]]


def execute(
    compiled: CompiledPass, inputs: Tensors, given: Tensors, transfers: Transfers, observer: Observer
) -> PassResults:
    """Run one pass on this rank. The call is collective over the process groups of the grid.

    Args:
        compiled: compiled forward or backward pass.
        inputs: local tensors in the order of the program, with the strides for which the program was lowered.
        given: uint8 tensors with the values that forward kept, in the order of the program.
        transfers: object that counts the received bytes.
        observer: function that returns a context manager around the pass, each operation and each wait.
    """
    results, kept, workspace = allocate(compiled)
    run_steps(compiled, [*inputs, *given, *results, *kept, workspace], observer)
    count_received(compiled, transfers)
    return results, kept


def allocate(compiled: CompiledPass) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Allocate the results of a pass, the bytes of its kept values, and its workspace."""
    device = compiled.device
    results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in compiled.results]
    kept = [torch.empty(nbytes, dtype=torch.uint8, device=device) for nbytes in compiled.kept]
    return results, kept, torch.empty(compiled.program.workspace_bytes, dtype=torch.uint8, device=device)


def run_steps(compiled: CompiledPass, buffers: Tensors, observer: Observer) -> None:
    """Run the steps of a pass on its buffers, in the buffer order of :attr:`CompiledPass.bases`."""
    operands = _operands(compiled, buffers)
    works: list[Any] = [None] * compiled.transfers
    PROGRESS.in_flight = works
    if observer is no_observer:
        for step in compiled.steps:
            step(operands, works)
    else:
        _observed(compiled, operands, works, observer)


def count_received(compiled: CompiledPass, transfers: Transfers) -> None:
    """Count the bytes that one run of a pass receives."""
    for key, nbytes in compiled.received:
        transfers.received[key] += nbytes


def _operands(compiled: CompiledPass, buffers: Tensors) -> list[Any]:
    """Return the tensors of a pass in the order of :class:`Memory`: operands, empty slots, buffers."""
    as_strided = torch.as_strided
    bases = [buffers[number] if dtype is None else buffers[number].view(dtype) for number, dtype in compiled.bases]
    # A local tensor may begin at any offset of its storage.
    starts = [base.storage_offset() for base in bases]
    operands: list[Any] = [None] * (len(compiled.program.operands) + compiled.program.slots)
    for number, base, shape, strides, offset in compiled.operands:
        operands[number] = as_strided(bases[base], shape, strides, starts[base] + offset)
    operands += buffers
    return operands


def _observed(compiled: CompiledPass, operands: list[Any], works: list[Any], observer: Observer) -> None:
    with observer(compiled.label):
        for label, steps in compiled.labelled:
            with observer(label):
                for step in steps:
                    step(operands, works)
