"""The block that rank 0 prints at start: what will run, and what it will cost."""

from __future__ import annotations

import torch

from megatron_wallfacer import __version__
from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.megatron.arguments import dtype_of, shape_of
from megatron_wallfacer.megatron.session import Session
from megatron_wallfacer.megatron.version import version_text
from megatron_wallfacer.schedule.bounds import backward_bound, forward_bound, ratio
from megatron_wallfacer.schedule.grid import AXES
from megatron_wallfacer.schedule.schedule import Schedule, backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape, buffer_bytes, busiest_rank, received_bytes, words


def banner(session: Session) -> str:
    """Lines for the log; every figure is for one rank and one attention layer of one micro-batch."""
    settings, args = session.settings, session.args
    assert settings is not None
    assert args is not None
    plan, grid, dtype = settings.plan, settings.plan.grid, dtype_of(args)
    shape = shape_of(args, dtype)
    rank = busiest_rank(grid.cp_size)
    forward = forward_schedule(plan, rank)
    backward = backward_schedule(plan, rank, q_kept=settings.keep_gathered_q)
    kernel = session.kernel(dtype, shape.head_dim)
    accumulated = accumulation_dtype(dtype)
    rows = {
        "versions": f"megatron-core {version_text(session.version)}, megatron-wallfacer {__version__}",
        "hooks": "; ".join(session.hooks),
        "cp size": f"{grid.cp_size}",
        "scheme": f"{plan.scheme}, backward payload {plan.backward}",
        "axes": ", ".join(f"{axis} {grid.size_of(axis)}" for axis in AXES),
        "placement": f"{', '.join(grid.placement)} (fastest first)",
        "kernel": f"{kernel.name} on {session.device.type}",
        "dtype": f"{_name(dtype)}; partial results and gradients travel as {_name(accumulated)}",
        "forward": _cost(forward, shape, forward_bound(grid.cp_size, shape.kappa)),
        "backward": _cost(backward, shape, backward_bound(grid.cp_size, shape.kappa)),
    }
    width = max(map(len, rows))
    return "\n".join(f"wallfacer: {label:<{width}}  {text}" for label, text in rows.items())


def _cost(schedule: Schedule, shape: Shape, bound: float) -> str:
    received, everything = words(schedule, shape), sum(received_bytes(schedule, shape).values())
    return (
        f"{received:,} words received a rank, {ratio(received / shape.unit, bound):.2f}x the lower bound; "
        f"{_size(everything)} with statistics, buffers {_size(buffer_bytes(schedule, shape))}"
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
