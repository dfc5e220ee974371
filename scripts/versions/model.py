"""A small GPT of Megatron's own classes: loss and gradients split over ranks against the same on one rank."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_wallfacer.megatron.flags import add_arguments
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.settings import settings_from

SEQUENCE, VOCABULARY, HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 96, 64, 4, 2, 2


def prepare() -> None:
    """Let torch pass for a machine with CUDA, as far as a model needs it. Before Megatron is imported."""
    from megatron_wallfacer.megatron.cpu_runtime import environment, libraries, tensors, torch_cuda

    for part in (libraries, environment, torch_cuda, tensors):
        part.install()


def join(rank: int, size: int, store: Path) -> None:
    """Become a rank, with Megatron's groups."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    model_parallel_cuda_manual_seed(1)


def settle(state: PluginState, cp_size: int) -> None:
    """Turn the plugin on as the arguments hook does, for this model: some wheels have no parser."""
    parser = ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([])
    vars(args).update(
        wallfacer_cp_size=cp_size,
        context_parallel_size=cp_size,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        group_query_attention=True,
        hidden_size=HIDDEN,
        kv_channels=None,
        seq_length=SEQUENCE,
        micro_batch_size=1,
        attention_dropout=0.0,
        bf16=False,
        fp16=False,
        distributed_timeout_minutes=10,
    )
    state.args = args
    state.turn_on(settings_from(args), None)


def loss_and_gradients(rank: int, size: int) -> tuple[float, dict[str, Tensor], nn.Module]:
    """Mean loss of the whole sequence and its gradient by parameter, summed over the ranks; and the model."""
    model = _build(size)
    tokens = torch.randint(VOCABULARY, (1, SEQUENCE + 1), generator=torch.Generator().manual_seed(2))
    chunks = [rank, 2 * size - 1 - rank]
    positions = torch.cat([torch.arange(SEQUENCE).chunk(2 * size)[chunk] for chunk in chunks])[None]
    later = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None] if size == 1 else None
    losses = model(tokens[:, positions[0]], positions, later, labels=tokens[:, positions[0] + 1])
    loss = losses.sum() / SEQUENCE
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    loss = loss.detach().clone()
    for tensor in (loss, *gradients.values()):
        dist.all_reduce(tensor)
    return loss.item(), gradients, model


def _build(cp_size: int) -> nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=2 * HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        context_parallel_size=cp_size,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
    )
    options: dict[str, Any] = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": True}
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE, **options)
    # The same weights in every version, on every rank, whatever order they are made in.
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model
