"""The memory of a pass as its steps see it: one list of operands, held results and buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.schedule.program import WORKSPACE, Operand, Program
from megatron_wallfacer.schedule.volume import STATISTICS


@dataclass(frozen=True)
class Memory:
    """What the numbers in the list of a pass stand for: operands, then slots, then buffers.

    Attributes:
        operands: of the program.
        slots: number of the first slot, which holds the results of an attention call.
        buffers: number of each buffer by name.
        wide: names of own tensors and results in the accumulation dtype.
        dtype: of the inputs.
    """

    operands: Sequence[Operand] = ()
    slots: int = 0
    buffers: Mapping[str, int] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32

    def held(self, slots: Sequence[int]) -> tuple[int, ...]:
        """Numbers of some slots."""
        return tuple(self.slots + slot for slot in slots)

    def is_wide(self, operand: Operand) -> bool:
        """Whether an operand is in the accumulation dtype."""
        return operand.buffer in self.wide if operand.view == "own" else operand.view == "wide"

    @property
    def accumulation(self) -> torch.dtype:
        """The accumulation dtype."""
        return accumulation_dtype(self.dtype)


def memory_of(program: Program, dtype: torch.dtype) -> Memory:
    """Return the memory of a program.

    Args:
        program: of this rank.
        dtype: of the inputs.
    """
    slots = len(program.operands)
    # A result or a kept value has the name of a tensor or of a value, no two of them the same.
    names = (
        *program.inputs,
        *program.given,
        *(result.name for result in program.results),
        *(name for name, _ in program.kept),
        WORKSPACE,
    )
    wide = {result.name for result in program.results if result.wide}
    if program.schedule.backward:
        wide |= STATISTICS
    buffers = {name: slots + program.slots + number for number, name in enumerate(names)}
    return Memory(program.operands, slots, buffers, frozenset(wide), dtype)
