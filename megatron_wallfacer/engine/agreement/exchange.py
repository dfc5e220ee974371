"""Exchange records through a store: every rank writes its own, the first rank compares and publishes the verdict.

A rank waits for a key of the store, so ranks without a common process group can take part. Equal records are stored and
compared once for any number of ranks.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megatron_wallfacer.engine.agreement.compare import Verdict, ranks_text

#: Seconds between messages that name the ranks without a record.
NOTICE_S = 20.0
#: Longest time in seconds between two comparisons on the first rank.
POLL_S = 5.0
#: Longest time in seconds that the first rank, which may hold the store, waits after an error for readers.
STAY_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """One exchange of records between ranks.

    Attributes:
        store: store of the job. It must not contain keys of this exchange yet.
        ranks: global ranks that take part. The first one compares.
        rank: global rank of this process.
        timeout: time after which the exchange fails if a rank has written no record.
        late: description of ranks without a record, in the plural: ``have not started``.
        say: function that prints one line.
    """

    store: dist.Store
    ranks: Sequence[int]
    rank: int
    timeout: timedelta
    late: str = "have not started"
    say: Callable[[str], None] = print

    def run(self, text: str, read: Callable[[str], T], compare: Callable[[Mapping[int, T]], Verdict]) -> Verdict:
        """Return the verdict on the records of all ranks, which is equal on all ranks.

        Args:
            text: record of this rank.
            read: function that returns a record, given its text.
            compare: function that compares records by rank. The first rank calls it whenever records arrive.
        """
        self.write(text)
        if self.rank == self.ranks[0]:
            verdict = self._collect(read, compare)
            self.publish(verdict)
        else:
            verdict = self._await_verdict()
        self._leave(verdict)
        return verdict

    def write(self, text: str) -> None:
        """Write the record of this rank."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not self.store.check([f"record/{digest}"]):
            self.store.set(f"record/{digest}", text)
        self.store.set(f"rank/{self.rank}", digest)

    def publish(self, verdict: Verdict) -> None:
        """Write the verdict, on the first rank."""
        self.store.set("verdict", verdict.to_text())

    def mark_read(self) -> None:
        """Count this rank among those that no longer need the store."""
        self.store.add("read", 1)

    def _collect(self, read: Callable[[str], T], compare: Callable[[Mapping[int, T]], Verdict]) -> Verdict:
        started = noticed = time.monotonic()
        records: dict[str, T] = {}
        digests: dict[int, str] = {}
        while True:
            missing = [rank for rank in self.ranks if rank not in digests]
            arrived = missing if self._poll([f"rank/{rank}" for rank in missing], POLL_S) else self._arrived(missing)
            for rank, digest in zip(arrived, self._get([f"rank/{rank}" for rank in arrived]), strict=True):
                digests[rank] = digest
                if digest not in records:
                    records[digest] = read(self.store.get(f"record/{digest}").decode())
            verdict = compare({rank: records[digest] for rank, digest in digests.items()})
            late = [rank for rank in self.ranks if rank not in digests]
            # A difference ends the job at once, even if a rank is late.
            if not late or verdict.errors:
                return verdict
            now = time.monotonic()
            if now - started > self.timeout.total_seconds():
                return Verdict((f"{self._late(late)} after {now - started:.0f} s, the timeout of process groups",))
            if now - noticed > NOTICE_S:
                noticed = now
                self.say(f"{self._late(late)} after {now - started:.0f} s; the others wait")

    def _await_verdict(self) -> Verdict:
        # Longer than the timeout of the first rank, whose verdict is then read.
        limit = self.timeout + timedelta(seconds=2 * POLL_S)
        first = self.ranks[0]
        # One rank reports that the first one is late; all others wait without polling.
        if self.rank == self.ranks[1] and not self._poll([f"rank/{first}"], NOTICE_S):
            self.say(f"{self._late([first])} after {NOTICE_S:.0f} s; the others wait")
        try:
            self.store.wait(["verdict"], limit)
        except dist.DistNetworkError:
            raise
        except RuntimeError:
            return Verdict(
                (f"{ranks_text([first])} has published no comparison of all ranks for {limit.total_seconds():.0f} s",)
            )
        return Verdict.from_text(self.store.get("verdict").decode())

    def _leave(self, verdict: Verdict) -> None:
        """After an error wait until all ranks have read the verdict: this rank may hold the store."""
        if not verdict.errors:
            return
        self.mark_read()
        if self.rank == self.ranks[0]:
            end = time.monotonic() + STAY_S
            while self.store.add("read", 0) < len(self._arrived(self.ranks)) and time.monotonic() < end:
                time.sleep(0.02)

    def _arrived(self, ranks: Sequence[int]) -> list[int]:
        return [rank for rank in ranks if self.store.check([f"rank/{rank}"])]

    def _get(self, keys: list[str]) -> list[str]:
        return [value.decode() for value in self.store.multi_get(keys)] if keys else []

    def _poll(self, keys: list[str], seconds: float) -> bool:
        """Return whether all keys exist in time. A wait of the store that times out would print C++ warnings."""
        end, pause = time.monotonic() + seconds, 0.002
        while not self.store.check(keys):
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        return True

    def _late(self, ranks: Sequence[int]) -> str:
        have, _, rest = self.late.partition(" ")
        return f"{ranks_text(ranks)} {'has' if len(ranks) == 1 else have} {rest}"
