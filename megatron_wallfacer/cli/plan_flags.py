"""Flags of a configuration, Megatron's and the plugin's, and the preset that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_wallfacer.planning.configuration import Configuration
    from megatron_wallfacer.planning.search import Choice

Flags = dict[str, str | int | float | bool]


def flags_of(choice: Choice) -> Flags:
    """The plugin's flags for a choice, as Megatron's tests write them in YAML."""
    plan = choice.plan
    grid = plan.grid
    scheme = choice.name or "team-ring"
    flags: Flags = {"--wallfacer-cp-size": grid.cp_size, "--wallfacer-scheme": scheme}
    if choice.name:
        # What a name fixes need not be said, and may not be; its axes were chosen by it.
        return flags | ({"--wallfacer-placement": ",".join(grid.placement)} if len(grid.placement) > 1 else {})
    for axis, flag in (("head", "head-size"), ("team", "team-size"), ("ring_inner", "ring-window")):
        flags[f"--wallfacer-{flag}"] = grid.size_of(axis)
    if len(grid.placement) > 1:
        flags["--wallfacer-placement"] = ",".join(grid.placement)
    flags |= {"--wallfacer-forward": plan.forward, "--wallfacer-backward": plan.backward}
    flags["--wallfacer-head-groups"] = plan.head_groups
    if choice.q_kept:
        flags["--wallfacer-keep-gathered-q"] = True
    return flags


def configuration_flags(configuration: Configuration) -> Flags:
    """Return every flag of a configuration but those of the model, the data and the learning rate."""
    spread = configuration.spread
    tokens = configuration.choice.job.shape.tokens * spread.cp
    flags: Flags = {"--tensor-model-parallel-size": spread.tp}
    if spread.tp > 1:
        flags["--sequence-parallel"] = True
    if spread.pp > 1:
        flags["--pipeline-model-parallel-size"] = spread.pp
    flags |= {"--seq-length": tokens, "--max-position-embeddings": tokens, "--micro-batch-size": 1}
    flags |= {"--global-batch-size": spread.dp * spread.microbatches, "--bf16": True}
    flags |= _optimizer(configuration) | _recomputation(configuration)
    if spread.cp == 1:
        return flags | {"--wallfacer-cp-size": 1} | _tiles(configuration)
    return flags | flags_of(configuration.choice) | _tiles(configuration)


def _optimizer(configuration: Configuration) -> Flags:
    software = configuration.software
    flags: Flags = {"--use-distributed-optimizer": True, "--overlap-grad-reduce": True, "--overlap-param-gather": True}
    if software.gradient_bytes == 2:
        flags["--grad-reduce-in-bf16"] = True
    if software.adam != "device":
        flags["--use-precision-aware-optimizer"] = True
    if software.adam == "host":
        flags["--optimizer-cpu-offload"] = True
    return flags


def _recomputation(configuration: Configuration) -> Flags:
    software = configuration.software
    if software.recompute == "none":
        return {}
    flags: Flags = {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1}
    if software.recompute == "keep-attention":
        flags["--wallfacer-keep-attention-output"] = True
    if software.outputs_on_host:
        flags["--wallfacer-keep-on-host"] = _part(software.outputs_on_host)
    if software.inputs_on_host:
        flags["--wallfacer-layer-inputs-on-host"] = _part(software.inputs_on_host)
    return flags


def _part(fraction: float) -> float:
    """A part of the layers in four digits; rounded up, because layers are counted down."""
    return ceil(1e4 * fraction - 1e-6) / 1e4


def _tiles(configuration: Configuration) -> Flags:
    software = configuration.software
    tiles = {"--wallfacer-loss-tiles": software.loss_tiles, "--wallfacer-mlp-tiles": software.mlp_tiles}
    return {flag: count for flag, count in tiles.items() if count > 1}


def command_line(flags: Mapping[str, object]) -> str:
    """Return flags as they are typed."""
    return " ".join(flag if value is True else f"{flag} {value}" for flag, value in flags.items())


def save_flags(path: Path, flags: Flags, origin: str) -> None:
    """Write flags as a preset that ``wallfacer run`` and ``extends:`` take.

    Args:
        path: the YAML file.
        flags: what it holds.
        origin: the command that found them.
    """
    import yaml

    path.write_text(f"# {origin}\n{yaml.safe_dump({'MODEL_ARGS': flags}, sort_keys=False)}")
