"""Compares a model with tiled MLPs and a tiled loss with the same model without tiles, in fp64.

Started by ``train`` of :mod:`tests.support.megatron_runs`, one process for each tensor-parallel rank. Prints a line of
JSON for each case: the largest difference of losses and gradients, relative to the largest value.
"""

from __future__ import annotations

import itertools
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

TOKENS, BATCH, VOCABULARY = 24, 2, 96
#: One tile, numbers that divide the tokens and do not, and more tiles than tokens of a sequence-parallel shard.
TILES = (1, 2, 5, 30)


def keep_fp64(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As Megatron's, without its cast to fp32."""
    return logits, logits.max(dim=-1)[0]


def build(tp: int, *, sequence_parallel: bool, tied: bool) -> GPTModel:
    model_parallel_cuda_manual_seed(7)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        gated_linear_unit=True,
        add_bias_linear=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float64,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        VOCABULARY,
        TOKENS,
        share_embeddings_and_output_weights=tied,
    ).double()


def run(model: GPTModel, loss_tiles: int | None, *, masked: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses, and every gradient."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(VOCABULARY, (2, BATCH, TOKENS), generator=generator)
    positions = torch.arange(TOKENS).expand(BATCH, -1)
    mask = torch.triu(torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool), 1)
    processor: dict[str, Any] = {} if loss_tiles is None else {"output_processor": partial(tiled_loss, loss_tiles)}
    losses = model(tokens, positions, mask, labels=labels, **processor)
    weights = torch.rand(BATCH, TOKENS, generator=generator, dtype=torch.float64)
    (losses * (weights * (weights > 0.5) if masked else weights)).sum().backward()
    return losses.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def main() -> None:
    dist.init_process_group("gloo")
    tp = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(keep_fp64)
    untiled = MLP.forward
    for sequence_parallel, tied in itertools.product((False, True) if tp > 1 else (False,), (False, True)):
        model = build(tp, sequence_parallel=sequence_parallel, tied=tied)
        for masked in (False, True):
            want_losses, want = run(model, None, masked=masked)
            for tiles in TILES:
                MLP.forward = tiled_mlp_forward(untiled, tiles)
                losses, gradients = run(model, tiles, masked=masked)
                MLP.forward = untiled
                case = {"tp": tp, "sp": sequence_parallel, "tied": tied, "masked": masked, "tiles": tiles}
                case["loss"] = difference(losses, want_losses)
                case["gradient"] = max(difference(gradients[name], want[name]) for name in want)
                print("tiles", json.dumps(case), flush=True)


main()
