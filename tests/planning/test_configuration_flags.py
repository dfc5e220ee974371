"""Flags of a configuration: each size and each option has one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.configuration import Configuration, Request
from megatron_wallfacer.planning.configuration_flags import command_line, configuration_flags
from megatron_wallfacer.planning.model import MODELS
from megatron_wallfacer.planning.training_options import ParallelSizes, TrainingOptions
from tests.planning.clusters import choice

PLAIN = Configuration(
    Request(MODELS["llama3-8b"], load_cluster("h100-8x8", 1), 8192),
    ParallelSizes(cp=16),
    TrainingOptions(recompute="none"),
    choice(scheme="ring"),
)
FULL = {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1}


def added(**changes: object) -> dict[str, object]:
    """Return the flags that a change of the options adds."""
    before = configuration_flags(PLAIN)
    after = configuration_flags(replace(PLAIN, options=replace(PLAIN.options, **changes)))
    assert before.items() <= after.items()
    return dict(after.items() - before.items())


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"loss_tiles": 16}, {"--wallfacer-loss-tiles": 16}),
        ({"mlp_tiles": 4}, {"--wallfacer-mlp-tiles": 4}),
        ({"gradient_bytes": 2}, {"--grad-reduce-in-bf16": True}),
        ({"adam": "precision-aware"}, {"--use-precision-aware-optimizer": True}),
        ({"adam": "host"}, {"--use-precision-aware-optimizer": True, "--optimizer-cpu-offload": True}),
        ({"recompute": "full"}, FULL),
        ({"recompute": "full", "inputs_on_host": 1.0}, FULL | {"--wallfacer-layer-inputs-on-host": 1.0}),
        (
            {"recompute": "keep-attention", "outputs_on_host": 21 / 32},
            FULL | {"--wallfacer-keep-attention-output": True, "--wallfacer-keep-on-host": 0.6563},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_each_choice_has_its_flags(changes: dict[str, object], flags: dict[str, object]) -> None:
    assert added(**changes) == flags


@pytest.mark.parametrize("layers", [32, 36, 80])
def test_a_part_of_the_layers_is_as_many_layers_again(layers: int) -> None:
    """The plugin takes whole layers, rounded down."""
    for count in range(1, layers + 1):
        part = added(recompute="full", inputs_on_host=count / layers)["--wallfacer-layer-inputs-on-host"]
        assert 0 < part <= 1
        assert int(part * layers + 1e-9) == count


def test_sizes() -> None:
    flags = configuration_flags(PLAIN)
    assert flags["--tensor-model-parallel-size"] == 1
    assert "--sequence-parallel" not in flags
    assert flags["--wallfacer-cp-size"] == 16
    assert flags["--seq-length"] == flags["--max-position-embeddings"] == 16 * 512
    assert flags["--use-distributed-optimizer"] is flags["--bf16"] is True
    split = configuration_flags(replace(PLAIN, sizes=ParallelSizes(tp=2, pp=4, cp=16, dp=3, microbatches=5)))
    assert split["--sequence-parallel"] is True
    assert (split["--tensor-model-parallel-size"], split["--pipeline-model-parallel-size"]) == (2, 4)
    assert (split["--micro-batch-size"], split["--global-batch-size"]) == (1, 15)


def test_one_context_parallel_rank_has_no_grid() -> None:
    flags = configuration_flags(replace(PLAIN, sizes=ParallelSizes(tp=8, cp=1)))
    assert {flag for flag in flags if flag.startswith("--wallfacer")} == {"--wallfacer-cp-size"}


def test_a_command_line() -> None:
    assert command_line({"--bf16": True, "--seq-length": 8}) == "--bf16 --seq-length 8"
