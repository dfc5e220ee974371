"""Comparisons between ranks before and after a verified pass, with collectives over the context-parallel group.

The collectives give every rank the same differences, so all ranks raise the same error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.engine.agreement.compare import ranks_text
from megatron_wallfacer.engine.groups import CPU, AxisGroups
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.schedule.grid import AXES
from megatron_wallfacer.schedule.messages import MessageTensor

Sum = tuple[MessageTensor, Tensor]
#: Largest number of differing tensors that each rank reports.
_SHOWN = 3
_PLACES = (*AXES, "cp")
_TENSORS = ("q", "k", "v", "out", "lse", "dout", "delta", "dq", "dk", "dv")
_NONE = 2**62


def compare_passes(
    groups: AxisGroups, where: str, described: Mapping[str, object], local: Mapping[str, Tensor], device: torch.device
) -> None:
    """Check that all ranks run the same pass next, and that the local tensors of all ranks are finite.

    The ``repr`` of each value in ``described`` must be equal on all ranks. ``local`` has tensors by name, with the same
    names on all ranks. ``where`` is the name of the pass, for messages.

    Raises:
        WallfacerError: A value differs between ranks, or a tensor is not finite. Every rank raises the error.
    """
    hashes = (blake2b(repr(value).encode(), digest_size=7).digest() for value in described.values())
    digests = torch.tensor([int.from_bytes(one) for one in hashes], dtype=torch.int64, device=device)
    finite = torch.stack([torch.isfinite(x).all() for x in local.values()]).to(torch.int64)
    rows = _gathered(groups, torch.cat([digests, finite]))
    for number, name in enumerate(described):
        values = [row[number] for row in rows]
        if len(set(values)) > 1:
            usual, _ = Counter(values).most_common(1)[0]
            others = [rank for rank, value in enumerate(values) if value != usual]
            rest = [rank for rank, value in enumerate(values) if value == usual]
            raise WallfacerError(
                f"{where}: {name} of {_ranks(groups, others)} differs from that of {_ranks(groups, rest)}"
            )
    for number, name in enumerate(local, len(described)):
        others = [rank for rank, row in enumerate(rows) if not row[number]]
        if others:
            raise WallfacerError(f"{where}: {name} of {_ranks(groups, others)} has values that are not finite")


def compare_sums(
    groups: AxisGroups, where: str, sent: Sequence[Sum], received: Sequence[Sum], device: torch.device
) -> None:
    """Compare the checksums of all sent tensors with the checksums of the received tensors.

    Raises:
        WallfacerError: A received tensor differs from the sent tensor. Every rank raises the error.
    """
    if groups.grid.cp_size == 1:
        return
    codes, differ = _exchanged(groups, sent, received, device)
    first = torch.where(differ, codes, _NONE).sort().values[:_SHOWN]
    first = torch.nn.functional.pad(first, (0, _SHOWN - len(first)), value=_NONE)
    rows = _gathered(groups, torch.cat([differ.sum().view(1), first]))
    count = sum(row[0] for row in rows)
    if not count:
        return
    found = [_described(groups, code, rank) for rank, row in enumerate(rows) for code in row[1:] if code != _NONE]
    shown = found[:_SHOWN]
    more = f", and {count - len(shown)} more" if count > len(shown) else ""
    raise WallfacerError(
        f"{where}: {', '.join(shown)}{more}: received and sent data differ; test the network between these ranks"
    )


def _exchanged(
    groups: AxisGroups, sent: Sequence[Sum], received: Sequence[Sum], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return an id of each received tensor (:func:`_coded`), and whether the tensor differs from the sent tensor."""
    place = {rank: dist.get_group_rank(_whole(groups), one) for rank, one in enumerate(groups.global_ranks)}

    def ordered(sums: Sequence[Sum]) -> tuple[list[Sum], list[int]]:
        # Both ends of a message have equal tags and tensors. Messages between two ranks have different tags.
        some = sorted(sums, key=lambda one: (place[one[0].peer], one[0].tag, one[0].name))
        counts = Counter(place[tensor.peer] for tensor, _ in some)
        return some, [counts[rank] for rank in range(len(place))]

    (out, out_counts), (into, into_counts) = ordered(sent), ordered(received)
    expected = torch.empty(len(into), dtype=torch.int64, device=_messages(groups, device))
    dist.all_to_all_single(expected, _stacked(groups, out, device), into_counts, out_counts, group=_whole(groups))
    codes = torch.tensor([_coded(tensor) for tensor, _ in into], dtype=torch.int64, device=expected.device)
    return codes, expected != _stacked(groups, into, device)


def _stacked(groups: AxisGroups, sums: Sequence[Sum], device: torch.device) -> Tensor:
    values = [value for _, value in sums]
    return (torch.stack(values) if values else torch.empty(0, dtype=torch.int64)).to(_messages(groups, device))


def _coded(tensor: MessageTensor) -> int:
    """Return one number that encodes the sender, the axis and the name of a tensor."""
    return (tensor.peer * len(_PLACES) + _PLACES.index(tensor.axis)) * len(_TENSORS) + _TENSORS.index(tensor.name)


def _described(groups: AxisGroups, code: int, receiver: int) -> str:
    """Return the part of an error message that names a corrupted tensor. ``code`` is the number from :func:`_coded`."""
    rest, tensor = divmod(code, len(_TENSORS))
    sender, axis = divmod(rest, len(_PLACES))
    ends = f"{_ranks(groups, [sender])} arrived changed at {_ranks(groups, [receiver])}"
    return f"{_TENSORS[tensor]} of {ends} ({_PLACES[axis]})"


def _gathered(groups: AxisGroups, row: Tensor) -> list[list[int]]:
    """Return the ``row`` of every rank, in the order of the context-parallel group. The host waits for the device."""
    if groups.grid.cp_size == 1:
        return [row.tolist()]
    row = row.to(_messages(groups, row.device))
    rows = row.new_empty(len(groups.global_ranks), len(row))
    dist.all_gather(list(rows.unbind()), row, group=_whole(groups))
    by_place = rows.tolist()
    return [by_place[dist.get_group_rank(_whole(groups), rank)] for rank in groups.global_ranks]


def _whole(groups: AxisGroups) -> dist.ProcessGroup:
    return groups.groups["cp", "inputs"]


def _messages(groups: AxisGroups, device: torch.device) -> torch.device:
    """Return the device of the tensors that collectives send. Gloo sends from host memory."""
    return CPU if groups.backend == "gloo" else device


def _ranks(groups: AxisGroups, members: Sequence[int]) -> str:
    return ranks_text(groups.global_ranks[member] for member in members)
