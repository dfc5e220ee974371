"""Flags of Megatron and of the plugin that start a planned configuration, and presets with these flags."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path

from megatron_wallfacer.planning.choice import Choice
from megatron_wallfacer.planning.configuration import Configuration

Flags = dict[str, str | int | float | bool]
"""Values by flag, as in ``MODEL_ARGS`` of a preset. A flag without a value has the value True."""


def grid_flags(choice: Choice) -> Flags:
    """Return the plugin's flags for the grid and the options of a choice."""
    plan = choice.plan
    grid = plan.grid
    flags: Flags = {"--wallfacer-cp-size": grid.cp_size, "--wallfacer-scheme": choice.name or "team-ring"}
    placement = {"--wallfacer-placement": ",".join(grid.placement)} if len(grid.placement) > 1 else {}
    if choice.name:
        # A named scheme sets and fixes all other flags of the grid.
        return flags | placement
    for axis, flag in (("head", "head-size"), ("team", "team-size"), ("ring_inner", "ring-inner-size")):
        flags[f"--wallfacer-{flag}"] = grid.size_of(axis)
    flags |= placement | {"--wallfacer-forward": plan.forward, "--wallfacer-backward": plan.backward}
    flags["--wallfacer-head-groups"] = plan.head_groups
    if choice.keep_gathered_q:
        flags["--wallfacer-keep-gathered-q"] = True
    return flags


def configuration_flags(configuration: Configuration) -> Flags:
    """Return every flag of a configuration except those of the model, the data and the learning rate."""
    sizes = configuration.sizes
    tokens = configuration.choice.job.shape.tokens * sizes.cp
    flags: Flags = {"--tensor-model-parallel-size": sizes.tp}
    if sizes.tp > 1:
        flags["--sequence-parallel"] = True
    if sizes.pp > 1:
        flags["--pipeline-model-parallel-size"] = sizes.pp
    flags |= {"--seq-length": tokens, "--max-position-embeddings": tokens, "--micro-batch-size": 1}
    flags |= {"--global-batch-size": sizes.dp * sizes.microbatches, "--bf16": True}
    flags |= _optimizer(configuration) | _recomputation(configuration)
    grid = {"--wallfacer-cp-size": 1} if sizes.cp == 1 else grid_flags(configuration.choice)
    return flags | grid | _tiles(configuration)


def _optimizer(configuration: Configuration) -> Flags:
    options = configuration.options
    flags: Flags = {"--use-distributed-optimizer": True, "--overlap-grad-reduce": True, "--overlap-param-gather": True}
    if options.gradient_bytes == 2:
        flags["--grad-reduce-in-bf16"] = True
    if options.adam != "device":
        flags["--use-precision-aware-optimizer"] = True
    if options.adam == "host":
        flags["--optimizer-cpu-offload"] = True
    return flags


def _recomputation(configuration: Configuration) -> Flags:
    options = configuration.options
    if options.recompute == "none":
        return {}
    flags: Flags = {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1}
    if options.recompute == "keep-attention":
        flags["--wallfacer-keep-attention-output"] = True
    if options.outputs_on_host:
        flags["--wallfacer-keep-on-host"] = _rounded_up(options.outputs_on_host)
    if options.inputs_on_host:
        flags["--wallfacer-layer-inputs-on-host"] = _rounded_up(options.inputs_on_host)
    return flags


def _rounded_up(fraction: float) -> float:
    """Return a fraction of layers, rounded up to four digits, because the plugin rounds numbers of layers down."""
    return ceil(1e4 * fraction - 1e-6) / 1e4


def _tiles(configuration: Configuration) -> Flags:
    options = configuration.options
    tiles = {"--wallfacer-loss-tiles": options.loss_tiles, "--wallfacer-mlp-tiles": options.mlp_tiles}
    return {flag: count for flag, count in tiles.items() if count > 1}


def command_line(flags: Mapping[str, object]) -> str:
    """Return flags as text for a command line."""
    return " ".join(flag if value is True else f"{flag} {value}" for flag, value in flags.items())


def save_flags(path: Path, flags: Flags, origin: str) -> None:
    """Write flags as a preset for ``wallfacer run`` and ``extends:``.

    Args:
        path: YAML file to write.
        flags: values by flag.
        origin: command that chose the flags, for the first line of the file.
    """
    import yaml

    path.write_text(f"# {origin}\n{yaml.safe_dump({'MODEL_ARGS': flags}, sort_keys=False)}")
