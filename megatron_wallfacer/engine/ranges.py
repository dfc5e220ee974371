"""Named profiler ranges for passes, ring steps with their tiles, and waits.

A range of ``torch.profiler`` is also an NVTX range if ``torch.autograd.profiler.emit_nvtx`` is on, as with Megatron's
``--profile``. The ranges then have the same names in Nsight Systems and in PyTorch's traces.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.profiler import record_function

from megatron_wallfacer.engine.timeline import Pass
from megatron_wallfacer.schedule.ops import Attend, Op, Transfer
from megatron_wallfacer.schedule.tiles import Tile


class Ranges:
    """An observer that opens a range for each pass, operation and wait. Steps are numbered within a pass."""

    def __init__(self) -> None:
        self._step = 0

    def __call__(self, label: Pass | Op | Transfer) -> AbstractContextManager[None]:
        """Return the profiler range of a pass, an operation or a wait."""
        if isinstance(label, Pass):
            self._step = 0
        return record_function(f"wallfacer: {self._name(label)}")

    def _name(self, label: Pass | Op | Transfer) -> str:
        if isinstance(label, Pass):
            return str(label)
        if isinstance(label, Transfer):
            return f"wait for {', '.join(message.value for message in label.receives) or 'sends'}"
        if isinstance(label, Attend):
            self._step += 1
            tiles = "; ".join(map(tile_name, label.tiles))
            return f"step {self._step}: {'+'.join(label.q)} x {'+'.join(label.kv)}: {tiles}"
        return type(label).__name__.lower()


def tile_name(tile: Tile) -> str:
    """Return the kind of a tile and its half-open ranges of rows and columns, in chunks."""
    kind = "causal" if tile.causal else "partial" if tile.partial else "full"
    (row, row_end), (col, col_end) = tile.rows, tile.cols
    return f"{kind} {row}:{row_end} x {col}:{col_end}"
