"""Comparison of the first calls of :func:`attention` with a group, by number of the call.

Passes are not compared when they are compiled: ranks with different arguments compile in different calls, and would
wait for each other. Later calls are not compared: their shapes may change, on each rank in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron_wallfacer.engine.agreement.compare import Verdict, difference
from megatron_wallfacer.engine.agreement.exchange import Exchange
from megatron_wallfacer.engine.failures import fail_outside, reason_of
from megatron_wallfacer.engine.groups import is_alive
from megatron_wallfacer.errors import DisagreementError, OptionError, WallfacerError
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.plan import Plan

#: Number of calls of a group that are compared.
CALLS = 64
#: Longest time that ranks wait for the call of another rank: the longest default timeout of process groups.
TIMEOUT = timedelta(minutes=30)
#: Key of a record in place of arguments: the reason why a rank does not make its call.
_ENDS = "ends"

Arguments = Mapping[str, str]

_made: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class FirstCall:
    """One of the first calls of a group.

    Attributes:
        group: process group of the ranks that make the call.
        number: number of the call, from 1.
    """

    group: dist.ProcessGroup
    number: int

    def compare(self, arguments: Arguments) -> None:
        """Compare the arguments of this rank with those of the other members.

        Args:
            arguments: text of each value, by name.

        Raises:
            DisagreementError: The arguments differ. Every rank raises the same lines.
        """
        try:
            verdict = self._exchange().run(json.dumps(arguments), json.loads, self.verdict)
        except BaseException as error:
            # Other ranks may have read the verdict and begun the pass.
            self.end(error)
            fail_outside(self.group, error)
            raise
        if verdict.errors:
            raise DisagreementError(verdict.errors)

    def end(self, error: BaseException) -> None:
        """Let the other members raise too if this rank does not make its call. Returns without waiting.

        Args:
            error: :class:`OptionError` of the arguments, or an exception in their checks.
        """
        if isinstance(error, OptionError):
            record = {_ENDS: f"rejects its arguments: {error}"}
        else:
            record = {_ENDS: f"failed before its first message: {reason_of(error)}"}
        exchange = self._exchange()
        # The rank that held the store may have ended.
        with suppress(RuntimeError):
            exchange.write(json.dumps(record))
            if exchange.rank == exchange.ranks[0]:
                exchange.publish(self.verdict({exchange.rank: record}))
            exchange.mark_read()

    def verdict(self, records: Mapping[int, Arguments]) -> Verdict:
        """Compare the arguments of some ranks."""
        place = f"attention(), call {self.number}"
        for rank, record in sorted(records.items()):
            if _ENDS in record:
                return Verdict((f"{place}: rank {rank} {record[_ENDS]}",))
        names = dict.fromkeys(name for record in records.values() for name in record)
        lines = (difference(name, {rank: record.get(name) for rank, record in records.items()}) for name in names)
        return Verdict(tuple(f"{place}: {line}" for line in lines if line is not None))

    def _exchange(self) -> Exchange:
        store = dist.distributed_c10d._get_default_store()
        keys = dist.PrefixStore(f"wallfacer/attention/{self.group.group_name}/{self.number}", store)
        ranks = dist.get_process_group_ranks(self.group)
        late = f"have not made call {self.number} of attention()"
        return Exchange(keys, ranks, dist.get_rank(), TIMEOUT, late)


def end_call(first: FirstCall | None, group: object, error: BaseException) -> None:
    """Let the other ranks of a call raise too if this rank raises before its pass.

    Args:
        first: call whose arguments are still to be compared; None if there is no comparison, or after it.
        group: argument ``group`` of the call.
        error: exception of this rank.
    """
    if first is not None:
        first.end(error)
    elif not isinstance(error, WallfacerError) and (members := _group_of(group)) is not None:
        # This call is not compared, so the other ranks wait for messages.
        fail_outside(members, error)


def described(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    mask: Mask,
    causal: bool,
    window_size: Sequence[int],
    shard_mode: str,
    scale: float,
    softcap: float,
    kernel: str,
    options: Mapping[str, object],
) -> Arguments:
    """Return the text of each value that must be equal on all ranks, by the name of its argument.

    Args:
        q: local queries.
        k: local keys.
        v: local values.
        plan: grid and choices.
        mask: unmasked pairs.
        causal: whether the mask is causal.
        window_size: (left, right) of the sliding window.
        shard_mode: layout of documents.
        scale: factor of the scores.
        softcap: cap of the scores.
        kernel: name of the selected kernel.
        options: other arguments by name.
    """
    values = {
        "plan": plan,
        "causal": causal,
        "window_size": tuple(window_size),
        "cu_seqlens": mask.documents,
        "shard_mode": shard_mode,
        "scale": scale,
        "softcap": softcap,
        "kernel": kernel,
        **options,
        "dtype": q.dtype,
        **{f"shape of {name}": tuple(x.shape) for name, x in (("q", q), ("k", k), ("v", v))},
    }
    return {name: str(value) for name, value in values.items()}


def first_call(group: dist.ProcessGroup | DeviceMesh | None) -> FirstCall | None:
    """Return the next call of this rank with a group; None if it is not compared.

    Later calls, calls of a single rank and calls that ``torch.compile`` traces are not compared.

    Args:
        group: process group or device mesh of the call; None for the world.
    """
    if not dist.is_initialized() or torch.compiler.is_compiling():
        return None
    members = _group_of(group)
    if members is None:
        return None
    number = _made.get(members, 0) + 1
    if number > CALLS:
        return None
    _made[members] = number
    if dist.get_world_size(members) < 2 or dist.get_backend(members) == "fake":
        return None
    return FirstCall(members, number)


def _group_of(group: object) -> dist.ProcessGroup | None:
    """Return the process group of a call; None for other values, which the checks of arguments report."""
    if not dist.is_initialized():
        return None
    if isinstance(group, DeviceMesh) and group.ndim == 1 and group.get_coordinate() is not None:
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    return group if isinstance(group, dist.ProcessGroup) and is_alive(group) else None
