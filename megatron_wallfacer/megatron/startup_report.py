"""Describe the configuration and its cost in lines that rank 0 prints before the first step."""

from __future__ import annotations

import argparse

import torch

from megatron_wallfacer import __version__
from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.kernels.select import switches_in_effect
from megatron_wallfacer.megatron.communicators import groups_text
from megatron_wallfacer.megatron.model_shape import dtype_of, shape_of
from megatron_wallfacer.megatron.packed import shards_whole_sequence
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import version_text
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.grid import describe_nodes
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.mask import Mask, chunk_mask_of, window_mask
from megatron_wallfacer.schedule.memory import graph_bytes, peak_bytes
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan, RingVariant
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule, is_sparse
from megatron_wallfacer.schedule.volume import Shape, messages, received_bytes, received_elements
from megatron_wallfacer.schedule.volume_bounds import backward_bound, forward_bound, ratio

#: Tensors that are passed around the ring in each pass, by ring variant.
_IN_RING = {
    ("forward", "pass-kv"): "K and V",
    ("forward", "pass-q"): "Q",
    ("backward", "pass-kv"): "K, V, dK and dV",
    ("backward", "pass-q"): "Q, dO and dQ",
}
_STAGED = "Messages are staged through host memory over gloo: use this for tests, it is slow."
_DIRECT = "No block is passed around a ring: each rank receives only the chunks that it uses. "


def startup_report(state: PluginState) -> str:
    """Return the lines of the report. Volume and buffers are those of one attention layer and one micro-batch."""
    settings, args = state.settings, state.args
    flags, dtype = settings.flags, dtype_of(args)
    shape = shape_of(args, dtype)
    kernel = state.kernel(dtype, shape.head_dim, shape.v_head_dim)
    rows = {
        "versions": f"This is megatron-wallfacer {__version__} with megatron-core {version_text(state.version)}.",
        "hooks": f"Functions of Megatron are replaced for: {'; '.join(hook.name for hook in state.hooks)}.",
        **_plan_rows(settings.plan, shape),
        "planned": f"The planner chose the grid for the cluster {flags.cluster}." if flags.cluster else None,
        "nodes": describe_nodes(settings.plan.grid, state.axis_groups[0].hosts),
        "groups": groups_text(state.axis_groups),
        "kernel": f"The kernel {kernel.name} computes attention on {state.device.type}."
        + _switches(flags.kernel, state.device),
        "transfers": _STAGED if flags.transfers == "staged" else None,
        "dtype": f"Inputs are {_name(dtype)}, partial results and gradients {_name(accumulation_dtype(dtype))}.",
        **_cost_rows(settings.plan, shape, flags.keep_gathered_q, graphs=flags.cuda_graphs),
        "megatron's graphs": _megatron_graphs(settings),
        "tiles": state.chosen_tiles.text() if state.chosen_tiles else None,
        **_window_rows(settings, getattr(args, "window_size", None), shape),
        "documents": _packing(args, graphs=flags.cuda_graphs),
    }
    lines = {label: text for label, text in rows.items() if text is not None}
    width = max(map(len, lines))
    return "\n".join(f"wallfacer: {label:<{width}}  {text}" for label, text in lines.items())


def _plan_rows(plan: Plan, shape: Shape) -> dict[str, str]:
    grid, groups = plan.grid, head_groups(plan, shape.q_heads, shape.kv_heads)
    both_ways = " Blocks are sent around the ring in both directions." if plan.bidirectional else ""
    size = f"{grid.cp_size} context-parallel rank{_s(grid.cp_size)}"
    rows = {
        "scheme": f"The scheme is {plan.scheme}, with K and V in the order {plan.kv_order}.{both_ways}",
        "grid": f"The grid of {size} is {grid}.",
    }
    if grid.placement:
        rows["placement"] = f"The axes vary in this order, fastest first: {', '.join(grid.placement)}."
    split = f"in {groups} head group{_s(groups)}"
    if groups != plan.head_groups:
        split += f", because they do not divide into {plan.head_groups}"
    return rows | {"heads": f"Each rank has {shape.q_heads} query heads and {shape.kv_heads} kv heads, {split}."}


