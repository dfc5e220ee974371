"""Compute the language model's head and loss in tiles of tokens: ``--wallfacer-loss-tiles``.

Logits take 2 bytes per token and vocabulary entry in bf16, plus 4 bytes in fp32 for the loss. For 131,072 tokens per
rank and a vocabulary of 128,256, logits take 101 GB per rank. With tiles of tokens, memory contains the logits of only
one tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from megatron_wallfacer.megatron.token_tiles import map_token_tiles


def tiled_loss(
    tiles: int,
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    runtime_gather_output: bool | None,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    scale_logits: Callable[[Tensor], Tensor],
    **_: Any,
) -> Tensor:
    """Return the loss of each token in fp32, ``[b, s]``. This is an ``output_processor`` for ``GPTModel.forward``.

    Args:
        tiles: number of tiles, equal on all ranks and in all steps.
        hidden_states: output of the last layer, ``[s, b, h]``; ``[s/tp, b, h]`` with sequence parallelism.
        output_layer: Megatron's ``ColumnParallelLinear`` of the vocabulary.
        output_weight: weight of tied embeddings, or None to use the layer's own weight.
        labels: token ids, ``[b, s]``.
        runtime_gather_output: argument of ``output_layer``.
        compute_language_model_loss: function of labels and logits ``[s, b, v/tp]`` that returns losses ``[b, s]``.
        scale_logits: Megatron's function that multiplies logits by a constant.
    """

    def loss_of_tile(hidden: Tensor, labels: Tensor) -> Tensor:
        with _whole_inputs(output_layer):
            logits, _ = output_layer(hidden, weight=output_weight, runtime_gather_output=runtime_gather_output)
        return compute_language_model_loss(labels, scale_logits(logits))

    hidden = _gathered_once(hidden_states, output_layer)
    return map_token_tiles(loss_of_tile, tiles, [(hidden, 0), (labels, 1)], out_dim=1)


def _gathered_once(hidden: Tensor, layer: Any) -> Tensor:
    """Return the layer's input ``[s, b, h]``, whose gradient is reduced over tensor-parallel ranks in backward.

    Without this function the output layer would gather hidden states, and reduce gradients, once per token tile. With
    sequence parallelism the local shard has only 1/tp of the tokens, but labels have all tokens.
    """
    from megatron.core import tensor_parallel

    if layer.sequence_parallel:
        return tensor_parallel.gather_from_sequence_parallel_region(hidden, group=layer.tp_group)
    return tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=layer.tp_group)


@contextmanager
def _whole_inputs(layer: Any) -> Iterator[None]:
    """Stop a column-parallel layer from gathering its input and from reducing its input's gradient."""
    names = ("sequence_parallel", "allreduce_dgrad", "disable_grad_reduce")
    saved = {name: getattr(layer, name) for name in names}
    layer.sequence_parallel, layer.allreduce_dgrad, layer.disable_grad_reduce = False, False, True
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(layer, name, value)
