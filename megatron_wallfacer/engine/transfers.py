"""Moves of a schedule as torch.distributed calls, with every received byte counted.

Nothing here blocks before :meth:`Pending.wait`. Blocks are sbhd-like tensors ``[tokens, ...]`` whose chunks are
sorted by position; a collective works on shards laid end to end, and the order is changed on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.schedule.layout import inverse_order, sorting_order
from megatron_wallfacer.schedule.moves import Combine, Gather, Hop, Reduce

Tensors = tuple[Tensor, ...]

# torch 2.13 deprecated the name under which older versions know it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending:
    """Tensors on their way. Keeps what is being sent alive until it has left, and not longer."""

    def __init__(self, works: Sequence[dist.Work], finish: Callable[[], Tensors], sent: Sequence[Tensor]) -> None:
        self._state: tuple[Sequence[dist.Work], Callable[[], Tensors], Sequence[Tensor]] | None = (works, finish, sent)

    def wait(self) -> Tensors:
        """Block until everything has arrived and left. To be called once."""
        assert self._state is not None
        works, finish, _ = self._state
        for work in works:
            work.wait()
        self._state = None
        return finish()


class Transfers:
    """Runs moves on the groups of a grid.

    Attributes:
        groups: the process groups.
        received: bytes received so far by (axis, tensor name), as handed over by torch.distributed.
    """

    def __init__(self, groups: AxisGroups) -> None:
        self.groups = groups
        self.received: Counter[tuple[str, str]] = Counter()

    def gather(self, move: Gather, shards: Tensors) -> Pending:
        """All-gather; the arriving tensors are sorted blocks of ``len(move.ranks)`` shards."""
        count, group = len(move.ranks), self.groups.groups[move.axis]
        order = sorting_order(move.ranks, self.groups.grid.cp_size)
        sent = [shard.contiguous() for shard in shards]
        gathered = [shard.new_empty((count * shard.shape[0], *shard.shape[1:])) for shard in sent]
        works = [
            _all_gather(whole, shard, group=group, async_op=True) for whole, shard in zip(gathered, sent, strict=True)
        ]
        self._count(move.axis, move.payload, [(count - 1) * _bytes(shard) for shard in sent])
        return Pending(works, lambda: tuple(_reorder(whole, order) for whole in gathered), sent)

    def hop(self, move: Hop, block: Tensors) -> Pending:
        """Send a block on, receive one of the same shape."""
        group, ranks = self.groups.groups[move.axis], self.groups.global_ranks
        sent = [tensor.contiguous() for tensor in block]
        arriving = tuple(torch.empty_like(tensor) for tensor in sent)
        # Receives first: a message that finds its buffer posted needs no second copy.
        operations = [dist.P2POp(dist.irecv, tensor, ranks[move.recv_from], group) for tensor in arriving]
        operations += [dist.P2POp(dist.isend, tensor, ranks[move.send_to], group) for tensor in sent]
        self._count(move.axis, move.payload, [_bytes(tensor) for tensor in arriving])
        return Pending(dist.batch_isend_irecv(operations), lambda: arriving, sent)

    def exchange(self, move: Combine, block: Tensors) -> Pending:
        """Send each rank its shard of a block; what arrives is stacked ``[len(move.ranks), shard tokens, ...]``."""
        works, arriving, sent = self._direct(move, block)
        return Pending(works, lambda: arriving, sent)

    def reduce(self, move: Reduce, block: Tensors) -> Pending:
        """Sum a block over the ranks; each receives its own shard.

        A direct exchange and a local sum: the sum has the same order whatever the backend, and gloo's own
        reduce-scatter moves each word twice.
        """
        works, arriving, sent = self._direct(move, block)
        return Pending(works, lambda: tuple(parts.sum(0) for parts in arriving), sent)

    def _direct(self, move: Combine | Reduce, block: Tensors) -> tuple[list[dist.Work], Tensors, list[Tensor]]:
        """All-to-all of a block's shards: (works, what arrives, what is sent)."""
        count, group = len(move.ranks), self.groups.groups[move.axis]
        order = inverse_order(sorting_order(move.ranks, self.groups.grid.cp_size))
        sent = [_reorder(tensor, order) for tensor in block]
        arriving = [torch.empty_like(tensor) for tensor in sent]
        works = [
            dist.all_to_all_single(whole, tensor, group=group, async_op=True)
            for whole, tensor in zip(arriving, sent, strict=True)
        ]
        self._count(move.axis, move.payload, [(count - 1) * _bytes(tensor) // count for tensor in sent])
        return works, tuple(whole.unflatten(0, (count, -1)) for whole in arriving), sent

    def _count(self, axis: str, payload: Sequence[str], sizes: Sequence[int]) -> None:
        for name, size in zip(payload, sizes, strict=True):
            self.received[axis, name] += size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _reorder(block: Tensor, order: Sequence[int]) -> Tensor:
    """Chunks of a block in another order."""
    if list(order) == list(range(len(order))):
        return block.contiguous()
    chunks = block.chunk(len(order))
    return torch.cat([chunks[index] for index in order])
