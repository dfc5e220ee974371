"""The table of configurations in ``wallfacer plan``: sizes, flags, memory, time, and seconds that flags add."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.configuration import Configuration
from megatron_wallfacer.planning.configuration_flags import configuration_flags
from megatron_wallfacer.planning.inventory import peak
from megatron_wallfacer.planning.report import Table, number
from megatron_wallfacer.planning.training_options import TrainingOptions

#: Largest number of rows of the table.
ROWS = 10
#: Costs of an optimizer that have no time, by bytes per element of a gradient.
_NOT_PLAIN = {2: "gradients rounded to bf16", 4: "optimizer flags not tested here"}
_RECOMPUTED = {"none": "nothing", "keep-attention": "all but attention", "full": "all"}
_OPTIMIZER = {"device": "", "precision-aware": "precision-aware", "host": "on the host"}
_COSTS = {
    "mlp_s": "MLPs again",
    "head_s": "head again",
    "rewrites_s": "gradients rewritten",
    "copies_s": "exposed copies",
    "adam_s": "CPU Adam",
}


def configuration_fields(configuration: Configuration) -> dict[str, Any]:
    """Return a configuration as JSON fields: memory in 1e9 bytes, seconds of a step, ``flags`` as in a preset."""
    step, sizes, plan = configuration.step, configuration.sizes, configuration.choice.plan
    return {
        **{name: getattr(sizes, name) for name in ("tp", "pp", "cp", "dp")},
        "grid": str(plan.grid),
        "head_groups": plan.head_groups,
        "recompute": configuration.options.recompute,
        "memory_gb": step.memory_gb,
        "peak": peak(configuration.buffers)[0],
        "host_gb": step.host_gb,
        "seconds": step.seconds,
        "mfu": step.mfu,
        "costs_s": asdict(step.overheads),
        "has_plain_optimizer": configuration.has_plain_optimizer,
        "flags": configuration_flags(configuration),
    }


def configuration_table(configurations: Iterable[Configuration], *, lengths: bool = False) -> Table:
    """Return one row per configuration. ``lengths`` adds a column with the sequence length."""
    headings = (">tp", "attention", ">groups", "recomputed", "on the host", ">loss, MLP tiles", "optimizer")
    figures = (">GB per rank", "peak", ">host GB", ">s", ">MFU %", "of which s")
    rows = [
        (*((f"{configuration.request.tokens:,}",) if lengths else ()), *_cells(configuration))
        for configuration in configurations
    ]
    return Table((*((">tokens",) if lengths else ()), *headings, *figures), tuple(rows))


def memory_line(cluster: Cluster) -> str:
    """Return device and host memory as one line, or the reason why no tensors are kept in host memory."""
    device = f"{cluster.device.memory_gb:g} GB per rank"
    if cluster.offers_host_memory:
        return f"{device}; host memory: {cluster.host_memory_gb:g} GB per node, {cluster.host_link:g} GB/s per device"
    return f"{device}; nothing is kept on the host: the cluster file has no host_link or no host_memory_gb"


def _cells(configuration: Configuration) -> tuple[str, ...]:
    step, options, plan = configuration.step, configuration.options, configuration.choice.plan
    optimizer = _OPTIMIZER[options.adam], "bf16 gradients" * (options.gradient_bytes == 2)
    return (
        str(configuration.sizes.tp),
        str(plan.grid),
        str(plan.head_groups),
        _RECOMPUTED[options.recompute],
        _on_host(options),
        f"{options.loss_tiles}, {options.mlp_tiles}",
        ", ".join(filter(None, optimizer)) or "-",
        number(step.memory_gb, 1),
        peak(configuration.buffers)[0],
        number(step.host_gb, 0),
        number(step.seconds, 1 if step.seconds >= 10 else 2),
        number(100 * step.mfu, 1),
        _cost(configuration),
    )


def _on_host(options: TrainingOptions) -> str:
    fractions = {"inputs": options.inputs_on_host, "outputs": options.outputs_on_host}
    kept = [name if part == 1 else f"{name} of {part:.0%} of the layers" for name, part in fractions.items() if part]
    return ", ".join(kept) or "-"


def _cost(configuration: Configuration) -> str:
    overheads = asdict(configuration.step.overheads)
    costs = [f"{_COSTS[name]} {seconds:.1f}" for name, seconds in overheads.items() if seconds >= 0.05]
    if not configuration.has_plain_optimizer:
        costs.append(_NOT_PLAIN[configuration.options.gradient_bytes])
    return ", ".join(costs) or "-"
