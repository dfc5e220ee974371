"""A compiled pass: a program that is bound to process groups and a kernel, so that a run needs no look-ups.

A compiled pass has no memory for tensors. :mod:`megatron_wallfacer.engine.execute` allocates the memory of each run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_wallfacer.engine.memory import memory_of
from megatron_wallfacer.engine.steps import Binding, bind, taken
from megatron_wallfacer.engine.timeline import Pass
from megatron_wallfacer.engine.transfers import Action, Transfers
from megatron_wallfacer.kernels.byte_cache import INTEGER_BYTES
from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel, accumulation_dtype
from megatron_wallfacer.schedule.ops import Op, Transfer
from megatron_wallfacer.schedule.program import AttendBackward, AttendForward, Program

_ATTEND = (AttendForward, AttendBackward)
#: Bytes of an operand with its entry in the pass, and of a step with its call, measured by tracemalloc.
_OPERAND_BYTES, _STEP_BYTES = 400, 1500


@dataclass(frozen=True, eq=False)
class CompiledPass:
    """One pass of one rank, ready to run.

    Attributes:
        reads_delta: whether a step reads delta of the local rows.
        results: shape and dtype of each result.
        kept: bytes of each value that is kept for backward.
        bases: pairs (index of a buffer, dtype in which steps read it). The dtype None is the buffer's own dtype. The
            order of the buffers is: local tensors, values that forward has kept, results, values to keep, workspace.
        operands: operands that steps need as tensors, as (index of the operand, index in ``bases``, shape, strides,
            offset in elements).
        steps: functions that run the steps, in order.
        labelled: the functions of ``steps`` with labels for traces. Each label names an operation, or a wait for a
            transfer.
        transfers: number of transfers.
        received: bytes received in one pass, by (grid axis, name of the tensor).
    """

    program: Program
    kernel: Kernel
    device: torch.device
    reads_delta: bool
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    kept: tuple[int, ...]
    bases: tuple[tuple[int, torch.dtype | None], ...]
    operands: tuple[tuple[int, int, tuple[int, ...], tuple[int, ...], int], ...]
    steps: tuple[Action, ...]
    labelled: tuple[tuple[Op | Transfer, tuple[Action, ...]], ...]
    transfers: int
    received: tuple[tuple[tuple[str, str], int], ...]
    label: Pass

    @property
    def host_bytes(self) -> int:
        """Return the approximate bytes of host memory for steps, operands and boundaries of documents."""
        tiles = (step.tile for _, steps in self.program.steps for step in steps if isinstance(step, _ATTEND))
        documents = sum(2 * len(tile.cu_seqlens.q) for tile in tiles if tile.cu_seqlens is not None)
        return _OPERAND_BYTES * len(self.operands) + _STEP_BYTES * len(self.steps) + INTEGER_BYTES * documents


def compile_pass(
    program: Program, kernel: Kernel, spec: AttnSpec, transfers: Transfers, device: torch.device, dtype: torch.dtype
) -> CompiledPass:
    """Bind a program to a kernel and to process groups, for inputs of the given device and dtype."""
    wide = accumulation_dtype(dtype)
    dtypes = {"input": dtype, "wide": wide, "bytes": None, "own": None}
    memory = memory_of(program, dtype)
    first = len(program.operands) + program.slots
    bases: dict[tuple[int, torch.dtype | None], int] = {}
    one_launch, operands = rows_in_one_launch(device), []
    for number in _viewed(program) if one_launch else range(len(program.operands)):
        operand = program.operands[number]
        base = memory.buffers[operand.buffer] - first, dtypes[operand.view]
        operands.append((number, bases.setdefault(base, len(bases)), operand.shape, operand.strides, operand.offset))
    bound = [transfers.bind(i, one, device) for i, one in enumerate(program.transfers)]
    to = Binding(kernel, spec, bound, memory, device, one_launch)
    labelled = tuple(
        (label, tuple(call for step in steps if (call := bind(step, to)) is not None)) for label, steps in program.steps
    )
    return CompiledPass(
        program=program,
        kernel=kernel,
        device=device,
        reads_delta=any(operand.buffer == "delta" for operand in program.operands),
        results=tuple((result.shape, wide if result.wide else dtype) for result in program.results),
        kept=tuple(nbytes for _, nbytes in program.kept),
        bases=tuple(bases),
        operands=tuple(operands),
        steps=tuple(call for _, calls in labelled for call in calls),
        labelled=labelled,
        transfers=len(program.transfers),
        received=tuple(program.received.items()),
        label=Pass(program.schedule, program.shape),
    )


def rows_in_one_launch(device: torch.device) -> bool:
    """Return whether the device runs a list of row operations as one launch of a Triton kernel."""
    return device.type == "cuda"


def _viewed(program: Program) -> list[int]:
    # Row operations on a GPU need only addresses.
    return sorted({one for _, steps in program.steps for step in steps for one in taken(step, program.transfers)})
