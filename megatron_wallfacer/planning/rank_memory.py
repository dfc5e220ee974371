"""Device and host memory of one rank: parameters, gradients, optimizer states and activations."""

from __future__ import annotations

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.inventory import Activations, Buffer, inventory
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.training_options import Adam, ParallelSizes, TrainingOptions

#: Bytes per parameter of the bf16 weight.
WEIGHT = 2
#: Bytes per parameter of Adam's states on the device: two fp32 moments, and an fp32 weight or the 16 bits that complete
#: the bf16 weight to fp32.
ADAM: dict[Adam, int] = {"device": 12, "precision-aware": 10, "host": 0}
#: Bytes per parameter in host memory with ``--optimizer-cpu-offload``: fp32 weight, gradient and two moments.
HOST_ADAM = 16


def parameters_of_rank(model: Model, sizes: ParallelSizes) -> float:
    """Return the number of parameters per rank of the largest stage: the first (embedding) or the last (LM head)."""
    layers = model.layers * model.layer_parameters / sizes.pp
    return (layers + model.vocabulary_parameters / (1 if sizes.pp == 1 or model.tied else 2)) / sizes.tp


def state_buffers(model: Model, sizes: ParallelSizes, options: TrainingOptions) -> tuple[Buffer, ...]:
    """Return the memory of weights, gradients and Adam's states of one rank, which exist during a whole step."""
    parameters, ranks = parameters_of_rank(model, sizes), sizes.dp * sizes.cp
    adam = parameters * ADAM[options.adam] / ranks
    if options.states == "zero-2":
        gradients = Buffer("gradients", parameters * WEIGHT / ranks)
    else:
        gradients = Buffer("gradient buffer", parameters * options.gradient_bytes)
    return Buffer("weights", parameters * WEIGHT), gradients, Buffer("Adam's states", adam)


def host_state_bytes(model: Model, sizes: ParallelSizes, options: TrainingOptions) -> float:
    """Return the bytes of host memory that the optimizer of one rank needs."""
    if options.adam != "host":
        return 0.0
    return HOST_ADAM * parameters_of_rank(model, sizes) / (sizes.dp * sizes.cp)


def activations(
    model: Model, tokens: int, attention: AttentionMemory, sizes: ParallelSizes, options: TrainingOptions
) -> Activations:
    """Return the sizes and options that determine the activation memory of a rank with ``tokens`` tokens."""
    return Activations(
        model,
        tokens,
        tp=sizes.tp,
        layers=model.layers // sizes.pp * micro_batches_in_flight(sizes),
        in_flight=micro_batches_in_flight(sizes),
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
    """Return all buffers of one rank on its device. The arguments are those of :func:`activations`.

    Fragmentation, the CUDA context and NCCL's buffers are not included.
    """
    work = activations(model, tokens, attention, sizes, options)
    return (*state_buffers(model, sizes, options), *inventory(work))


def host_bytes(
    model: Model, tokens: int, attention: AttentionMemory, sizes: ParallelSizes, options: TrainingOptions
) -> float:
    """Return the bytes of host memory that one rank uses. The arguments are those of :func:`activations`."""
    work = activations(model, tokens, attention, sizes, options)
    return work.host_bytes + host_state_bytes(model, sizes, options)


def micro_batches_in_flight(sizes: ParallelSizes) -> int:
    """Return the number of micro-batches whose activations the first pipeline stage holds at the same time."""
    return min(sizes.pp, sizes.microbatches)
