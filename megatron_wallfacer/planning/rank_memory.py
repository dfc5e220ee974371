"""Bytes of one rank and of its node's host memory: states and activations, from the inventory."""

from __future__ import annotations

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.inventory import Activations, Buffer, inventory
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.parallel import Software, Spread
from megatron_wallfacer.planning.states import host_state_bytes, state_buffers


def activations(
    model: Model, tokens: int, attention: AttentionMemory, spread: Spread, software: Software
) -> Activations:
    """Return one rank's micro-batch, as the inventory takes it.

    Args:
        model: that is trained.
        tokens: tokens per context-parallel rank.
        attention: what attention allocates.
        spread: sizes of the groups.
        software: recomputation, tiles and what is kept on the host.
    """
    return Activations(
        model,
        tokens,
        tp=spread.tp,
        layers=layers_in_flight(model, spread),
        recompute=software.recompute,
        loss_tiles=software.loss_tiles,
        mlp_tiles=software.mlp_tiles,
        attention=attention,
        outputs_on_host=software.outputs_on_host,
        inputs_on_host=software.inputs_on_host,
    )


def rank_buffers(
    model: Model, tokens: int, attention: AttentionMemory, spread: Spread, software: Software
) -> tuple[Buffer, ...]:
    """Return everything that one rank holds on its device. Arguments as for :func:`activations`.

    Fragmentation, the CUDA context and NCCL's buffers are not counted.
    """
    work = activations(model, tokens, attention, spread, software)
    return (*state_buffers(model, spread, software), *inventory(work))


def host_bytes(model: Model, tokens: int, attention: AttentionMemory, spread: Spread, software: Software) -> float:
    """Return the bytes of host memory that one rank takes. Arguments as for :func:`activations`."""
    work = activations(model, tokens, attention, spread, software)
    return work.host_bytes + host_state_bytes(model, spread, software)


def layers_in_flight(model: Model, spread: Spread) -> int:
    """Return the layers of a stage, for each micro-batch that it has at once: as many as there are stages."""
    return model.layers // spread.pp * min(spread.pp, spread.microbatches)
