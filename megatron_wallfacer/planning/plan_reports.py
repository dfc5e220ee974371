"""Reports of a search and of the longest sequence, and of the memory where nothing fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.configuration import Configuration, Request
from megatron_wallfacer.planning.configuration_flags import command_line, configuration_flags
from megatron_wallfacer.planning.configuration_table import ROWS, configuration_row, configuration_table, memory_line
from megatron_wallfacer.planning.configurations import Offered, configurations
from megatron_wallfacer.planning.grid_table import grid_rows, grid_table, grids_summary
from megatron_wallfacer.planning.inventory import peak
from megatron_wallfacer.planning.longest import Longest, longest
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
    offered = configurations(request)
    if not offered.best:
        return Report(memory_report(offered.leanest), error=_does_not_fit(offered.leanest))
    first = offered.best[0]
    return Report(
        _search_parts(request, offered, grids),
        lambda: _search_fields(offered),
        first,
        lambda: [row for rows in grid_rows(offered.grids, first) for row in rows],
    )


def _search_parts(request: Request, offered: Offered, grids: bool) -> Iterator[ReportPart]:
    best = offered.best[0]
    yield f"{request.cluster}; {memory_line(request.cluster)}"
    yield f"{request.model.name}, {request.tokens:,} tokens; predicted, of a step; norms and SwiGLU fused\n"
    yield configuration_table(offered.best[:ROWS])
    more = len(offered.best) - ROWS
    others = f"; {more} more fit (--json)" if more > 0 else ""
    yield f"\n{offered.considered} combinations in closed form, the likeliest simulated{others}"
    yield f"The first: {command_line(configuration_flags(best))}"
    if grids:
        found, named = grid_rows(offered.grids, best)
        yield f"\nGrids of attention, one layer, both passes; {best.spread}\n"
        yield grid_table([*found, *named])
        yield f"\n{grids_summary(offered.grids, best.choice.job)}"


def _search_fields(offered: Offered) -> dict[str, Any]:
    best, named = grid_rows(offered.grids, offered.best[0])
    return {
        "configurations": [asdict(configuration_row(one)) for one in offered.best],
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
    found = longest(request)
    if not found:
        leanest = configurations(replace(request, tokens=2 * request.cluster.ranks)).leanest
        return Report(memory_report(leanest), error=_no_sequence_fits(leanest))
    return Report(_longest_parts(request, found), lambda: _longest_fields(found), found[0].configuration)


def _longest_parts(request: Request, found: Sequence[Longest]) -> Iterator[ReportPart]:
    yield f"{request.cluster}; {memory_line(request.cluster)}"
    yield f"{request.model.name}, longest sequence; predicted, of a step; norms and SwiGLU fused\n"
    yield configuration_table((one.configuration for one in found), lengths=True)
    for one in found:
        tokens = one.configuration.request.tokens
        yield f"\n{tokens:,} tokens: {command_line(configuration_flags(one.configuration))}"
        yield f"{one.unit:,} tokens more: {limit_of_longer(one)}"


def _longest_fields(found: Sequence[Longest]) -> list[dict[str, Any]]:
    return [
        {"tokens": one.configuration.request.tokens, **asdict(configuration_row(one.configuration))}
        | {"stops": limit_of_longer(one)}
        for one in found
    ]


def limit_of_longer(found: Longest) -> str:
    """Return the memory that the next longer sequence needs, in the configuration with the least device memory."""
    needs = found.needs
    moment, nbytes = peak(needs.buffers)
    named = largest_buffers(needs, moment, LARGEST, ", ")
    host_gb = needs.request.cluster.host_memory_gb
    host = "" if host_gb is None else f"; {needs.step.host_gb:.0f} of {host_gb:g} GB of host memory per node"
    return f"at least {nbytes / 1e9:.1f} GB per rank ({moment}: {named}){host}"


def _no_sequence_fits(leanest: Configuration) -> OptionError:
    cluster, needed_gb = leanest.request.cluster, leanest.step.memory_gb
    return OptionError(
        "nodes",
        cluster.nodes,
        f"more: for {leanest.request.tokens} tokens the leanest configuration needs {needed_gb:.0f} GB per rank of "
        f"{cluster.device.memory_gb:g}",
    )
