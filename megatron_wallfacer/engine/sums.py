"""Accumulators: partial outputs merged by log-sum-exp, gradients added up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from megatron_wallfacer.engine.blocks import Block, Sizes
from megatron_wallfacer.engine.merge import merge_into


class Sum:
    """Rows into which results are merged. What nothing has been merged into yet is written, not read.

    Attributes:
        block: the rows so far; complete after :meth:`settle`.
    """

    def __init__(self, block: Block, sizes: Sizes) -> None:
        self.block, self._sizes = block, sizes
        self._written = [False] * len(block.chunks)

    def add(self, chunks: tuple[int, int], parts: Mapping[str, Tensor]) -> None:
        """Merge results for a range of the block's chunks."""
        for first, end in self._alike(*chunks):
            rows = self._sizes.rows((first, end))
            inner = self._sizes.rows((first - chunks[0], end - chunks[0]))
            sums = {name: self.block.tensors[name][rows] for name in parts}
            part = {name: tensor[inner] for name, tensor in parts.items()}
            if not self._written[first]:
                for name, total in sums.items():
                    total.copy_(part[name])
            elif "lse" in sums:
                merge_into(sums["out"], sums["lse"], part["out"], part["lse"])
            else:
                for name, total in sums.items():
                    total.add_(part[name])
            self._written[first:end] = [True] * (end - first)

    def settle(self) -> Block:
        """The rows, where nothing came zero: no gradient, no key seen."""
        for first, end in self._alike(0, len(self._written)):
            if not self._written[first]:
                for name, total in self.block.tensors.items():
                    total[self._sizes.rows((first, end))].fill_(float("-inf") if name == "lse" else 0.0)
                self._written[first:end] = [True] * (end - first)
        return self.block

    def _alike(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges of chunks that have all been written, or all not."""
        first = start
        for index in range(start + 1, stop + 1):
            if index == stop or self._written[index] != self._written[first]:
                yield first, index
                first = index
