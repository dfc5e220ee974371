"""Describe the tensors of a rank's model that can be in host memory: layers, groups and bytes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from torch import nn

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention
from megatron_wallfacer.megatron.flags import Flags
from megatron_wallfacer.megatron.model_shape import dtype_of
from megatron_wallfacer.offload.host import slot_bytes
from megatron_wallfacer.offload.order import Pipeline, passes_of_step
from megatron_wallfacer.offload.slots import Groups, SlotPlan, assign_slots, first_layers, uses_of_step


@dataclass(frozen=True, eq=False)
class Kind:
    """Tensors of one kind (attention outputs or layer inputs) on one rank.

    Attributes:
        flag: command-line flag that moves the tensors to host memory.
        name: name of the tensors in the log.
        pipeline: position of the rank in the pipeline.
        groups: for each model chunk, tuples of layer numbers. Backward recomputes all layers of one tuple together.
        nbytes: bytes of a host-memory slot by (chunk, layer).
        micro_batches: micro-batches per step.
    """

    flag: str
    name: str
    pipeline: Pipeline
    groups: Mapping[int, Groups]
    nbytes: Mapping[tuple[int, int], int]
    micro_batches: int

    @property
    def layers(self) -> int:
        """Number of layers that have tensors of this kind. For layer inputs: number of recomputed groups of layers."""
        return len(self.nbytes)

    def plan(self, count: int, micro_batches: int | None = None) -> SlotPlan:
        """Return the plan that puts the tensors of the first ``count`` layers into host memory."""
        return _plan_of(self, count, self.micro_batches if micro_batches is None else micro_batches)

    @cached_property
    def bytes_by_count(self) -> tuple[int, ...]:
        """Element N is the bytes in host memory if N layers have tensors there."""
        return tuple(self.plan(count).nbytes for count in range(self.layers + 1))


@cache
def _plan_of(kind: Kind, count: int, micro_batches: int) -> SlotPlan:
    passes = passes_of_step(kind.pipeline, micro_batches)
    return assign_slots(uses_of_step(passes, first_layers(kind.groups, count)), kind.nbytes)


def blocks_of(model: Sequence[nn.Module], flag: str) -> list[nn.Module]:
    """Return the ``TransformerBlock`` of each model chunk. Each chunk must have one block."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    found = [[module for module in chunk.modules() if isinstance(module, TransformerBlock)] for chunk in model]
    for number, blocks in enumerate(found, 1):
        if len(blocks) != 1:
            raise WallfacerError(
                f"{flag}: must be left out, because model chunk {number} has {len(blocks)} transformer blocks, not one"
            )
    return [blocks[0] for blocks in found]


def pipeline_of(config: Any, chunks: int) -> Pipeline:
    """Return this rank's position in the pipeline. ``chunks`` is the number of model chunks on this rank."""
    from megatron.core import parallel_state

    interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
    return Pipeline(
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        chunks if interleaved else None,
        getattr(config, "microbatch_group_size_per_vp_stage", None),
    )


def recomputed_groups(config: Any, layers: int) -> list[tuple[int, ...]]:
    """Return the layer numbers (from 0) in each activation checkpoint of a model chunk, one tuple per checkpoint."""
    if config.recompute_granularity != "full":
        return [(layer,) for layer in range(layers)]
    if config.recompute_method == "block":
        return [(layer,) for layer in range(min(layers, config.recompute_num_layers))]
    starts = range(0, layers, config.recompute_num_layers)
    return [tuple(range(start, min(start + config.recompute_num_layers, layers))) for start in starts]


def attention_of(block: nn.Module) -> dict[int, WallfacerCoreAttention]:
    """Return the plugin's attention modules in a transformer block, by layer number (from 0)."""
    found = {}
    for number, layer in enumerate(block.layers):
        attention = getattr(getattr(layer, "self_attention", None), "core_attention", None)
        if isinstance(attention, WallfacerCoreAttention):
            found[number] = attention
    return found


def kept_outputs(flag: str, blocks: Sequence[nn.Module], pipeline: Pipeline, args: argparse.Namespace) -> Kind:
    """Return the attention outputs that ``--wallfacer-keep-attention-output`` keeps on this rank."""
    groups, nbytes = {}, {}
    tokens, batch = args.seq_length // Flags.of(args).cp_size, args.micro_batch_size
    for chunk, block in enumerate(blocks):
        attention = attention_of(block)
        groups[chunk] = [
            tuple(layer for layer in group if layer in attention)
            for group in recomputed_groups(block.config, len(block.layers))
        ]
        for layer in (layer for group in groups[chunk] for layer in group):
            nbytes[chunk, layer] = slot_bytes(attention[layer].kept_bytes(tokens, batch))
    return Kind(flag, "attention outputs", pipeline, groups, nbytes, micro_batches_of(args))


def layer_inputs(flag: str, blocks: Sequence[nn.Module], pipeline: Pipeline, args: argparse.Namespace) -> Kind:
    """Return the layer inputs (hidden states) that this rank's activation checkpoints save, one input per checkpoint.

    If a model chunk has no embedding, the input of its first layer stays on the device. Megatron sends the gradient of
    this input to the previous stage.
    """
    groups, nbytes = {}, {}
    tokens = args.seq_length // Flags.of(args).cp_size
    itemsize = 4 if getattr(args, "fp32_residual_connection", False) else dtype_of(args).itemsize
    for chunk, block in enumerate(blocks):
        shards = block.config.tensor_model_parallel_size if block.config.sequence_parallel else 1
        size = tokens // shards * args.micro_batch_size * block.config.hidden_size * itemsize
        first = 0 if block.pre_process else 1
        checkpoints = range(first, len(recomputed_groups(block.config, len(block.layers))))
        groups[chunk] = [(checkpoint,) for checkpoint in checkpoints]
        nbytes |= {(chunk, checkpoint): slot_bytes([size]) for checkpoint in checkpoints}
    return Kind(flag, "layer inputs", pipeline, groups, nbytes, micro_batches_of(args))


def micro_batches_of(args: argparse.Namespace) -> int:
    """Return the number of micro-batches that a rank computes per step at ``--global-batch-size``."""
    from megatron.core import parallel_state

    at_once = args.micro_batch_size * parallel_state.get_data_parallel_world_size()
    return (args.global_batch_size or at_once) // at_once
