"""Named ranges for profilers: the step of a pass, and its tiles.

A range of ``torch.profiler`` is an NVTX range too wherever ``torch.autograd.profiler.emit_nvtx`` is on, as it is under
Megatron's ``--profile``: one name in Nsight Systems and in PyTorch's own traces.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.profiler import record_function

from megatron_wallfacer.engine.timeline import Pass
from megatron_wallfacer.schedule.ops import Attend, Op, Transfer
from megatron_wallfacer.schedule.tiles import Tile


class Ranges:
    """An observer that opens a range for each pass, operation and wait. Steps are counted within a pass."""

    def __init__(self) -> None:
        self._step = 0

    def __call__(self, what: Pass | Op | Transfer) -> AbstractContextManager[None]:
        if isinstance(what, Pass):
            self._step = 0
        return record_function(f"wallfacer: {self._name(what)}")

    def _name(self, what: Pass | Op | Transfer) -> str:
        if isinstance(what, Pass):
            return str(what)
        if isinstance(what, Transfer):
            return f"wait for {', '.join(message.value for message in what.receives) or 'what was sent'}"
        if isinstance(what, Attend):
            self._step += 1
            tiles = "; ".join(map(tile_name, what.tiles))
            return f"step {self._step}: {'+'.join(what.q)} x {'+'.join(what.kv)}: {tiles}"
        return type(what).__name__.lower()


def tile_name(tile: Tile) -> str:
    """Return the kind of a tile, and its rows and columns in chunks."""
    kind = "causal" if tile.causal else "partial" if tile.partial else "full"
    (row, row_end), (col, col_end) = tile.rows, tile.cols
    return f"{kind} {row}:{row_end} x {col}:{col_end}"
