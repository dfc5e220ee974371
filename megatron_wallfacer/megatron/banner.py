"""The block that rank 0 prints at start: what will run, and what it will cost."""

from __future__ import annotations

import argparse

import torch

from megatron_wallfacer import __version__
from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.kernels.select import switches_in_effect
from megatron_wallfacer.megatron.communicators import groups_text
from megatron_wallfacer.megatron.model_shape import dtype_of, shape_of
from megatron_wallfacer.megatron.packed import shards_whole_sequence
from megatron_wallfacer.megatron.releases import version_text
from megatron_wallfacer.megatron.session import Session
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.schedule.chunk_mask import chunk_mask_of
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.grid import describe_nodes
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.mask import Mask, window_mask
from megatron_wallfacer.schedule.memory import graph_bytes, peak_bytes
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan, RingVariant
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule, is_sparse
from megatron_wallfacer.schedule.volume import Shape, messages, received_bytes, received_elements
from megatron_wallfacer.schedule.volume_bounds import backward_bound, forward_bound, ratio

#: Tensors that are passed around the ring in each pass, by ring variant.
_IN_RING = {
    ("forward", "pass-kv"): "K, V",
    ("forward", "pass-q"): "Q",
    ("backward", "pass-kv"): "K, V, dK, dV",
    ("backward", "pass-q"): "Q, dO, dQ",
}


#: Said only where it is not what anyone expects.
_TRANSFERS = {"staged": {"transfers": "STAGED through host memory over gloo: to see that it works, not for speed"}}
DIRECT = "nothing hops, what is used is sent to its user; "


def banner(session: Session) -> str:
    """Lines for the log; every figure is for one rank and one attention layer of one micro-batch."""
    settings, args = session.settings, session.args
    assert settings is not None
    flags = settings.flags
    assert args is not None
    dtype = dtype_of(args)
    shape, kept = shape_of(args, dtype), flags.keep_gathered_q
    kernel = session.kernel(dtype, shape.head_dim, shape.v_head_dim)
    rows = {
        "versions": f"megatron-core {version_text(session.version)}, megatron-wallfacer {__version__}",
        "hooks": "; ".join(session.hooks),
        "cp size": f"{settings.plan.grid.cp_size}",
        **_plan_rows(settings.plan, shape),
        **({"planned": f"for {flags.cluster}"} if flags.cluster else {}),
        "hosts": describe_nodes(settings.plan.grid, session.axis_groups[0].hosts),
        "groups": groups_text(session.axis_groups),
        "kernel": f"{kernel.name} on {session.device.type}{_switches(flags.kernel, session.device)}",
        **_TRANSFERS.get(flags.transfers, {}),
        "dtype": f"{_name(dtype)}; partial results and gradients travel as {_name(accumulation_dtype(dtype))}",
        **_cost_rows(settings.plan, shape, kept, graphs=flags.cuda_graphs),
        **_megatron_graphs(settings),
        **({"tiles": session.chosen_tiles.text()} if session.chosen_tiles else {}),
    }
    window = getattr(args, "window_size", None)
    if window is not None:
        mask = window_mask(window, causal=True)
        # The bound is for masks that leave half of the square.
        of_window = _cost_rows(settings.plan_of(window=True), shape, kept, mask, graphs=flags.cuda_graphs)
        if settings.window_plan is not None:
            of_window = _plan_rows(settings.window_plan, shape) | of_window
        rows["window"] = (
            f"{'all' if mask.left is None else mask.left} tokens before a query's own, in layers as follows"
        )
        rows |= {f"window {label}": text for label, text in of_window.items()}
    if packing := _packing(args, graphs=flags.cuda_graphs):
        rows["documents"] = packing
    width = max(map(len, rows))
    return "\n".join(f"wallfacer: {label:<{width}}  {text}" for label, text in rows.items())


