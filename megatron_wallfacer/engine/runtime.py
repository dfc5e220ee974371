"""What a pass needs besides its schedule and tensors, and the tensors that are still on their way to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_wallfacer.engine.transfers import Pending, Tensors, Transfers
from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.schedule.moves import Gather, Hop
from megatron_wallfacer.schedule.schedule import Schedule
from megatron_wallfacer.schedule.tiles import Tile


@dataclass(frozen=True)
class Runtime:
    """Transfers of this rank's groups, the kernel, and the softmax scale."""

    transfers: Transfers
    kernel: Kernel
    scale: float

    def start(self, hop: Hop | None, block: Tensors) -> Pending | None:
        """Start a hop, if there is one."""
        return None if hop is None else self.transfers.hop(hop, block)


class Arrivals:
    """The first blocks of a pass: local shards, replaced by what the prologue brings, waited for when taken."""

    def __init__(self, schedule: Schedule, runtime: Runtime, local: Mapping[str, Tensor]) -> None:
        self._at_hand = dict(local)
        self._on_the_way: dict[tuple[str, ...], Pending] = {}
        for move in schedule.prologue:
            start = runtime.transfers.gather if isinstance(move, Gather) else runtime.transfers.hop
            self._on_the_way[move.payload] = start(move, self.take(move.payload))

    def take(self, names: Sequence[str]) -> Tensors:
        """These tensors, once they are here. They are handed over: nothing here keeps them alive."""
        for payload in [payload for payload in self._on_the_way if not set(payload).isdisjoint(names)]:
            self._at_hand.update(zip(payload, self._on_the_way.pop(payload).wait(), strict=True))
        return tuple(self._at_hand.pop(name) for name in names)


def tile_slices(tile: Tile, chunk: int) -> tuple[slice, slice]:
    """Token ranges (rows, cols) of a tile, for chunks of ``chunk`` tokens."""
    return slice(tile.rows[0] * chunk, tile.rows[1] * chunk), slice(tile.cols[0] * chunk, tile.cols[1] * chunk)
