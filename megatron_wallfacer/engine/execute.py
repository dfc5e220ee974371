"""Run a compiled pass: allocate its buffers, make its operands, run its steps in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.compiled import CompiledPass
from megatron_wallfacer.engine.timeline import Recorder, nothing
from megatron_wallfacer.engine.transfers import Transfers


def execute(
    compiled: CompiledPass, inputs: Sequence[Tensor], given: Sequence[Tensor], transfers: Transfers, recorder: Recorder
) -> tuple[list[Tensor], list[Tensor]]:
    """Run one pass on this rank. Collective over the grid's groups.

    Args:
        compiled: the pass.
        inputs: the rank's own tensors, in the program's order, with the strides that it was lowered for.
        given: bytes of what forward kept, in the program's order.
        transfers: counts what is received.
        recorder: observes the pass, each operation and each wait.

    Returns:
        The results in the program's order, and the bytes of what is kept for backward.
    """
    results, kept, workspace = allocate(compiled)
    run_steps(compiled, [*inputs, *given, *results, *kept, workspace], recorder)
    count_received(compiled, transfers)
    return results, kept


def allocate(compiled: CompiledPass) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Allocate the results of a pass, the bytes of what it keeps, and its workspace."""
    device = compiled.device
    results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in compiled.results]
    kept = [torch.empty(nbytes, dtype=torch.uint8, device=device) for nbytes in compiled.kept]
    return results, kept, torch.empty(compiled.program.workspace_bytes, dtype=torch.uint8, device=device)


def run_steps(compiled: CompiledPass, buffers: Sequence[Tensor], recorder: Recorder) -> None:
    """Run the steps of a pass on its buffers, which are numbered as :attr:`CompiledPass.bases` says."""
    operands = _operands(compiled, buffers)
    works: list[Any] = [None] * compiled.transfers
    if recorder is nothing:
        for step in compiled.steps:
            step(operands, works)
    else:
        _observed(compiled, operands, works, recorder)


def count_received(compiled: CompiledPass, transfers: Transfers) -> None:
    """Count the bytes that one run of a pass receives."""
    for key, nbytes in compiled.received:
        transfers.received[key] += nbytes


def _operands(compiled: CompiledPass, buffers: Sequence[Tensor]) -> list[Any]:
    """What steps number: operands as views of their buffers, no results yet, the buffers."""
    as_strided = torch.as_strided
    bases = [buffers[number] if dtype is None else buffers[number].view(dtype) for number, dtype in compiled.bases]
    # An own tensor may begin anywhere in its storage.
    starts = [base.storage_offset() for base in bases]
    operands: list[Any] = [None] * (len(compiled.program.operands) + compiled.program.slots)
    for number, base, shape, strides, offset in compiled.operands:
        operands[number] = as_strided(bases[base], shape, strides, starts[base] + offset)
    operands += buffers
    return operands


def _observed(compiled: CompiledPass, operands: list[Any], works: list[Any], recorder: Recorder) -> None:
    """The same steps, each operation and each wait inside the recorder's context."""
    with recorder(compiled.label):
        for label, steps in compiled.labelled:
            with recorder(label):
                for step in steps:
                    step(operands, works)
