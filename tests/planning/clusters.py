"""Small clusters and plans for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster import Cluster, Device, LinkSpeed
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape

#: Kernels and links only, with round numbers.
PLAIN = Cluster("plain", 4, 4, LinkSpeed(10.0, 2.0), LinkSpeed(1.0, 10.0), Device(1.0), nics=4)
SHAPE = Shape(tokens=512, q_heads=8, kv_heads=8, head_dim=64)
#: Every kind of schedule whose ranks are alike.
ALIKE: dict[str, dict[str, Any]] = {
    "ring": {"scheme": "ring"},
    "tokenring": {"scheme": "tokenring"},
    "double-ring": {"scheme": "double-ring", "ring_inner_size": 4},
    "burst": {"scheme": "burst", "ring_inner_size": 4},
    "all-gather": {"scheme": "all-gather"},
    "mesh": {"scheme": "mesh", "team_size": 4},
    "usp": {"scheme": "usp", "head_size": 4},
    "team of 2 inside": {"scheme": "team-ring", "team_size": 2, "placement": "teams-adjacent"},
    "team of 8 across": {"scheme": "team-ring", "team_size": 8, "placement": "rings-adjacent"},
    "all axes": {"scheme": "team-ring", "head_size": 2, "team_size": 2, "ring_inner_size": 2},
    "pass-q": {"scheme": "team-ring", "team_size": 4, "forward": "pass-q", "backward": "pass-q"},
    "both ways": {"scheme": "ring", "bidirectional": True},
}


def choice(cluster: Cluster = PLAIN, shape: Shape = SHAPE, cp_size: int = 16, **options: Any) -> Choice:
    """Return a plan on a cluster."""
    heads = {"q_heads": shape.q_heads, "kv_heads": shape.kv_heads}
    keep_gathered_q = options.pop("keep_gathered_q", False)
    return Choice(
        AttentionJob(cluster, shape, cp_size), make_plan(cp_size=cp_size, **heads, **options), keep_gathered_q
    )


def with_device(cluster: Cluster, **changes: float) -> Cluster:
    """Return a cluster with another device."""
    return replace(cluster, device=replace(cluster.device, **changes))
