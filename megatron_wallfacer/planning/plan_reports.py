"""Reports of ``wallfacer plan``: search, longest sequence, one grid, and memory tables if no configuration fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.choice import LONGEST_AXIS, MOST_RANKS_UNALIKE, Choice
from megatron_wallfacer.planning.configuration import Configuration, Request
from megatron_wallfacer.planning.configuration_flags import command_line, configuration_flags
from megatron_wallfacer.planning.configuration_table import ROWS, configuration_fields, configuration_table, memory_line
from megatron_wallfacer.planning.configurations import PlanResult, search_configurations
from megatron_wallfacer.planning.grid_table import grid_rows, grid_table, grids_summary
from megatron_wallfacer.planning.inventory import peak
from megatron_wallfacer.planning.longest import LongestSequence, longest_sequences
from megatron_wallfacer.planning.memory_table import largest_buffers, memory_report
from megatron_wallfacer.planning.model import RECOMPUTE
from megatron_wallfacer.planning.report import Report, ReportPart
from megatron_wallfacer.planning.training_options import TrainingOptions, parallel_sizes
from megatron_wallfacer.planning.training_step import attention_job
from megatron_wallfacer.schedule.schemes import make_plan

#: Number of buffers of a longer sequence that are named.
LARGEST = 4


def search_report(request: Request, *, grids: bool = False) -> Report:
    """Search configurations, and report the best configurations and the flags of the very best.

    With ``grids`` the report has a table of attention grids for the best configuration.

    Raises:
        OptionError: A given size does not divide ranks, heads or tokens.
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
    others = f" --json prints {more} more rows that fit." if (more := len(result.best) - ROWS) > 0 else ""
    yield f"\nThe planner estimated {result.considered} combinations of sizes and flags by formula."
    yield f"Attention grids were simulated for the tensor-parallel sizes with the lowest estimated times.{others}"
    yield f"The first: {command_line(configuration_flags(best))}"
    if grids:
        simulated, named = grid_rows(result.grids, best)
        yield f"\nGrids of attention, one layer, both passes; {best.sizes}\n"
        yield grid_table([*simulated, *named])
        yield f"\n{grids_summary(result.grids, best.choice.job)}"


def _search_fields(result: PlanResult) -> dict[str, Any]:
    best, named = grid_rows(result.grids, result.best[0])
    return {
        "configurations": [configuration_fields(configuration) for configuration in result.best],
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
    """Report the longest sequence that fits, the flags that train it, and the memory for the next longer sequence.

    Raises:
        OptionError: A given size does not divide ranks, heads or tokens.
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
        {"tokens": sequence.configuration.request.tokens, **configuration_fields(sequence.configuration)}
        | {"stops": limit_of_longer(sequence)}
        for sequence in longest
    ]


def limit_of_longer(sequence: LongestSequence) -> str:
    """Return a text: the memory that the configuration ``sequence.longer`` needs."""
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


def grid_report(
    request: Request,
    scheme: str,
    *,
    recompute: str = "keep-attention",
    microbatches: int = 1,
    keep_gathered_q: bool = False,
    **axes: Any,
) -> Report:
    """Simulate one grid, and return a report of the prediction. Without ``request.tp`` the tensor-parallel size is 1.

    Args:
        request: model, cluster and given sizes.
        scheme: name as in ``--wallfacer-scheme``.
        recompute: activations that backward recomputes.
        microbatches: number of micro-batches in a step, per data-parallel replica. A micro-batch has one sequence.
        keep_gathered_q: whether gathered queries are kept from forward to backward.
        axes: sizes of axes, placement and head groups, see :func:`megatron_wallfacer.schedule.schemes.make_plan`.

    Raises:
        OptionError: An option is not allowed, a size does not divide ranks, heads or tokens, or no simulation is
            possible.
    """
    if recompute not in RECOMPUTE:
        raise OptionError("recompute", recompute, f"one of {', '.join(RECOMPUTE)}")
    cluster, options = request.cluster, TrainingOptions(recompute=recompute)
    sizes = parallel_sizes(cluster, tp=request.tp or 1, pp=request.pp, cp=request.cp, microbatches=microbatches)
    job = attention_job(request.model, cluster, request.tokens, sizes, options, causal=request.causal)
    job, shape = replace(job, cuda_graphs=request.cuda_graphs), job.shape
    heads = {"q_heads": shape.q_heads, "kv_heads": shape.kv_heads}
    plan = make_plan(scheme, job.cp_size, **heads, tokens=shape.tokens, **axes)
    choice = Choice(job, plan, keep_gathered_q=keep_gathered_q)
    _check_size(scheme, choice)
    configuration = Configuration(replace(request, tp=sizes.tp, cp=sizes.cp), sizes, options, choice)
    return Report(_grid_parts(configuration), lambda: _grid_fields(configuration), configuration)


def _check_size(scheme: str, choice: Choice) -> None:
    if choice.can_be_simulated:
        return
    size = choice.job.cp_size
    if choice.plan.kv_order != "native":
        raise OptionError(
            "cp", size, f"at most {MOST_RANKS_UNALIKE} with scheme {scheme}, because each of its ranks is simulated"
        )
    raise OptionError("scheme", scheme, f"one with axes of at most {LONGEST_AXIS} ranks, not {choice.plan.grid}")


def _grid_fields(configuration: Configuration) -> dict[str, Any]:
    request, choice, step = configuration.request, configuration.choice, configuration.step
    plan = choice.plan
    return {
        "cluster": str(request.cluster),
        "model": request.model.name,
        "tokens": request.tokens,
        "ranks": request.cluster.ranks,
        "sizes": asdict(configuration.sizes),
        "grid": str(plan.grid),
        "placement": plan.grid.placement,
        "ring_variants": (plan.forward, plan.backward),
        "bound_by": choice.bound.resource,
        "of_bound": choice.simulation.seconds / choice.bound.seconds,
        "step": asdict(step) | {"layer_s": step.layer_s, "exposed_s": step.exposed_s},
    }


def _grid_parts(configuration: Configuration) -> Iterator[ReportPart]:
    """Yield the prediction as text, and tables of memory if the step does not fit in device memory."""
    request, step, bound = configuration.request, configuration.step, configuration.choice.bound
    of_bound = configuration.choice.simulation.seconds / bound.seconds
    memory_gb = request.cluster.device.memory_gb
    of_memory = "" if memory_gb == float("inf") else f" of {memory_gb:g}"
    rows = {
        "cluster": str(request.cluster),
        "job": f"{request.model.name}, {request.tokens} tokens per sequence; {configuration.sizes}",
        "attention": _attention(configuration.choice),
        "bound by": f"{bound.resource}; attention takes {of_bound:.2f} of that bound",
        "layer": f"{_ms(step.layer_s)}: attention {_ms(step.attention_s)}, of which {_ms(step.exposed_s)} is not "
        f"kernels; the rest {_ms(step.matmul_s + step.tensor_s)}",
        "step": f"{step.seconds:.2f} s, {step.tokens_s:,.0f} tokens/s, MFU {100 * step.mfu:.1f} %",
        "memory": f"{step.memory_gb:.1f}{of_memory} GB" + ("" if step.fits else ": does not fit"),
    }
    yield from (f"{name:<10} {text}" for name, text in rows.items())
    if not step.fits:
        yield ""
        yield from memory_report(configuration)


def _attention(choice: Choice) -> str:
    plan, grid = choice.plan, choice.plan.grid
    if not grid.placement:
        return str(grid)
    variants = f"{plan.forward} forward, {plan.backward} backward"
    return f"{grid}; fastest varying first: {', '.join(grid.placement)}; {variants}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
