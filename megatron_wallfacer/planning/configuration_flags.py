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
    """Return the plugin's flags that select the grid and the options of ``choice``."""
    plan, grid = choice.plan, choice.plan.grid
    # A named scheme sets and fixes all flags of the grid except the placement.
    is_free = not choice.name
    return _given(
        {
            "--wallfacer-cp-size": grid.cp_size,
            "--wallfacer-scheme": choice.name or "team-ring",
            "--wallfacer-head-size": is_free and grid.head,
            "--wallfacer-team-size": is_free and grid.team,
            "--wallfacer-ring-inner-size": is_free and grid.ring_inner,
            "--wallfacer-placement": len(grid.placement) > 1 and ",".join(grid.placement),
            "--wallfacer-forward": is_free and plan.forward,
            "--wallfacer-backward": is_free and plan.backward,
            "--wallfacer-head-groups": is_free and plan.head_groups,
            "--wallfacer-keep-gathered-q": is_free and choice.keep_gathered_q,
        }
    )


def configuration_flags(configuration: Configuration) -> Flags:
    """Return every flag of a configuration except those of the model, the data and the learning rate."""
    sizes, options = configuration.sizes, configuration.options
    tokens = configuration.choice.job.shape.tokens * sizes.cp
    recomputes = options.recompute != "none"
    return _given(
        {
            "--tensor-model-parallel-size": sizes.tp,
            "--sequence-parallel": sizes.tp > 1,
            "--pipeline-model-parallel-size": sizes.pp > 1 and sizes.pp,
            "--seq-length": tokens,
            "--max-position-embeddings": tokens,
            "--micro-batch-size": 1,
            "--global-batch-size": sizes.dp * sizes.microbatches,
            "--bf16": True,
            "--use-distributed-optimizer": True,
            "--overlap-grad-reduce": True,
            "--overlap-param-gather": True,
            "--grad-reduce-in-bf16": options.gradient_bytes == 2,
            "--use-precision-aware-optimizer": options.adam != "device",
            "--optimizer-cpu-offload": options.adam == "host",
            "--recompute-granularity": recomputes and "full",
            "--recompute-method": recomputes and "uniform",
            "--recompute-num-layers": recomputes and 1,
            "--wallfacer-keep-attention-output": options.recompute == "keep-attention",
            "--wallfacer-keep-on-host": recomputes and _rounded_up(options.outputs_on_host),
            "--wallfacer-layer-inputs-on-host": recomputes and _rounded_up(options.inputs_on_host),
            **({"--wallfacer-cp-size": 1} if sizes.cp == 1 else grid_flags(configuration.choice)),
            "--wallfacer-loss-tiles": options.loss_tiles > 1 and options.loss_tiles,
            "--wallfacer-mlp-tiles": options.mlp_tiles > 1 and options.mlp_tiles,
        }
    )


def _given(flags: Flags) -> Flags:
    """Return the flags without those whose value is zero or False."""
    return {flag: value for flag, value in flags.items() if value}


def _rounded_up(fraction: float) -> float:
    """Round upwards, to four decimal places, because a smaller fraction could mean one layer less."""
    return ceil(1e4 * fraction - 1e-6) / 1e4


def command_line(flags: Mapping[str, object]) -> str:
    """Return flags as text for a command line."""
    return " ".join(flag if value is True else f"{flag} {value}" for flag, value in flags.items())


def save_flags(path: Path, flags: Flags, origin: str) -> None:
    """Write flags as a preset for ``wallfacer run`` and ``extends:``.

    The first line of the file is a comment with ``origin``, the command that chose the flags.
    """
    import yaml

    path.write_text(f"# {origin}\n{yaml.safe_dump({'MODEL_ARGS': flags}, sort_keys=False)}")
