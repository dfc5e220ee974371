"""The list that the steps of a pass read and write: operands, slots for results of kernel calls, and buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.schedule.ops import STATISTICS
from megatron_wallfacer.schedule.program import Operand, Program


@dataclass(frozen=True)
class Memory:
    """The layout of the list that the steps of a pass read and write: first operands, then slots, then buffers.

    Attributes:
        slots: index at which the slots begin. A slot has the results of one kernel call.
        buffers: index of each buffer, by name.
        wide: names of the local tensors, and of the results, that have the accumulation dtype.
    """

    operands: Sequence[Operand] = ()
    slots: int = 0
    buffers: Mapping[str, int] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32

    def held(self, slots: Sequence[int]) -> tuple[int, ...]:
        """Convert slot numbers to indices in the list of tensors."""
        return tuple(self.slots + slot for slot in slots)

    def is_wide(self, operand: Operand) -> bool:
        """Return whether an operand has the accumulation dtype."""
        return operand.buffer in self.wide if operand.view == "own" else operand.view == "wide"

    @property
    def accumulation(self) -> torch.dtype:
        """Return the accumulation dtype for the dtype of the inputs."""
        return accumulation_dtype(self.dtype)


def memory_of(program: Program, dtype: torch.dtype) -> Memory:
    """Return the positions of tensors in the list that a program's steps share. Inputs have the dtype ``dtype``."""
    slots = len(program.operands)
    wide = {result.name for result in program.results if result.wide}
    if program.schedule.backward:
        wide |= STATISTICS
    buffers = {name: slots + program.slots + number for number, name in enumerate(program.buffers)}
    return Memory(program.operands, slots, buffers, frozenset(wide), dtype)
