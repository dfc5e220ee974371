"""Bytes of one rank on its device and in host memory: states and activations, from the inventory."""

from __future__ import annotations

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.inventory import Activations, Buffer, inventory
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.states import host_state_bytes, state_buffers
from megatron_wallfacer.planning.training_options import ParallelSizes, TrainingOptions


def activations(
    model: Model, tokens: int, attention: AttentionMemory, sizes: ParallelSizes, options: TrainingOptions
) -> Activations:
    """Return one rank's activations for the inventory.

    Args:
        model: trained model.
        tokens: tokens per context-parallel rank.
        attention: memory that attention allocates.
        sizes: sizes of the process groups.
        options: recomputation, tiles, and tensors in host memory.
    """
    return Activations(
        model,
        tokens,
        tp=sizes.tp,
        layers=layers_in_flight(model, sizes),
        recompute=options.recompute,
        loss_tiles=options.loss_tiles,
        mlp_tiles=options.mlp_tiles,
        attention=attention,
        outputs_on_host=options.outputs_on_host,
        inputs_on_host=options.inputs_on_host,
    )


def rank_buffers(
    model: Model, tokens: int, attention: AttentionMemory, sizes: ParallelSizes, options: TrainingOptions
) -> tuple[Buffer, ...]:
    """Return all buffers of one rank on its device. Arguments as for :func:`activations`.

    Fragmentation, the CUDA context and NCCL's buffers are not counted.
    """
    work = activations(model, tokens, attention, sizes, options)
    return (*state_buffers(model, sizes, options), *inventory(work))


def host_bytes(
    model: Model, tokens: int, attention: AttentionMemory, sizes: ParallelSizes, options: TrainingOptions
) -> float:
    """Return the bytes of one rank in host memory. Arguments as for :func:`activations`."""
    work = activations(model, tokens, attention, sizes, options)
    return work.host_bytes + host_state_bytes(model, sizes, options)


def layers_in_flight(model: Model, sizes: ParallelSizes) -> int:
    """Return the layers of a stage times its micro-batches in flight, which are at most as many as stages."""
    return model.layers // sizes.pp * min(sizes.pp, sizes.microbatches)
