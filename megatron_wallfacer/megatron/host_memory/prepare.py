"""Choose tensors to keep in host memory, allocate that memory, and install hooks on the layers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.communicators import gathered
from megatron_wallfacer.megatron.flags import INPUTS, KEEP, Fraction
from megatron_wallfacer.megatron.host_memory.attention import keep_on_host
from megatron_wallfacer.megatron.host_memory.inputs import LayerInputs
from megatron_wallfacer.megatron.host_memory.kinds import (
    Kind,
    attention_of,
    blocks_of,
    kept_outputs,
    layer_inputs,
    pipeline_of,
    recomputed_groups,
)
from megatron_wallfacer.megatron.host_memory.share import RankNeeds, Wanted, auto_fraction, check_room, nodes_of
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.offload.copies import Copies, DeferredCopies
from megatron_wallfacer.offload.host import HostSlots, gigabytes, memory_left
from megatron_wallfacer.offload.queue import OffloadQueue


def prepare_host_memory(state: PluginState, model: Sequence[nn.Module]) -> str | None:
    """Allocate host memory and connect it to the layers of a model. All ranks must call this function.

    Returns:
        Line for the log about the host memory, or None if no flag moves tensors to host memory.

    Raises:
        WallfacerError: A node has too little host memory. All ranks raise the same error.
    """
    flags = state.settings.flags
    given = {KEEP: flags.keep_on_host, INPUTS: flags.layer_inputs_on_host}
    fractions = {flag: fraction for flag, fraction in given.items() if fraction is not None}
    if not fractions:
        return None
    blocks = blocks_of(model, next(iter(fractions)))
    kinds = _kinds(state, blocks, fractions)
    wanted = tuple(
        Wanted(kind.flag, fractions[kind.flag], kind.bytes_by_count, max(kind.nbytes.values(), default=0))
        for kind in kinds
    )
    ranks = gathered(RankNeeds(socket.gethostname(), memory_left(), wanted))
    auto = auto_fraction(ranks, state.settings.overlapped_bytes)
    check_room(ranks, auto)
    counts = {one.flag: one.count(auto if one.fraction == "auto" else one.fraction) for one in wanted}
    slots = _allocated(state, {kind.flag: kind for kind in kinds}, counts)
    copies = copies_of(state.device)
    for kind in kinds:
        queue = _queue(kind, counts[kind.flag], slots[kind.flag], copies)
        keys = [(use.key.chunk, use.key.layer) for use in kind.plan(counts[kind.flag]).uses]
        if kind.flag == KEEP:
            _put_to_attention(blocks, keys, queue)
        else:
            _put_to_inputs(state, blocks, keys, queue)
    return _line(kinds, counts, ranks, auto)


def copies_of(device: torch.device) -> Copies:
    """Return the object that copies between a device and host memory."""
    if device.type == "cpu":
        return DeferredCopies()
    from megatron_wallfacer.offload.cuda import CudaCopies

    return CudaCopies()


def _kinds(state: PluginState, blocks: Sequence[nn.Module], fractions: dict[str, Fraction]) -> list[Kind]:
    makers: dict[str, Callable[..., Kind]] = {KEEP: kept_outputs, INPUTS: layer_inputs}
    pipeline = pipeline_of(blocks[0].config, len(blocks))
    return [makers[flag](flag, blocks, pipeline, state.args) for flag in fractions]


def _allocated(state: PluginState, kinds: dict[str, Kind], counts: dict[str, int]) -> dict[str, HostSlots]:
    """Allocate host memory for each kind of tensors. If an allocation fails on one rank, all ranks raise an error."""
    slots, reason = {}, ""
    for flag, kind in kinds.items():
        try:
            plan = kind.plan(counts[flag])
            slots[flag] = HostSlots(plan.slots.values(), pinned=state.device.type == "cuda")
        except WallfacerError as error:
            reason = f"{flag}: needs a smaller fraction on {socket.gethostname()}: {error}"
            break
    failed = next((text for text in gathered(reason) if text), None)
    if failed is not None:
        raise WallfacerError(failed)
    return slots


def _queue(kind: Kind, count: int, slots: HostSlots, copies: Copies) -> OffloadQueue:
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return OffloadQueue(kind.flag, lambda number: kind.plan(count, number), get_num_microbatches, slots, copies)


def _put_to_attention(blocks: Sequence[nn.Module], keys: Sequence[tuple[int, int]], queue: OffloadQueue) -> None:
    attention = [attention_of(block) for block in blocks]
    for chunk, layer in keys:
        keeper = attention[chunk][layer].keeper
        assert keeper is not None
        keeper.hold = partial(keep_on_host, queue, chunk, layer)


def _put_to_inputs(
    state: PluginState, blocks: Sequence[nn.Module], keys: Sequence[tuple[int, int]], queue: OffloadQueue
) -> None:
    state.layer_inputs = LayerInputs(queue, frozenset(keys))
    for chunk, block in enumerate(blocks):
        state.layer_inputs.watch(chunk, block, len(recomputed_groups(block.config, len(block.layers))))


def _line(kinds: Sequence[Kind], counts: dict[str, int], ranks: Sequence[RankNeeds], auto: float) -> str:
    parts = []
    for kind in kinds:
        count = counts[kind.flag]
        size = gigabytes(kind.bytes_by_count[count])
        parts.append(f"{kind.name} of {count} of {kind.layers} layers, {size} per rank")
    most = max(nodes_of(ranks), key=lambda node: node.nbytes(auto))
    return f"wallfacer: in host memory: {'; '.join(parts)}; {gigabytes(most.nbytes(auto))} on {most.name}"
