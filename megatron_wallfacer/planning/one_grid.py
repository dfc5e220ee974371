"""One grid that the user names, simulated in a training step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.choice import LONGEST_AXIS, MOST_RANKS_UNALIKE, Choice
from megatron_wallfacer.planning.configuration import Configuration, Request
from megatron_wallfacer.planning.memory_table import memory_report
from megatron_wallfacer.planning.model import RECOMPUTE
from megatron_wallfacer.planning.report import Report, ReportPart
from megatron_wallfacer.planning.training_options import TrainingOptions, parallel_sizes
from megatron_wallfacer.planning.training_step import attention_job
from megatron_wallfacer.schedule.schemes import make_plan


def grid_report(
    request: Request,
    scheme: str,
    *,
    recompute: str = "keep-attention",
    microbatches: int = 1,
    keep_gathered_q: bool = False,
    ring_inner_size: int | None = None,
    **axes: Any,
) -> Report:
    """Simulate one grid, and return its prediction.

    Args:
        request: model, cluster and given sizes; without ``tp`` the tensor-parallel size is 1.
        scheme: name as in ``--wallfacer-scheme``.
        recompute: activations that backward recomputes.
        microbatches: sequences per data-parallel replica and step.
        keep_gathered_q: keep gathered queries from forward to backward.
        ring_inner_size: ranks of the inner ring; None leaves it to the scheme.
        axes: sizes of the other axes, placement and head groups, see
            :func:`megatron_wallfacer.schedule.schemes.make_plan`.

    Raises:
        OptionError: an option has no such value, a size does not divide, or the grid cannot be simulated.
    """
    if recompute not in RECOMPUTE:
        raise OptionError("recompute", recompute, f"one of {', '.join(RECOMPUTE)}")
    cluster, options = request.cluster, TrainingOptions(recompute=recompute)
    sizes = parallel_sizes(cluster, tp=request.tp or 1, pp=request.pp, cp=request.cp, microbatches=microbatches)
    job = attention_job(request.model, cluster, request.tokens, sizes, options, causal=request.causal)
    job, shape = replace(job, cuda_graphs=request.cuda_graphs), job.shape
    heads = {"q_heads": shape.q_heads, "kv_heads": shape.kv_heads, "tokens": shape.tokens}
    plan = make_plan(scheme, job.cp_size, ring_window=ring_inner_size, **heads, **axes)
    choice = Choice(job, plan, q_kept=keep_gathered_q)
    _check_size(scheme, choice)
    configuration = Configuration(replace(request, tp=sizes.tp, cp=sizes.cp), sizes, options, choice)
    return Report(_parts(configuration), lambda: _fields(configuration), configuration)


def _check_size(scheme: str, choice: Choice) -> None:
    if choice.can_be_simulated:
        return
    size = choice.job.cp_size
    if choice.plan.kv_order != "native":
        raise OptionError("cp", size, f"at most {MOST_RANKS_UNALIKE} with scheme {scheme}, whose ranks are not alike")
    raise OptionError("scheme", scheme, f"a grid with no axis above {LONGEST_AXIS}, unlike {choice.plan.grid}")


def _fields(configuration: Configuration) -> dict[str, Any]:
    """Return the prediction for JSON: times in seconds, memory in 1e9 bytes."""
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
        "ring_operands": (plan.forward, plan.backward),
        "bound_by": choice.bound.resource,
        "of_bound": choice.simulation.seconds / choice.bound.seconds,
        "step": asdict(step) | {"layer_s": step.layer_s, "exposed_s": step.exposed_s},
    }


def _parts(configuration: Configuration) -> Iterator[ReportPart]:
    """Yield the prediction as text, and tables of memory if the step does not fit the device."""
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
    grid = choice.plan.grid
    if not grid.placement:
        return str(grid)
    forward, backward = (f"pass-{operand.upper()}" for operand in (choice.plan.forward, choice.plan.backward))
    return f"{grid}; fastest varying first: {', '.join(grid.placement)}; {forward} forward, {backward} backward"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
