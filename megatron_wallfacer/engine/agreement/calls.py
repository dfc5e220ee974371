"""Comparison of the arguments of :func:`attention` between the ranks of a process group.

Ranks compare the arguments of their first :data:`CALLS` calls of ``attention`` per process group. Calls inside
``torch.compile`` are not compared. Such a comparison would run only in calls in which PyTorch traces. Ranks that trace
in different calls would wait for each other until a timeout.
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

#: Number of calls per group whose arguments are compared.
CALLS = 64
#: Longest time that ranks wait for another rank's call: the longest default timeout of process groups.
TIMEOUT = timedelta(minutes=30)
#: Key of a record without arguments. Its value is the reason why a rank does not make its call.
_ENDS = "ends"

Arguments = Mapping[str, str]

_made: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class FirstCall:
    """A call of attention whose arguments are compared between the ranks of its group.

    ``number`` counts the calls with the group, from 1.
    """

    group: dist.ProcessGroup
    number: int

    def compare(self, arguments: Arguments) -> None:
        """Compare the arguments of this rank with the arguments of all members of the group.

        Raises:
            DisagreementError: The arguments differ. Every rank raises the same message.
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
        """Publish the error of this rank, so that all ranks of the process group raise an error."""
        reason = f"failed before its first message: {reason_of(error)}"
        if isinstance(error, OptionError):
            reason = f"rejects its arguments: {error}"
        record, exchange = {_ENDS: reason}, self._exchange()
        # The rank whose process has the store may have ended.
        with suppress(RuntimeError):
            exchange.write(json.dumps(record))
            if exchange.rank == exchange.ranks[0]:
                exchange.publish(self.verdict({exchange.rank: record}))
            exchange.mark_read()

    def verdict(self, records: Mapping[int, Arguments]) -> Verdict:
        """Return one line per argument that differs between ranks, or one line about a rank that makes no call."""
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
    """Publish that this rank raises an error before its pass, so that the other ranks of the group raise one too.

    ``first`` is None if the ranks do not compare the arguments of this call, or have compared them before the error.
    """
    if first is not None:
        first.end(error)
    elif not isinstance(error, WallfacerError) and (members := _group_of(group)) is not None:
        # Calls without a comparison publish no record, so the other ranks wait for messages of the pass.
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
    """Return the text of each value that must be equal on all ranks, by the name of its argument."""
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
    """Return a :class:`FirstCall` if the ranks compare the arguments of the next call of ``attention``, else None.

    Each process group of several ranks compares its first :data:`CALLS` calls. ``group`` is None for the world.
    """
    if not dist.is_initialized() or torch.compiler.is_compiling():
        return None
    if (members := _group_of(group)) is None:
        return None
    number = _made.get(members, 0) + 1
    if number > CALLS:
        return None
    _made[members] = number
    if dist.get_world_size(members) < 2 or dist.get_backend(members) == "fake":
        return None
    return FirstCall(members, number)


def _group_of(group: object) -> dist.ProcessGroup | None:
    """Return the process group of ``group``; None if ``group`` is invalid or torch.distributed is not initialised."""
    if not dist.is_initialized():
        return None
    if isinstance(group, DeviceMesh) and group.ndim == 1 and group.get_coordinate() is not None:
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    return group if isinstance(group, dist.ProcessGroup) and is_alive(group) else None
