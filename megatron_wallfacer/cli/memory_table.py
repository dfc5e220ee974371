"""What a rank holds at each moment of a step, what sets the peak, and which flag removes how much of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.plan_flags import command_line, configuration_flags
from megatron_wallfacer.cli.table import figure, show_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron_wallfacer.planning.configuration import Configuration
    from megatron_wallfacer.planning.parallel import Software

#: Buffers that are named at each moment.
LARGEST = 3
ASSUMED = (
    "Norms, SwiGLU and rotary positions count as fused kernels, attention's kernels as their results. "
    "Fragmentation, the CUDA context and NCCL are not counted."
)


def show_memory(configuration: Configuration) -> None:
    """Print a table of moments, and one of flags that are not in use."""
    from megatron_wallfacer.planning.inventory import MOMENTS, bytes_at, peak

    buffers, (highest, nbytes) = configuration.buffers, peak(configuration.buffers)
    print(f"With {command_line(configuration_flags(configuration))}\n")
    rows = []
    for moment in MOMENTS:
        live = sorted((one for one in buffers if moment in one.moments), key=lambda one: -one.nbytes)[:LARGEST]
        named = "; ".join(f"{one.name} {one.nbytes / 1e9:.1f}" for one in live)
        mark = "  <- the peak" * (moment == highest)
        rows.append((moment, figure(bytes_at(buffers, moment) / 1e9, 1), named + mark))
    show_table(("moment", ">GB per rank", "largest, GB"), rows)
    print()
    found = savings(configuration)
    flags = [(flag, figure((nbytes - after) / 1e9, 1), figure(after / 1e9, 1)) for flag, after in found]
    show_table(("flag that is not in use", ">GB less at the peak", ">peak, GB"), flags or [("none", "-", "-")])
    print(f"\n{ASSUMED}\n")


def savings(configuration: Configuration) -> list[tuple[str, float]]:
    """Return (flags, bytes per rank at the highest moment with them), each alone, the fewest bytes first."""
    from megatron_wallfacer.planning.inventory import peak

    before = peak(configuration.buffers)[1]
    found = [
        (flag, peak(replace(configuration, software=software).buffers)[1])
        for flag, software in _alternatives(configuration)
    ]
    return sorted(((flag, after) for flag, after in found if after < before), key=lambda one: one[1])


def _alternatives(configuration: Configuration) -> Iterator[tuple[str, Software]]:
    """Software with one more flag."""
    from megatron_wallfacer.planning.rank_memory import activations
    from megatron_wallfacer.planning.token_tiles import tiled

    software, request = configuration.software, configuration.request
    tokens = configuration.choice.job.shape.tokens
    work = activations(request.model, tokens, configuration.choice.attention, configuration.spread, software)
    if software.gradient_bytes > 2:
        if software.loss_tiles == 1:
            count = tiled(work, mlp=False).loss_tiles
            yield f"--wallfacer-loss-tiles {count}", replace(software, loss_tiles=count)
        if software.mlp_tiles == 1:
            count = tiled(work, loss=False).mlp_tiles
            yield f"--wallfacer-mlp-tiles {count}", replace(software, mlp_tiles=count)
    full = "--recompute-granularity full"
    if software.recompute == "none":
        kept = f"{full} --wallfacer-keep-attention-output"
        yield kept, replace(software, recompute="keep-attention")
    if software.recompute != "full" and not software.outputs_on_host:
        yield full, replace(software, recompute="full")
    if request.cluster.offers_host_memory:
        if software.recompute == "keep-attention" and not software.outputs_on_host:
            yield "--wallfacer-keep-on-host 1", replace(software, outputs_on_host=1.0)
        if software.recompute != "none" and not software.inputs_on_host:
            yield "--wallfacer-layer-inputs-on-host 1", replace(software, inputs_on_host=1.0)
        if software.adam != "host":
            flags = "--use-precision-aware-optimizer --optimizer-cpu-offload"
            yield flags, replace(software, adam="host")
    if software.gradient_bytes > 2 and software.loss_tiles == software.mlp_tiles == 1:
        yield "--grad-reduce-in-bf16", replace(software, gradient_bytes=2)
