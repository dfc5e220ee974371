"""The first calls of :func:`attention` with a group are compared, by the number of the call.

Not where a pass is compiled: ranks that disagree compile in different calls, and would wait for each other. After the
first calls nothing is compared: later ones may change their shapes, each rank in the same way.
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
from megatron_wallfacer.engine.agreement.exchange import Meeting
from megatron_wallfacer.engine.failures import fail_outside, reason_of
from megatron_wallfacer.engine.groups import is_alive
from megatron_wallfacer.errors import DisagreementError, OptionError, WallfacerError
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.plan import Plan

#: Calls of a group that are compared.
CALLS = 64
#: A rank that has not made its call by then fails the others: the longest default timeout of process groups.
TIMEOUT = timedelta(minutes=30)
#: In the place of arguments: what a rank does that does not make its call.
_ENDS = "ends"

Arguments = Mapping[str, str]

_made: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class FirstCall:
    """One of the first calls of a group.

    Attributes:
        group: whose members make the call.
        number: of the call, from 1.
    """

    group: dist.ProcessGroup
    number: int

    def compare(self, arguments: Arguments) -> None:
        """Compare this rank's arguments with those of the other members.

        Args:
            arguments: value by name.

        Raises:
            DisagreementError: they differ, the same lines on every rank.
        """
        try:
            verdict = self._meeting().exchange(json.dumps(arguments), json.loads, self.verdict)
        except BaseException as error:
            # Some may have read the verdict, and are in the pass.
            self.end(error)
            fail_outside(self.group, error)
            raise
        if verdict.errors:
            raise DisagreementError(verdict.errors)

    def end(self, error: BaseException) -> None:
        """Make the other members raise, too, where this rank does not make its call. Does not wait.

        Args:
            error: an :class:`OptionError` of its arguments, or what was raised in their checks.
        """
        if isinstance(error, OptionError):
            record = {_ENDS: f"rejects its arguments: {error}"}
        else:
            record = {_ENDS: f"failed before its first message: {reason_of(error)}"}
        meeting = self._meeting()
        # The store may have gone with the rank that held it; the error itself says more.
        with suppress(RuntimeError):
            meeting.write(json.dumps(record))
            if meeting.rank == meeting.ranks[0]:
                meeting.publish(self.verdict({meeting.rank: record}))
            meeting.mark_read()

    def verdict(self, records: Mapping[int, Arguments]) -> Verdict:
        """Compare the arguments of some ranks."""
        place = f"attention(), call {self.number}"
        for rank, record in sorted(records.items()):
            if _ENDS in record:
                return Verdict((f"{place}: rank {rank} {record[_ENDS]}",))
        names = dict.fromkeys(name for record in records.values() for name in record)
        lines = (difference(name, {rank: record.get(name) for rank, record in records.items()}) for name in names)
        return Verdict(tuple(f"{place}: {line}" for line in lines if line is not None))

    def _meeting(self) -> Meeting:
        store = dist.distributed_c10d._get_default_store()
        keys = dist.PrefixStore(f"wallfacer/attention/{self.group.group_name}/{self.number}", store)
        ranks = dist.get_process_group_ranks(self.group)
        late = f"have not made call {self.number} of attention()"
        return Meeting(keys, ranks, dist.get_rank(), TIMEOUT, late)


def end_call(first: FirstCall | None, group: object, error: BaseException) -> None:
    """Make the other ranks of a call raise, too, where this rank raises before its pass.

    Args:
        first: the call, where its arguments are compared and the comparison has not begun; else None.
        group: of the call, as it was given.
        error: what was raised.
    """
    if first is not None:
        first.end(error)
    elif not isinstance(error, WallfacerError) and (members := _group_of(group)) is not None:
        # Calls are no longer compared: the other ranks wait for messages.
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
    """Return what ranks compare of a call: the text of each value by the name of its argument.

    Args:
        q, k, v: this rank's tensors.
        plan, mask, causal, window_size, shard_mode, scale, softcap: of the call.
        kernel: the name of the chosen one.
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
    """Return the call that this rank makes with a group; None where nothing is compared.

    Nothing is compared of later calls, of one rank, and while ``torch.compile`` traces.

    Args:
        group: of the call; None for the world.
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
    """The process group of a call; None for what is no group of this rank, an error that checks of arguments find."""
    if not dist.is_initialized():
        return None
    if isinstance(group, DeviceMesh) and group.ndim == 1 and group.get_coordinate() is not None:
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    return group if isinstance(group, dist.ProcessGroup) and is_alive(group) else None
