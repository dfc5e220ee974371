"""Compares gradients in bf16 with those in fp64: without tiles, with 64, and with 64 that are summed in bf16.

Started by ``train`` of :mod:`tests.support.megatron_runs`. Prints a line of JSON: by kind of run, the error of all
gradients together, relative to their norm.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_wallfacer.megatron.loss_tiles import tiled_loss
from megatron_wallfacer.megatron.token_tiles import tiled_mlp_forward

TOKENS, BATCH, VOCABULARY, TILES = 128, 2, 96, 64


def keep_fp64(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As Megatron's, without its cast to fp32."""
    return logits, logits.max(dim=-1)[0]


def build(dtype: torch.dtype) -> GPTModel:
    model_parallel_cuda_manual_seed(7)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        gated_linear_unit=True,
        add_bias_linear=False,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(config, spec, VOCABULARY, TOKENS, share_embeddings_and_output_weights=False).to(dtype)


def gradients(model: GPTModel, tiles: int | None, sums: torch.dtype) -> Tensor:
    """Every gradient, summed in a ``main_grad`` of a dtype as Megatron's data parallelism does, in one vector."""
    parameters = [*model.parameters()]
    for parameter in parameters:
        parameter.main_grad = torch.zeros_like(parameter, dtype=sums)

    def add(parameter: Tensor) -> None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(add) for parameter in parameters]
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(VOCABULARY, (2, BATCH, TOKENS), generator=generator)
    positions = torch.arange(TOKENS).expand(BATCH, -1)
    mask = torch.triu(torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool), 1)
    untiled = MLP.forward
    processor: dict[str, Any] = {}
    if tiles is not None:
        MLP.forward, processor = tiled_mlp_forward(untiled, tiles), {"output_processor": partial(tiled_loss, tiles)}
    model(tokens, positions, mask, labels=labels, **processor).sum().backward()
    MLP.forward = untiled
    for handle in handles:
        handle.remove()
    return torch.cat([parameter.main_grad.flatten().double() for parameter in parameters])


def main() -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model = build(torch.bfloat16)
    runs = {
        "untiled": gradients(model, None, torch.float32),
        "tiled": gradients(model, TILES, torch.float32),
        "tiled, summed in bf16": gradients(model, TILES, torch.bfloat16),
    }
    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(keep_fp64)
    exact = build(torch.float64)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            parameter.copy_(weights[name])
    want = gradients(exact, None, torch.float64)
    print("rounding", json.dumps({name: float((got - want).norm() / want.norm()) for name, got in runs.items()}))


main()
