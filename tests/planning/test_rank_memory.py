"""Bytes of a rank: its states, the inventory, and what attention keeps in every layer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.inventory import bytes_at, peak
from megatron_wallfacer.planning.model import MODELS
from megatron_wallfacer.planning.rank_memory import (
    host_bytes,
    micro_batches_in_flight,
    parameters_of_rank,
    rank_buffers,
    state_buffers,
)
from megatron_wallfacer.planning.training_options import ParallelSizes, TrainingOptions
from megatron_wallfacer.schedule.memory import peak_bytes, result_bytes, workspace
from tests.planning.clusters import ALIKE, choice

LLAMA, TOKENS, NONE = MODELS["llama3-8b"], 131072, AttentionMemory()
CP8 = ParallelSizes(cp=8)
TILED = TrainingOptions(recompute="keep-attention", loss_tiles=128, mlp_tiles=16)
HIDDEN = 2 * 4096 * TOKENS


def states(**options: object) -> float:
    return sum(buffer.nbytes for buffer in state_buffers(LLAMA, CP8, TrainingOptions(**options)))


def test_states_of_a_parameter() -> None:
    count = parameters_of_rank(LLAMA, CP8)
    assert states() == pytest.approx(count * (2 + 4 + 12 / 8))
    assert states(gradient_bytes=2) == pytest.approx(count * (2 + 2 + 12 / 8))
    assert states(adam="precision-aware") == pytest.approx(count * (2 + 4 + 10 / 8))
    assert states(adam="host") == pytest.approx(count * (2 + 4))
    assert states(states="zero-2") == pytest.approx(count * (2 + 2 / 8 + 12 / 8))


def test_the_budget_of_an_8b_model_at_1m_tokens() -> None:
    """The issue's table, GB per rank of CP 8: optimizer and activations on the host."""
    options = replace(TILED, adam="host", outputs_on_host=1.0, inputs_on_host=1.0)
    work = AttentionMemory(backward=4.6e9)
    found = rank_buffers(LLAMA, TOKENS, work, CP8, options)
    assert peak(found)[0] == "attention"
    assert 66 < peak(found)[1] / 1e9 < 71
    host_gb = 8 * host_bytes(LLAMA, TOKENS, work, CP8, options) / 1e9
    assert host_gb == pytest.approx(554 + 128, abs=2)


@pytest.mark.parametrize("moment", ["forward", "head", "mlp", "attention", "projection"])
def test_what_is_on_the_host_leaves_two_device_buffers(moment: str) -> None:
    """Of 32 layers 30 leave the device, at every moment."""
    away = replace(TILED, outputs_on_host=1.0, inputs_on_host=1.0)
    here, gone = (bytes_at(rank_buffers(LLAMA, TOKENS, NONE, CP8, one), moment) for one in (TILED, away))
    kept = HIDDEN + 4 * 32 * TOKENS
    assert here - gone == pytest.approx(30 * (HIDDEN + kept))


def test_device_bytes_do_not_grow_with_layers_on_the_host() -> None:
    away = replace(TILED, outputs_on_host=1.0, inputs_on_host=1.0)
    sizes = []
    for layers in (4, 8):
        model = replace(LLAMA, layers=layers)
        states = sum(buffer.nbytes for buffer in state_buffers(model, CP8, away))
        sizes.append(peak(rank_buffers(model, TOKENS, NONE, CP8, away))[1] - states)
    assert sizes[0] == sizes[1]


def test_part_of_the_layers_may_stay() -> None:
    half = replace(TILED, outputs_on_host=0.5)
    kept = HIDDEN + 4 * 32 * TOKENS
    assert host_bytes(LLAMA, TOKENS, NONE, CP8, half) == 16 * kept
    here, gone = (peak(rank_buffers(LLAMA, TOKENS, NONE, CP8, one))[1] for one in (TILED, half))
    assert here - gone == pytest.approx(14 * kept)


def test_micro_batches_in_flight_are_counted() -> None:
    assert micro_batches_in_flight(ParallelSizes(pp=4, microbatches=2)) == 2
    assert micro_batches_in_flight(ParallelSizes(pp=4, microbatches=8)) == 4


def test_a_pipeline_has_a_third_device_buffer_and_the_received_inputs() -> None:
    """Of 16 layers in flight (8 of a stage, two micro-batches) 13 leave the device."""
    sizes = ParallelSizes(pp=4, cp=8, microbatches=2)
    away = replace(TILED, outputs_on_host=1.0, inputs_on_host=1.0)
    here, gone = (bytes_at(rank_buffers(LLAMA, TOKENS, NONE, sizes, one), "attention") for one in (TILED, away))
    kept = HIDDEN + 4 * 32 * TOKENS
    assert here - gone == pytest.approx(13 * kept + (13 - 1) * HIDDEN)


def test_queries_that_are_kept_take_memory_in_every_layer() -> None:
    kept, gathered = (choice(scheme="team-ring", team_size=4, keep_gathered_q=q) for q in (True, False))
    queries = 3 * kept.job.shape.elements("q") * kept.job.shape.itemsize
    assert kept.memory.kept - gathered.memory.kept == queries
    sizes = [peak(rank_buffers(LLAMA, TOKENS, one.memory, CP8, TILED))[1] for one in (kept, gathered)]
    assert sizes[0] - sizes[1] >= 31 * queries


@pytest.mark.parametrize("name", ALIKE)
def test_a_pass_is_its_results_and_what_the_inventory_counts(name: str) -> None:
    """Workspace, results of kernels and kept buffers are those of the schedules."""
    one = choice(**ALIKE[name])
    shape, memory = one.job.shape, one.memory
    forward, backward = one.schedules(0)
    assert memory.exchanges_heads == (one.plan.grid.head > 1)
    assert memory.forward > workspace(forward, shape).nbytes
    assert memory.forward + memory.kept + result_bytes(forward, shape) == peak_bytes(forward, shape)
    assert memory.backward > workspace(backward, shape).nbytes
    assert memory.backward + result_bytes(backward, shape) == peak_bytes(backward, shape)
    assert memory.scaled(2).backward == 2 * memory.backward