def _plan_rows(plan: Plan, shape: Shape) -> dict[str, str]:
    """How ranks and heads are arranged."""
    grid = plan.grid
    groups = head_groups(plan, shape.q_heads, shape.kv_heads)
    return {
        "scheme": f"{plan.scheme}, order {plan.kv_order}" + (", both ways round" if plan.bidirectional else ""),
        "grid": f"{grid}",
        "placement": f"{', '.join(grid.placement)} (fastest first)" if grid.placement else "one rank",
        "heads": f"{shape.q_heads} query, {shape.kv_heads} kv; {_groups(groups, plan)}",
    }


def _cost_rows(
    plan: Plan, shape: Shape, keep_gathered_q: bool, mask: Mask | None = None, *, graphs: bool = False
) -> dict[str, str]:
    """What attention receives; compared with the lower bound where the mask is the causal triangle.

    With ``graphs`` also the memory that the CUDA graphs of both passes hold.
    """
    rank, groups = busiest_rank(plan), head_groups(plan, shape.q_heads, shape.kv_heads)
    chunk_mask = None if mask is None else chunk_mask_of(mask, plan.grid.cp_size, shape.tokens // CHUNKS_PER_RANK)
    options = {"groups": groups, "keep_gathered_q": keep_gathered_q, "chunk_mask": chunk_mask}
    rows, held = {}, 0
    for name, schedule, bound, variant in (
        ("forward", forward_schedule(plan, rank, **options), forward_bound, plan.forward),
        ("backward", backward_schedule(plan, rank, **options), backward_bound, plan.backward),
    ):
        direct, held = is_sparse(plan, chunk_mask), held + graph_bytes(schedule, shape)
        rows[name] = f"{DIRECT if direct else _ring_text(name, plan, variant)}{_cost(schedule, shape)}"
        if mask is None:
            limit = ratio(received_elements(schedule, shape) / shape.unit, bound(plan.grid.cp_size, shape.kappa))
            rows[name] += f"; {limit:.2f}x the lower bound{' for undivided heads' if plan.grid.head > 1 else ''}"
    return rows | ({"cuda graphs": f"one of each pass for all layers; the two hold {_size(held)}"} if graphs else {})


def _megatron_graphs(settings: Settings) -> dict[str, str]:
    """Where Megatron's CUDA graphs hold attention."""
    if settings.megatron_graphs is None:
        return {}
    return {"megatron's graphs": f"hold attention ({settings.megatron_graphs}), and its buffers in their memory pool"}


def _switches(kernel: str, device: torch.device) -> str:
    """The variables that restricted ``auto``, if it chose and there are any."""
    variables = switches_in_effect(device) if kernel == "auto" else ""
    return f"; auto obeys {variables}" if variables else ""


def _packing(args: argparse.Namespace, *, graphs: bool) -> str:
    """How packed sequences are cut, if there are any."""
    if shards_whole_sequence(args):
        text = "packed; the sequence is cut, and rotary positions are counted in each document"
    elif getattr(args, "sft", False):
        text = "packed; each document is cut"
    else:
        return ""
    return f"{text}; passes run without CUDA graphs" if graphs else text


def _groups(groups: int, plan: Plan) -> str:
    text = f"{groups} head group{'s' if groups > 1 else ''}"
    return text if groups == plan.head_groups else f"{text}, for {plan.head_groups} they do not divide"


def _ring_text(name: str, plan: Plan, variant: RingVariant) -> str:
    """Return the ring variant of a pass and the tensors in the ring; nothing without a ring."""
    return f"{variant}, {_IN_RING[name, variant]} in the ring; " if plan.grid.ring > 1 else ""


def _cost(schedule: Schedule, shape: Shape) -> str:
    everything = sum(received_bytes(schedule, shape).values())
    return (
        f"{received_elements(schedule, shape):,.0f} words received a rank in {messages(schedule)} messages, "
        f"{_size(everything)} with statistics, buffers up to {_size(peak_bytes(schedule, shape))}"
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
