"""Overheads of memory-saving options, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.inventory import Activations
from megatron_wallfacer.planning.model import MODELS
from megatron_wallfacer.planning.step_overheads import StepOverheads, exposed_copies_s, host_adam_s, tile_overheads
from megatron_wallfacer.planning.training_options import ParallelSizes, TrainingOptions

LLAMA, TOKENS, CP8 = MODELS["llama3-8b"], 131072, ParallelSizes(cp=8)
CLUSTER = load_cluster("h100-8x8", 1)
MLP = 3 * 4096 * 14336


def overheads(**options: object) -> StepOverheads:
    return tile_overheads(LLAMA, CLUSTER, TOKENS, CP8, TrainingOptions(**options))


def test_one_tile_costs_nothing() -> None:
    assert overheads() == StepOverheads()


def test_tiled_mlps_run_once_more_and_rewrite_their_gradients() -> None:
    found = overheads(mlp_tiles=16)
    # 78 ms of matrices per layer and 4.5 ms of the activation function; a gradient of 4 bytes is read and written.
    flops = 2 * MLP * TOKENS / (989e12 * 0.6)
    assert found.mlp_s == pytest.approx(32 * (flops + 2 * 3 * 14336 * TOKENS / 2.5e12))
    assert found.rewrites_s == pytest.approx(32 * 15 * 8 * MLP / 2.5e12)
    assert overheads(mlp_tiles=16, gradient_bytes=2).rewrites_s == pytest.approx(found.rewrites_s / 2)
    assert found.seconds == found.mlp_s + found.rewrites_s


def test_a_tiled_head_runs_once_more() -> None:
    found = overheads(loss_tiles=128)
    assert found.head_s == pytest.approx(2 * 4096 * 128256 * TOKENS / (989e12 * 0.6))
    assert found.rewrites_s == pytest.approx(127 * 8 * 4096 * 128256 / 2.5e12)


def test_copies_are_exposed_where_a_layer_is_shorter() -> None:
    kept = Activations(LLAMA, TOKENS, layers=4, recompute="keep-attention", outputs_on_host=1.0, inputs_on_host=0.5)
    output, hidden = 2 * 4096 * TOKENS + 4 * 32 * TOKENS, 2 * 4096 * TOKENS
    both, one = (output + hidden) / 50e9, output / 50e9
    assert exposed_copies_s(kept, CLUSTER, 10.0, 10.0) == 0
    assert exposed_copies_s(kept, CLUSTER, 0.01, 10.0) == pytest.approx(2 * (both - 0.01) + 2 * (one - 0.01))
    assert exposed_copies_s(kept, CLUSTER, 0.0, 0.0) == pytest.approx(4 * both + 4 * one)
    assert exposed_copies_s(replace(kept, outputs_on_host=0, inputs_on_host=0), CLUSTER, 0.0, 0.0) == 0
    assert exposed_copies_s(replace(kept, attention=AttentionMemory(kept=1e9)), CLUSTER, 0.0, 0.0) == pytest.approx(
        4 * both + 4 * one + 8 * 1e9 / 50e9
    )


def test_adam_on_the_host() -> None:
    """About a second for 8B parameters: 225 GB of host memory traffic, and 6 bytes of a parameter over the link."""
    parameters = (32 * LLAMA.layer_parameters + LLAMA.vocabulary_parameters) / 8
    expected = 6 * parameters / 50e9 + 8 * 28 * parameters / 200e9
    assert host_adam_s(LLAMA, CLUSTER, CP8, TrainingOptions(adam="host")) == pytest.approx(expected)
    assert host_adam_s(LLAMA, CLUSTER, CP8, TrainingOptions()) == 0
