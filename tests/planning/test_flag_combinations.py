"""Combinations of flags, and their parts of the layers in host memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.flag_combinations import (
    FlagCombination,
    flag_combinations,
    has_plain_optimizer,
    training_options,
)
from megatron_wallfacer.planning.model import MODELS
from megatron_wallfacer.planning.rank_memory import host_bytes
from megatron_wallfacer.planning.training_options import ParallelSizes, TrainingOptions

LLAMA, TOKENS, CP8, NONE = MODELS["llama3-8b"], 131072, ParallelSizes(cp=8), AttentionMemory()
CLUSTER = load_cluster("h100-8x8", 1)
KEPT = FlagCombination("keep-attention", inputs_on_host=True, outputs_on_host=True)


def options(flags: FlagCombination, forward_s: float = 2.0, **changes: float) -> TrainingOptions:
    return training_options(flags, LLAMA, replace(CLUSTER, **changes), TOKENS, NONE, CP8, forward_s)


def test_only_supported_combinations_are_generated() -> None:
    found = list(flag_combinations(CLUSTER, 8, "all"))
    assert len(set(found)) == len(found)
    for one in found:
        assert not (one.gradient_bytes == 2 and (one.loss_tiles or one.mlp_tiles))
        assert not (one.outputs_on_host and one.recompute != "keep-attention")
        assert not (one.inputs_on_host and one.recompute == "none")
    assert {one.adam for one in found} == {"device", "precision-aware", "host"}
    assert {one.adam for one in flag_combinations(CLUSTER, 8)} == {"device"}
    assert {one.gradient_bytes for one in flag_combinations(CLUSTER, 8, "plain")} == {4}


def test_one_rank_keeps_no_output() -> None:
    assert {one.recompute for one in flag_combinations(CLUSTER, 1)} == {"none", "full"}


@pytest.mark.parametrize("missing", ["host_link", "host_memory_gb"])
def test_without_a_host_nothing_goes_there(missing: str) -> None:
    found = list(flag_combinations(replace(CLUSTER, **{missing: None}), 8, "all"))
    assert not any(one.inputs_on_host or one.outputs_on_host or one.adam == "host" for one in found)


def test_all_layers_go_to_a_host_that_has_room() -> None:
    found = options(KEPT)
    assert (found.inputs_on_host, found.outputs_on_host) == (1.0, 1.0)


def test_host_memory_limits_the_layers() -> None:
    """8 ranks of 17.3 GB for 8 layers each: 277 GB for a half of what all need."""
    found = options(KEPT, host_memory_gb=277.5)
    assert found.inputs_on_host == found.outputs_on_host == 0.5
    assert 8 * host_bytes(LLAMA, TOKENS, NONE, CP8, found) <= 277.5e9
    on_host = replace(KEPT, adam="host")
    assert options(on_host, host_memory_gb=277.5).inputs_on_host < 0.5


def test_the_host_link_limits_the_layers() -> None:
    """A layer's 2.16 GB take 43 ms; 50 ms hide all of it, 22 ms a half."""
    assert options(KEPT, forward_s=0.05).inputs_on_host == 1.0
    assert options(KEPT, forward_s=0.0216).inputs_on_host == pytest.approx(0.5, abs=1 / 32)
    assert options(KEPT, forward_s=0.0, host_link=1.0).inputs_on_host == 0.0


def test_only_the_first_optimizer_is_plain() -> None:
    assert has_plain_optimizer(TrainingOptions())
    assert not has_plain_optimizer(TrainingOptions(gradient_bytes=2))
    assert not has_plain_optimizer(TrainingOptions(adam="host"))