def _cost_rows(
    plan: Plan, shape: Shape, keep_gathered_q: bool, mask: Mask | None = None, *, graphs: bool = False
) -> dict[str, str]:
    rank, groups = busiest_rank(plan), head_groups(plan, shape.q_heads, shape.kv_heads)
    chunk_mask = None if mask is None else chunk_mask_of(mask, plan.grid.cp_size, shape.tokens // CHUNKS_PER_RANK)
    options = {"groups": groups, "keep_gathered_q": keep_gathered_q, "chunk_mask": chunk_mask}
    rows, held = {}, 0
    for name, schedule, bound, variant in (
        ("forward", forward_schedule(plan, rank, **options), forward_bound, plan.forward),
        ("backward", backward_schedule(plan, rank, **options), backward_bound, plan.backward),
    ):
        direct, held = is_sparse(plan, chunk_mask), held + graph_bytes(schedule, shape)
        compared = ""
        if mask is None:  # the lower bound of the volume is valid only for the causal mask
            limit = ratio(received_elements(schedule, shape) / shape.unit, bound(plan.grid.cp_size, shape.kappa))
            compared = f", {limit:.2f}x the lower bound{' for undivided heads' if plan.grid.head > 1 else ''}"
        rows[name] = f"{_DIRECT if direct else _ring_text(name, plan, variant)}{_cost(schedule, shape, compared)}"
    return rows | ({"cuda graphs": f"The CUDA graphs of both passes hold {_size(held)}."} if graphs else {})


def _ring_text(name: str, plan: Plan, variant: RingVariant) -> str:
    if plan.grid.ring == 1:
        return ""
    tensors = _IN_RING[name, variant]
    return f"{tensors} {'is' if tensors == 'Q' else 'are'} passed around the ring ({variant}). "


def _cost(schedule: Schedule, shape: Shape, compared: str) -> str:
    volume, number = sum(received_bytes(schedule, shape).values()), messages(schedule)
    return (
        f"{_size(volume)} in {number} message{_s(number)} are received per rank and layer{compared}. "
        f"Buffers take up to {_size(peak_bytes(schedule, shape))} per rank."
    )


def _window_rows(settings: Settings, window: tuple[int, int] | None, shape: Shape) -> dict[str, str]:
    if window is None:
        return {}
    mask, flags = window_mask(window, causal=True), settings.flags
    rows = _cost_rows(settings.plan_of(window=True), shape, flags.keep_gathered_q, mask, graphs=flags.cuda_graphs)
    if settings.window_plan is not None:
        rows = _plan_rows(settings.window_plan, shape) | rows
    tokens = "all tokens" if mask.left is None else f"{mask.left} tokens"
    return {"window": f"In layers with a sliding window a query attends to {tokens} before its own."} | {
        f"window {label}": text for label, text in rows.items()
    }


def _packing(args: argparse.Namespace, *, graphs: bool) -> str | None:
    if shards_whole_sequence(args):
        text = "The packed sequence is split as a whole. Rotary positions start anew in each document."
    elif getattr(args, "sft", False):
        text = "Each document of a packed sequence is split."
    else:
        return None
    return f"{text} Passes run without CUDA graphs." if graphs else text


def _megatron_graphs(settings: Settings) -> str | None:
    graphs = settings.megatron_graphs
    return graphs and f"CUDA graphs of Megatron ({graphs}) hold attention. Their memory pool holds its buffers."


def _switches(kernel: str, device: torch.device) -> str:
    variables = switches_in_effect(device) if kernel == "auto" else ""
    return f" It was chosen under {variables}." if variables else ""


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _s(number: int) -> str:
    return "" if number == 1 else "s"
