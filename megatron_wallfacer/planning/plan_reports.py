"""Reports of a search and of the longest sequence, and of the memory where nothing fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.configuration import Configuration, Request
from megatron_wallfacer.planning.configuration_flags import command_line, configuration_flags
from megatron_wallfacer.planning.configuration_table import ROWS, configuration_row, configuration_table, memory_line
from megatron_wallfacer.planning.configurations import PlanResult, search_configurations
from megatron_wallfacer.planning.grid_table import grid_rows, grid_table, grids_summary
from megatron_wallfacer.planning.inventory import peak
from megatron_wallfacer.planning.longest import LongestSequence, longest_sequences
from megatron_wallfacer.planning.memory_table import largest_buffers, memory_report
from megatron_wallfacer.planning.report import Report, ReportPart

#: Buffers of a longer sequence that are named.
LARGEST = 4


def search_report(request: Request, *, grids: bool = False) -> Report:
    """Search configurations, and return the best ones with the flags of the first.

    Args:
        request: model, cluster and given sizes.
        grids: add grids of attention in the best configuration.

    Raises:
        OptionError: a size does not divide.
    """
    result = search_configurations(request)
    if not result.best:
        return Report(memory_report(result.leanest), error=_does_not_fit(result.leanest))
    first = result.best[0]
    return Report(
        _search_parts(request, result, grids),
        lambda: _search_fields(result),
        first,
        lambda: [row for rows in grid_rows(result.grids, first) for row in rows],
    )


def _search_parts(request: Request, result: PlanResult, grids: bool) -> Iterator[ReportPart]:
    best = result.best[0]
    yield f"{request.cluster}; {memory_line(request.cluster)}"
    yield f"{request.model.name}, {request.tokens:,} tokens; predicted, of a step; norms and SwiGLU fused\n"
    yield configuration_table(result.best[:ROWS])
    more = len(result.best) - ROWS
    others = f"; {more} more fit (--json)" if more > 0 else ""
    yield f"\n{result.considered} combinations in closed form, the likeliest simulated{others}"
    yield f"The first: {command_line(configuration_flags(best))}"
    if grids:
        simulated, named = grid_rows(result.grids, best)
        yield f"\nGrids of attention, one layer, both passes; {best.sizes}\n"
        yield grid_table([*simulated, *named])
        yield f"\n{grids_summary(result.grids, best.choice.job)}"


def _search_fields(result: PlanResult) -> dict[str, Any]:
    best, named = grid_rows(result.grids, result.best[0])
    return {
        "configurations": [asdict(configuration_row(configuration)) for configuration in result.best],
        "best": [asdict(row) for row in best],
        "named": [asdict(row) for row in named],
    }


def _does_not_fit(leanest: Configuration) -> OptionError:
    (moment, nbytes), host_gb = peak(leanest.buffers), leanest.step.host_gb
    host = f", {host_gb:.0f} GB of host memory per node" if host_gb else ""
    return OptionError(
        "seq",
        leanest.request.tokens,
        f"shorter, or on more ranks: the leanest configuration needs {nbytes / 1e9:.0f} GB per rank of "
        f"{leanest.request.cluster.device.memory_gb:g} ({moment}){host}",
    )


def longest_report(request: Request) -> Report:
    """Search the longest sequence, and return it with its flags and the needs of a longer one.

    Args:
        request: model, cluster and given sizes; its sequence length is not used.

    Raises:
        OptionError: a size does not divide.
    """
    longest = longest_sequences(request)
    if not longest:
        leanest = search_configurations(replace(request, tokens=2 * request.cluster.ranks)).leanest
        return Report(memory_report(leanest), error=_no_sequence_fits(leanest))
    return Report(_longest_parts(request, longest), lambda: _longest_fields(longest), longest[0].configuration)


def _longest_parts(request: Request, longest: Sequence[LongestSequence]) -> Iterator[ReportPart]:
    yield f"{request.cluster}; {memory_line(request.cluster)}"
    yield f"{request.model.name}, longest sequence; predicted, of a step; norms and SwiGLU fused\n"
    yield configuration_table((sequence.configuration for sequence in longest), lengths=True)
    for sequence in longest:
        tokens = sequence.configuration.request.tokens
        yield f"\n{tokens:,} tokens: {command_line(configuration_flags(sequence.configuration))}"
        yield f"{sequence.unit:,} tokens more: {limit_of_longer(sequence)}"


def _longest_fields(longest: Sequence[LongestSequence]) -> list[dict[str, Any]]:
    return [
        {"tokens": sequence.configuration.request.tokens, **asdict(configuration_row(sequence.configuration))}
        | {"stops": limit_of_longer(sequence)}
        for sequence in longest
    ]


def limit_of_longer(sequence: LongestSequence) -> str:
    """Return the memory that the next longer sequence needs, in the configuration with the least device memory."""
    longer = sequence.longer
    moment, nbytes = peak(longer.buffers)
    named = largest_buffers(longer, moment, LARGEST, ", ")
    host_gb = longer.request.cluster.host_memory_gb
    host = "" if host_gb is None else f"; {longer.step.host_gb:.0f} of {host_gb:g} GB of host memory per node"
    return f"at least {nbytes / 1e9:.1f} GB per rank ({moment}: {named}){host}"


def _no_sequence_fits(leanest: Configuration) -> OptionError:
    cluster, needed_gb = leanest.request.cluster, leanest.step.memory_gb
    return OptionError(
        "nodes",
        cluster.nodes,
        f"more: for {leanest.request.tokens} tokens the leanest configuration needs {needed_gb:.0f} GB per rank of "
        f"{cluster.device.memory_gb:g}",
    )
