"""Megatron's NCCL options reach the axis groups; the start-up block names this rank's groups."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import plugin_state
from megatron_wallfacer.megatron.communicators import groups_text, nccl_options
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan

YAML = "cp: {max_ctas: 8, min_ctas: 2, is_high_priority_stream: true}\ndp: {max_ctas: 1}\n"


class Options:
    """Stands for ``ProcessGroupNCCL.Options``, which a torch without CUDA lacks."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream
        self.config = SimpleNamespace()


def job(**more: Any) -> argparse.Namespace:
    return argparse.Namespace(distributed_timeout_minutes=3, **more)


@pytest.fixture
def communicators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Path of a YAML file of communicators."""
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    path = tmp_path / "communicators.yaml"
    path.write_text(YAML)
    return str(path)


def test_entry_of_the_context_parallel_group_applies(communicators: str) -> None:
    make = nccl_options(job(nccl_communicator_config_path=communicators, high_priority_stream_groups=None))
    options = make()
    assert vars(options.config) == {"max_ctas": 8, "min_ctas": 2}
    assert options.is_high_priority_stream
    assert make() is not options  # torch.distributed writes into it


def test_no_entry_no_options(communicators: str) -> None:
    assert nccl_options(job(nccl_communicator_config_path=None))() is None
    Path(communicators).write_text("dp: {max_ctas: 1}\n")
    assert nccl_options(job(nccl_communicator_config_path=communicators, high_priority_stream_groups=["dp"]))() is None


def test_a_stream_of_high_priority(communicators: str) -> None:
    options = nccl_options(job(nccl_communicator_config_path=None, high_priority_stream_groups=["cp"]))()
    assert options.is_high_priority_stream
    assert not vars(options.config)


def test_options_reach_the_groups_of_every_plan(communicators: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def connected(group: object, grid: Grid, kind: str, device: torch.device, **options: Any) -> SimpleNamespace:
        asked.append((grid, options["timeout"].seconds, options["options"]().config.max_ctas))
        return SimpleNamespace(groups=AxisGroups(grid, 0, (0, 1), ("a", "a"), {}))

    monkeypatch.setattr(plugin_state, "connected", connected)
    monkeypatch.setattr(plugin_state, "at_exit", lambda step: asked.append(step.__name__))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    state = PluginState((0, 19, 2), torch.device("cpu"))
    state.args = job(nccl_communicator_config_path=communicators, high_priority_stream_groups=None)
    ring, team = Grid(ring_outer=2), Grid(team=2)
    state.turn_on(Settings(Plan(ring), window_plan=Plan(team)), None)
    state.connect(object())
    assert asked == [(ring, 180, 8), (team, 180, 8), "destroy_world"]
    assert [groups.grid for groups in state.axis_groups] == [ring, team]


def test_groups_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, inputs, results, other = "abcd", "ab", "ba", "dcba"  # stand-ins; as many ranks as letters
    monkeypatch.setattr(dist, "get_world_size", len)
    ring = AxisGroups(
        Grid(team=2, ring_outer=2),
        0,
        (0, 1, 2, 3),
        ("a",) * 4,
        {("cp", "inputs"): whole, ("cp", "results"): whole, ("team", "inputs"): inputs, ("team", "results"): results},
        "nccl",
        1.25,
        300 * 2**20,
    )
    team = AxisGroups(
        Grid(team=4),
        0,
        (0, 1, 2, 3),
        ("a",) * 4,
        {("cp", "inputs"): whole, ("cp", "results"): whole, ("team", "inputs"): whole, ("team", "results"): other},
        "nccl",
        0.5,
        20 * 2**20,
    )
    assert groups_text([ring, team]) == (
        "The rank is in 4 process groups: cp (4 ranks), team inputs (2 ranks), team results (2 ranks), team results "
        "(4 ranks). Connecting took 1.75 s and 320 MiB of GPU memory."
    )
    assert groups_text([AxisGroups(Grid(), 0, (0,), ("a",), {("cp", "inputs"): "a"})]) == (
        "The rank is in 1 process group: cp (1 ranks). Connecting took 0.00 s."
    )


@pytest.mark.parametrize("text", ["cp: [1]", "- cp", "cp: 1"])
def test_a_file_of_something_else_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "communicators.yaml"
    path.write_text(text)
    with pytest.raises(WallfacerError, match=r"communicators.yaml: must map names of groups to options of NCCL"):
        nccl_options(job(nccl_communicator_config_path=str(path)))
