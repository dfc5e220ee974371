"""Before Megatron makes its groups, all ranks compare their settings and their software.

Ranks that disagree may not share a group, so this is no collective: it goes through the store that torch.distributed
starts with. Ranks without the plugin take part, and are compared where any rank has it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import timedelta

import torch.distributed as dist

from megatron_wallfacer.engine.agreement.compare import Record, compare
from megatron_wallfacer.engine.agreement.exchange import Exchange
from megatron_wallfacer.errors import DisagreementError, WallfacerError
from megatron_wallfacer.megatron.agreement import software
from megatron_wallfacer.megatron.agreement.parsed import settings_of
from megatron_wallfacer.megatron.flags import Flags
from megatron_wallfacer.megatron.releases import version_text
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.megatron.version import Version
from megatron_wallfacer.schedule.plan import Plan

#: How long a rank tries to reach the store, beyond the timeout of groups.
CONNECT = timedelta(seconds=10)
#: Differences that are printed; others are counted.
LINES = 20
#: Flags whose value the plugin may choose. All flags are compared as they are typed, too.
_CHOSEN = ("keep_gathered_q", "loss_tiles", "mlp_tiles")


@dataclass(frozen=True)
class Parsed:
    """What Megatron's parser gave.

    Attributes:
        settings: arguments that must be equal, by flag.
        paths: arguments with paths as they were typed.
        timeout: of process groups.
    """

    settings: dict[str, str | None]
    paths: dict[str, str | None]
    timeout: timedelta

    @classmethod
    def of(cls, args: argparse.Namespace) -> Parsed:
        """Return a copy of what is compared, before anything writes into ``args``."""
        return cls(*settings_of(args), timedelta(minutes=getattr(args, "distributed_timeout_minutes", None) or 10))


def record_of(parsed: Parsed, settings: Settings | None, version: Version) -> Record:
    """Return the record of this rank.

    Args:
        parsed: arguments.
        settings: of the plugin; None where it is off.
        version: Megatron's.
    """
    resolved = {} if settings is None else dict(_fields(settings, ""))
    labels = parsed.paths | software.labels(version_text(version))
    return Record(parsed.settings | software.code(), resolved, labels, strict=settings is not None)


def _fields(settings: Settings | Plan, prefix: str) -> Iterator[tuple[str, str | None]]:
    """Yield name and value of each field, also of plans, and of flags whose value the plugin may choose."""
    for field in fields(settings):
        value, name = getattr(settings, field.name), f"{prefix} {field.name}".strip()
        if isinstance(value, Plan):
            yield from _fields(value, name)
        elif isinstance(value, Flags):
            yield from ((f"resolved {flag}", str(getattr(value, flag))) for flag in _CHOSEN)
        else:
            yield f"resolved {name}", None if value is None else str(value)


def check_start(parsed: Parsed, settings: Settings | None, version: Version, store: dist.Store | None) -> object:
    """Compare this rank with all others of the job.

    Args:
        parsed: arguments.
        settings: of the plugin; None where it is off.
        version: Megatron's.
        store: of the job; None to connect to the one that torch.distributed will start with.

    Returns:
        The store. It may be the server of the job, and has to live until torch.distributed has connected to it.

    Raises:
        DisagreementError: ranks have different settings, the same lines on every rank.
        WallfacerError: the store cannot be reached in time.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    record = record_of(parsed, settings, version)
    try:
        store = store or rendezvous_store(rank, parsed.timeout)
        # A restarted job may find the keys of the attempt before it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        keys = dist.PrefixStore(f"wallfacer/start/{attempt}", store)
        exchange = Exchange(keys, range(ranks), rank, parsed.timeout, say=_say)
        verdict = exchange.run(record.to_text(), Record.from_text, compare)
    except dist.DistError as error:
        first = str(error).partition("\n")[0]
        raise WallfacerError(f"the store of rank 0 cannot be reached: {first}") from error
    if rank == 0:
        for line in verdict.warnings[:LINES]:
            _say(f"warning: {line}")
    if verdict.errors:
        more = len(verdict.errors) - LINES
        rest = (f"and {more} more settings differ",) if more > 0 else ()
        raise DisagreementError((*verdict.errors[:LINES], *rest))
    return store


def takes_part() -> bool:
    """Return whether this process is a rank of several that have a store."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names) and int(os.environ["WORLD_SIZE"]) > 1


def rendezvous_store(rank: int, timeout: timedelta) -> dist.TCPStore:
    """Return a client of the store at ``MASTER_ADDR:MASTER_PORT``; rank 0 serves it where torchrun does not.

    torch.distributed's own rendezvous waits for all ranks and does not name the ones that are late.
    """
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not by_agent,
        timeout=timeout + CONNECT,
        wait_for_workers=False,
        # torch.distributed starts its server on the same port of the same process: they share one.
        multi_tenant=True,
    )


def _say(line: str) -> None:
    print(f"wallfacer: {line}", flush=True)
