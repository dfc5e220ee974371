"""The first calls of :func:`attention` with a group are compared, by the number of the call.

Not where a pass is compiled: ranks that disagree compile in different calls, and would wait for each other. After the
first calls nothing is compared: later ones may change their shapes, each rank in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_wallfacer.engine.agreement.compare import Verdict, difference
from megatron_wallfacer.engine.agreement.exchange import Meeting
from megatron_wallfacer.engine.backends import is_alive
from megatron_wallfacer.errors import DisagreementError, OptionError

#: Calls of a group that are compared.
CALLS = 64
#: A rank that has not made its call by then fails the others: the longest default timeout of process groups.
TIMEOUT = timedelta(minutes=30)
#: In the place of arguments: the error of a rank that rejects its own.
_REJECTS = "rejects"

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
        verdict = self._meeting().exchange(json.dumps(arguments), json.loads, self.verdict)
        if verdict.errors:
            raise DisagreementError(verdict.errors)

    def reject(self, error: OptionError) -> None:
        """Make the other members raise, too, where this rank rejects its arguments. Does not wait."""
        meeting, record = self._meeting(), {_REJECTS: str(error)}
        meeting.write(json.dumps(record))
        if meeting.rank == meeting.ranks[0]:
            meeting.publish(self.verdict({meeting.rank: record}))
        meeting.mark_read()

    def verdict(self, records: Mapping[int, Arguments]) -> Verdict:
        """Compare the arguments of some ranks."""
        place = f"attention(), call {self.number}"
        for rank, record in sorted(records.items()):
            if _REJECTS in record:
                return Verdict((f"{place}: rank {rank} rejects its arguments: {record[_REJECTS]}",))
        names = dict.fromkeys(name for record in records.values() for name in record)
        lines = (difference(name, {rank: record.get(name) for rank, record in records.items()}) for name in names)
        return Verdict(tuple(f"{place}: {line}" for line in lines if line is not None))

    def _meeting(self) -> Meeting:
        store = dist.distributed_c10d._get_default_store()
        keys = dist.PrefixStore(f"wallfacer/attention/{self.group.group_name}/{self.number}", store)
        ranks = dist.get_process_group_ranks(self.group)
        late = f"have not made call {self.number} of attention()"
        return Meeting(keys, ranks, dist.get_rank(), TIMEOUT, late)


def first_call(group: dist.ProcessGroup | DeviceMesh | None) -> FirstCall | None:
    """Return the call that this rank makes with a group; None where nothing is compared.

    Nothing is compared of later calls, of one rank, and while ``torch.compile`` traces.

    Args:
        group: of the call; None for the world.
    """
    if not dist.is_initialized() or torch.compiler.is_compiling():
        return None
    if isinstance(group, DeviceMesh) and group.ndim == 1 and group.get_coordinate() is not None:
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    # What is no group of this rank is an error, found by the checks of arguments.
    if not isinstance(group, dist.ProcessGroup) or not is_alive(group):
        return None
    number = _made.get(group, 0) + 1
    if number > CALLS:
        return None
    _made[group] = number
    if dist.get_world_size(group) < 2 or dist.get_backend(group) == "fake":
        return None
    return FirstCall(group, number)
