"""Exchange of records through the job's store. Every rank writes one record. The first rank compares all records.

Ranks wait for keys of the store, so the exchange needs no process group of the ranks. The store has a single copy of
equal records.
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
#: Longest time in seconds for which the first rank keeps the store open after an error, so that others can read it.
STAY_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """One exchange of records between ranks.

    Attributes:
        store: store of the job, with a prefix that no other exchange uses.
        ranks: global ranks that take part. The first rank compares all records.
        rank: global rank of this process.
        timeout: time after which the exchange fails if a rank has written no record.
        late: words that follow the ranks in the message about ranks without a record, such as ``have not started``.
        say: function that prints one line.
    """

    store: dist.Store
    ranks: Sequence[int]
    rank: int
    timeout: timedelta
    late: str = "have not started"
    say: Callable[[str], None] = print

    def run(self, text: str, read: Callable[[str], T], compare: Callable[[Mapping[int, T]], Verdict]) -> Verdict:
        """Exchange the records of all ranks, and return the verdict, which is equal on all ranks.

        Args:
            text: record of this rank.
            read: function that converts the text of a record to the record.
            compare: function from the arrived records, by rank, to the verdict. Only the first rank calls the function.
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
        """Write the verdict to the store. Only the first rank calls this method."""
        self.store.set("verdict", verdict.to_text())

    def mark_read(self) -> None:
        """Announce that this rank no longer needs the store."""
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
            # A difference ends the job at once, even if some ranks have not written a record.
            if not late or verdict.errors:
                return verdict
            now = time.monotonic()
            if now - started > self.timeout.total_seconds():
                return Verdict((f"{self._late(late)} after {now - started:.0f} s, the timeout of process groups",))
            if now - noticed > NOTICE_S:
                noticed = now
                self.say(f"{self._late(late)} after {now - started:.0f} s; the others wait")

    def _await_verdict(self) -> Verdict:
        # The limit is longer than the first rank's timeout, so that the first rank can still publish a verdict.
        limit = self.timeout + timedelta(seconds=2 * POLL_S)
        first = self.ranks[0]
        # Only the second rank reports that the first one is late. All others wait without polling.
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
        """After an error, keep the first rank alive for a while. Its process may serve the store that others read."""
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
        # store.wait would print C++ warnings at a timeout.
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
