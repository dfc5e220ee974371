"""Compare the settings and the software of all ranks before Megatron makes process groups.

Ranks with different settings can make different groups, so the comparison uses the store of torch.distributed instead
of collectives. Ranks without the plugin are compared too. If the plugin is off on all ranks, differences are no errors.
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

#: Time for connecting to the store, in addition to the timeout of process groups.
CONNECT = timedelta(seconds=10)
#: Maximum number of printed differences.
LINES = 20
#: Flags whose value the plugin may choose. The chosen values are compared in addition to the typed flags.
_CHOSEN = ("keep_gathered_q", "loss_tiles", "mlp_tiles")


@dataclass(frozen=True)
class Parsed:
    """Megatron's parsed arguments as texts that ranks compare.

    Attributes:
        settings: arguments that must be equal on all ranks, keyed by flag.
        paths: arguments that contain paths, keyed by flag. Here ``PATH`` does not replace the paths.
        timeout: value of ``--distributed-timeout-minutes``, or 10 minutes.
    """

    settings: dict[str, str | None]
    paths: dict[str, str | None]
    timeout: timedelta

    @classmethod
    def of(cls, args: argparse.Namespace) -> Parsed:
        """Return a copy of the compared arguments. Later changes of ``args`` do not affect the copy."""
        return cls(*settings_of(args), timedelta(minutes=getattr(args, "distributed_timeout_minutes", None) or 10))


def record_of(parsed: Parsed, settings: Settings | None, version: Version) -> Record:
    """Return the record of this rank for the comparison with other ranks. ``settings`` is None if the plugin is off."""
    resolved = {} if settings is None else dict(_fields(settings))
    labels = parsed.paths | software.labels(version_text(version))
    return Record(parsed.settings | software.code(), resolved, labels, strict=settings is not None)


def _fields(settings: Settings | Plan, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Yield (name, value) for each setting, for each field of a plan, and for each flag in ``_CHOSEN``."""
    for field in fields(settings):
        value, name = getattr(settings, field.name), f"{prefix} {field.name}".strip()
        if isinstance(value, Plan):
            yield from _fields(value, name)
        elif isinstance(value, Flags):
            yield from ((f"resolved {flag}", str(getattr(value, flag))) for flag in _CHOSEN)
        else:
            yield f"resolved {name}", None if value is None else str(value)


def check_start(parsed: Parsed, settings: Settings | None, version: Version, store: dist.Store | None) -> object:
    """Compare this rank with all other ranks of the job.

    The settings are None if the plugin is off. Without a ``store`` of the job, this function connects to the store that
    torch.distributed will use.

    Returns:
        Store of the job. Rank 0's store may run the server, so the caller must keep the store until torch.distributed
        connects to the server.

    Raises:
        DisagreementError: Ranks have different settings. All ranks raise the same error.
        WallfacerError: The store cannot be reached in time.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    record = record_of(parsed, settings, version)
    try:
        store = store or rendezvous_store(rank, parsed.timeout)
        # The store may still have keys of the attempt before a restart.
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
    """Return whether this job has several ranks that can compare settings through a store."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names) and int(os.environ["WORLD_SIZE"]) > 1


def rendezvous_store(rank: int, timeout: timedelta) -> dist.TCPStore:
    """Return a client of the store at ``MASTER_ADDR:MASTER_PORT``.

    Rank 0 starts the store, unless torchrun has already started the store. torch.distributed's own rendezvous waits
    for all ranks and does not name the missing ranks.
    """
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not by_agent,
        timeout=timeout + CONNECT,
        wait_for_workers=False,
        # torch.distributed starts its server on the same port of the same process, so both must share one server.
        multi_tenant=True,
    )


def _say(line: str) -> None:
    print(f"wallfacer: {line}", flush=True)
