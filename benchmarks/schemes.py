"""The table of what is compared: labels, and how each is made.

A label of ours ends in where a team is: ``in`` its node (placement ``teams-adjacent``) or ``x``, across nodes
(``rings-adjacent``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.config import Config
from benchmarks.contender import Contender
from benchmarks.ours import Ours
from benchmarks.peers.ring_flash import RingFlashAttention
from benchmarks.peers.usp import Usp
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.schedule.schemes import divisors

PLACEMENTS = {"in": "teams-adjacent", "x": "rings-adjacent"}


def plan_table(ranks: int) -> dict[str, dict[str, Any]]:
    """Arguments of ``make_plan`` by label, for our schemes on so many ranks. A new scheme is a new line here."""
    table: dict[str, dict[str, Any]] = {"ring": {"scheme": "ring"}, "all-gather": {"scheme": "all-gather"}}
    for size in divisors(ranks)[1:-1]:
        for where, placement in PLACEMENTS.items():
            table[f"team-ring-{size}-{where}"] = {"scheme": "team-ring", "team_size": size, "placement": placement}
    for size in divisors(ranks)[1:]:
        if ranks % (size * size) == 0:
            for where, placement in PLACEMENTS.items():
                table[f"wallfacer-{size}-{where}"] = {"scheme": "wallfacer", "team_size": size, "placement": placement}
    return table


def peers(ranks: int) -> list[Contender]:
    """The peers, at every degree that fits so many ranks."""
    return [RingFlashAttention(), *(Usp(degree, ranks // degree) for degree in divisors(ranks)[1:])]


def contenders(config: Config, patterns: Sequence[str] | None) -> list[Contender]:
    """Everything in the table, or what the patterns name, in the order of the table.

    Args:
        config: a setting; its own schemes come after the table's.
        patterns: labels, or shell patterns of labels.

    Raises:
        WallfacerError: a pattern that fits nothing.
    """
    ranks, kappa = config.topology.ranks, config.shape.kv_heads / config.shape.heads
    table: Mapping[str, Mapping[str, Any]] = {**plan_table(ranks), **config.schemes}
    everything: list[Contender] = [Ours(label, ranks, kappa, arguments) for label, arguments in table.items()]
    everything += peers(ranks)
    if not patterns:
        return everything
    labels = [contender.label for contender in everything]
    for pattern in patterns:
        if not any(fnmatchcase(label, pattern) for label in labels):
            raise WallfacerError(f"--schemes {pattern}: fits none of {', '.join(labels)}")
    return [one for one in everything if any(fnmatchcase(one.label, pattern) for pattern in patterns)]
