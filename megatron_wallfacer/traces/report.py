"""Sum the attention time of each rank of a run, and find the ranks that limit the other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_wallfacer.engine.timeline import total
from megatron_wallfacer.traces.timelines import RankTimeline


@dataclass(frozen=True)
class RankTotals:
    """Attention times of one rank in seconds, summed over all layers and micro-batches.

    Attributes:
        rank: rank of the job.
        host: host name of the node, or empty if the file does not contain the name.
        passes: number of forward and backward passes of attention.
        attention_s: seconds in attention passes.
        computing_s: seconds of ``attention_s`` in attention kernels.
        exposed_s: seconds of ``attention_s`` in which the rank waits for a transfer without computing.
        exposed_share: ``exposed_s`` divided by ``attention_s``.
    """

    rank: int
    host: str
    passes: int
    attention_s: float
    computing_s: float
    exposed_s: float
    exposed_share: float


def rank_totals(timeline: RankTimeline) -> RankTotals:
    """Return the totals of all attention passes of a timeline."""
    totals = total(timeline.events)
    host = timeline.origin.host if timeline.origin else ""
    return RankTotals(timeline.rank, host, **asdict(totals), exposed_share=totals.exposed_share)


def slowest(totals: Sequence[RankTotals]) -> RankTotals:
    """Return the rank with the longest attention time."""
    return max(totals, key=lambda rank: rank.attention_s)


def least_exposed(totals: Sequence[RankTotals]) -> RankTotals:
    """Return the rank that waits least for messages. Most likely this rank delays the others."""
    return min(totals, key=lambda rank: rank.exposed_s)
