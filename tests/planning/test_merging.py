"""Merged attention calls are not bought with waiting: no pass is predicted to take longer than with all calls apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape


@pytest.mark.parametrize(
    ("cluster", "cp_size", "tokens", "options", "gain"),
    [
        ("h100-8x8", 64, 2048, {"team_size": 8}, 1.1),
        ("h100-8x8", 64, 4096, {}, 1.03),
        ("h100-8x8", 8, 1024, {}, 1.05),
        # Calls are large, or ring steps too few.
        ("h100-8x8", 64, 16384, {}, 1.0),
        ("h100-8x8", 8, 4096, {}, 1.0),
    ],
)
def test_merged_calls_take_no_longer(cluster: str, cp_size: int, tokens: int, options: dict, gain: float) -> None:
    shape = Shape(tokens=tokens, q_heads=32, kv_heads=8, head_dim=128)
    job = AttentionJob(load_cluster(cluster), shape, cp_size)
    plan = make_plan("team-ring", cp_size, q_heads=32, kv_heads=8, tokens=tokens, **options)
    merged, apart = (Choice(job, one).simulation for one in (plan, replace(plan, shard_work=None)))
    ends = zip(merged.pass_s, (0.0, merged.pass_s[0]), apart.pass_s, (0.0, apart.pass_s[0]), strict=True)
    for end, start, end_apart, start_apart in ends:
        assert end - start <= (end_apart - start_apart) * (1 + 1e-9)
    assert gain * merged.seconds <= apart.seconds * (1 + 1e-9)
