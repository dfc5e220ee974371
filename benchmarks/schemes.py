"""The table of what is compared: labels, and how each is made.

A label of ours that ends in ``in`` or ``x`` has its teams in a node (placement ``teams-adjacent``) or across nodes
(``rings-adjacent``). One like ``u4-i1-c2-o2`` is a grid of 4 x 1 x 2 x 2 ranks along head, ring_inner, team and
ring_outer, the first standing nearest, with two pipelined head groups and the gathered queries kept for backward; one
in ``-1`` has one head group.
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
from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.schedule.grid import divisors

PLACEMENTS = {"in": "teams-adjacent", "x": "rings-adjacent"}


def plan_table(ranks: int, ranks_per_node: int) -> dict[str, dict[str, Any]]:
    """Arguments of ``make_plan`` by label, for our schemes on so many ranks. A new scheme is a new line here."""
    table: dict[str, dict[str, Any]] = {name: {"scheme": name} for name in ("ring", "all-gather", "tokenring")}
    if 1 < ranks_per_node < ranks:
        for groups in (1, 2):
            double = {"ring_inner_size": ranks_per_node, "head_groups": groups}
            table[f"double-ring-{groups}"] = {"scheme": "double-ring", **double}
        table["burst"] = {"scheme": "burst", "ring_inner_size": ranks_per_node}
    for size in divisors(ranks)[1:-1]:
        for where, placement in PLACEMENTS.items():
            plan = {"scheme": "team-ring", "team_size": size, "placement": placement, "head_groups": 1}
            table[f"team-ring-{size}-{where}"] = plan
    for size in divisors(ranks)[1:]:
        if ranks % (size * size) == 0:
            for where, placement in PLACEMENTS.items():
                plan = {"scheme": "wallfacer", "team_size": size, "placement": placement, "head_groups": 1}
                table[f"wallfacer-{size}-{where}"] = plan
    return table | _grids(ranks)


def _grids(ranks: int) -> dict[str, dict[str, Any]]:
    """Every grid of head, inner ring, team and outer ring that is not already there under a name."""
    table = {}
    for head in divisors(ranks):
        for inner in divisors(ranks // head):
            for team in divisors(ranks // head // inner):
                outer = ranks // head // inner // team
                if outer == 1 and inner > 1:
                    continue  # a single ring, which stands last
                axes = {"head_size": head, "ring_inner_size": inner, "team_size": team}
                plan = {"scheme": "team-ring", **axes, "placement": "head,ring_inner,team,ring_outer"}
                label = f"u{head}-i{inner}-c{team}-o{outer}"
                table[label] = {**plan, "head_groups": 2, "keep_gathered_q": True}
                table[f"{label}-1"] = {**plan, "head_groups": 1, "keep_gathered_q": True}
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
    ranks, heads = config.topology.ranks, (config.shape.heads, config.shape.kv_heads)
    table: Mapping[str, Mapping[str, Any]] = {**plan_table(ranks, config.topology.ranks_per_node), **config.schemes}
    everything: list[Contender] = []
    for label, arguments in table.items():
        try:
            everything.append(Ours(label, ranks, heads, arguments))
        except OptionError:
            if label in config.schemes:
                raise
            # A grid of the table whose head axis these heads do not divide along.
    everything += peers(ranks)
    if not patterns:
        return everything
    labels = [contender.label for contender in everything]
    for pattern in patterns:
        if not any(fnmatchcase(label, pattern) for label in labels):
            raise WallfacerError(f"--schemes {pattern}: fits none of {', '.join(labels)}")
    return [one for one in everything if any(fnmatchcase(one.label, pattern) for pattern in patterns)]
