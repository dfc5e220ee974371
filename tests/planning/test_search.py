"""The search: its result against a simulation of everything, and its errors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.search import TIE, candidates, named_choices, preferred, search
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.memory import graphed_peak_bytes
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.volume import Shape
from tests.planning.clusters import PLAIN, SHAPE

JOBS = {
    "slow NICs": AttentionJob(PLAIN, SHAPE, 16),
    "one NIC per node": AttentionJob(replace(PLAIN, nics=1), SHAPE, 16),
    "grouped": AttentionJob(PLAIN, Shape(2048, 8, 2, 64), 16),
    "compute": AttentionJob(load_cluster("h100-8x8", 2), Shape(16384, 32, 8, 128), 16),
}


@pytest.mark.parametrize("name", JOBS)
def test_it_finds_the_best_of_all_candidates(name: str) -> None:
    everything = [one for one in candidates(JOBS[name]) if one.can_be_simulated]
    best = min(one.simulation.seconds for one in everything)
    found = search(JOBS[name])
    assert found.legal == len(everything)
    fastest = min(one.simulation.seconds for one in found.best)
    first, *others = found.best
    assert first.simulation.seconds <= 1.02 * best
    assert others == sorted(others, key=lambda one: one.simulation.seconds)
    equal = [one for one in found.best if one.simulation.seconds <= TIE * fastest]
    assert first in equal
    assert first.volume == min(one.volume for one in equal)


def test_of_equals_the_one_with_the_least_traffic_is_preferred() -> None:
    assert preferred([(1.0, 5.0), (1.019, 3.0), (1.021, 1.0)]) == 1
    assert preferred([(1.01, 3.0), (1.0, 3.0), (1.005, 3.0)]) == 1
    assert preferred([(2.0, 1.0), (1.0, 9.0)]) == 1


def test_it_beats_or_equals_every_named_scheme() -> None:
    job = JOBS["slow NICs"]
    best = search(job).best[0].simulation.seconds
    others = {one.name: one.simulation.seconds for one in named_choices(job)}
    assert {"ring", "double-ring", "ulysses", "usp", "all-gather", "mesh", "wallfacer", "burst"} <= set(others) | {
        "ulysses"
    }
    assert best <= min(others.values()) * 1.001


def test_every_candidate_divides_the_heads_and_is_of_the_right_size() -> None:
    for one in candidates(AttentionJob(PLAIN, Shape(512, 6, 6, 64), 12)):
        assert one.plan.grid.cp_size == 12
        assert 6 % one.plan.grid.head == 0


def test_memory_that_graphs_hold_is_counted() -> None:
    job = JOBS["slow NICs"]
    eager = Choice(job, Plan(Grid(ring_outer=job.cp_size)))
    graphed = replace(eager, job=replace(job, cuda_graphs=True))
    assert graphed.buffer_bytes == graphed_peak_bytes(graphed.schedules(0), job.shape) > eager.buffer_bytes


def test_choices_that_do_not_fit_are_left_out_and_none_is_an_error() -> None:
    job = JOBS["slow NICs"]
    roomy = search(job)
    tight = sorted(one.buffer_bytes for one in roomy.best)[1]
    found = search(job, memory_bytes=tight)
    assert found.too_large
    assert all(one.buffer_bytes <= tight for one in found.best)
    with pytest.raises(OptionError, match=r"memory=0.00 GB: must be at least 0\.\d\d GB, for head"):
        search(job, memory_bytes=1.0)
