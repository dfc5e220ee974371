"""Tables of the memory of a rank at each moment of a step, and of flags that would lower the peak."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from heapq import nlargest
from operator import itemgetter

from megatron_wallfacer.planning.configuration import Configuration
from megatron_wallfacer.planning.configuration_flags import command_line, configuration_flags
from megatron_wallfacer.planning.inventory import MOMENTS, Moment, bytes_at, peak
from megatron_wallfacer.planning.rank_memory import activations
from megatron_wallfacer.planning.report import ReportPart, Table, number
from megatron_wallfacer.planning.token_tiles import tiled
from megatron_wallfacer.planning.training_options import TrainingOptions

#: Number of buffers that are named at each moment.
LARGEST = 3
ASSUMED = (
    "Norms, SwiGLU and rotary positions count as fused kernels, attention's kernels as their results. "
    "Fragmentation, the CUDA context and NCCL are not counted."
)


def memory_report(configuration: Configuration) -> Iterator[ReportPart]:
    """Yield a table of the memory at each moment, and a table of unused flags that save memory."""
    highest, nbytes = peak(configuration.buffers)
    yield f"With {command_line(configuration_flags(configuration))}\n"
    rows = []
    for moment in MOMENTS:
        named = largest_buffers(configuration, moment, LARGEST, "; ") + "  <- the peak" * (moment == highest)
        rows.append((moment, number(bytes_at(configuration.buffers, moment) / 1e9, 1), named))
    yield Table(("moment", ">GB per rank", "largest, GB"), tuple(rows))
    yield ""
    peaks = [
        (peak(replace(configuration, options=options).buffers)[1], flag)
        for flag, options in _alternatives(configuration)
    ]
    saved = [
        (flag, number((nbytes - after) / 1e9, 1), number(after / 1e9, 1))
        for after, flag in sorted(peaks, key=itemgetter(0))
        if after < nbytes
    ]
    yield Table(("flag that is not in use", ">GB less at the peak", ">peak, GB"), tuple(saved or [("none", "-", "-")]))
    yield f"\n{ASSUMED}\n"


def largest_buffers(configuration: Configuration, moment: Moment, count: int, separator: str) -> str:
    """Return the largest live buffers at a moment as text, each with its size in 1e9 bytes per rank."""
    live = [buffer for buffer in configuration.buffers if moment in buffer.moments]
    largest = nlargest(count, live, key=lambda buffer: buffer.nbytes)
    return separator.join(f"{buffer.name} {buffer.nbytes / 1e9:.1f}" for buffer in largest)


def _alternatives(configuration: Configuration) -> Iterator[tuple[str, TrainingOptions]]:
    options, request = configuration.options, configuration.request
    if options.gradient_bytes > 2:
        yield from _more_tiles(configuration)
    full = "--recompute-granularity full"
    if options.recompute == "none":
        yield f"{full} --wallfacer-keep-attention-output", replace(options, recompute="keep-attention")
    if options.recompute != "full" and not options.outputs_on_host:
        yield full, replace(options, recompute="full")
    if request.cluster.offers_host_memory:
        if options.recompute == "keep-attention" and not options.outputs_on_host:
            yield "--wallfacer-keep-on-host 1", replace(options, outputs_on_host=1.0)
        if options.recompute != "none" and not options.inputs_on_host:
            yield "--wallfacer-layer-inputs-on-host 1", replace(options, inputs_on_host=1.0)
        if options.adam != "host":
            yield "--use-precision-aware-optimizer --optimizer-cpu-offload", replace(options, adam="host")
    if options.gradient_bytes > 2 and options.loss_tiles == options.mlp_tiles == 1:
        yield "--grad-reduce-in-bf16", replace(options, gradient_bytes=2)


def _more_tiles(configuration: Configuration) -> Iterator[tuple[str, TrainingOptions]]:
    options, choice = configuration.options, configuration.choice
    sizes = configuration.request.model, choice.job.shape.tokens, choice.memory, configuration.sizes
    work = activations(*sizes, options)
    if options.loss_tiles == 1:
        count = tiled(work, mlp=False).loss_tiles
        yield f"--wallfacer-loss-tiles {count}", replace(options, loss_tiles=count)
    if options.mlp_tiles == 1:
        count = tiled(work, loss=False).mlp_tiles
        yield f"--wallfacer-mlp-tiles {count}", replace(options, mlp_tiles=count)
