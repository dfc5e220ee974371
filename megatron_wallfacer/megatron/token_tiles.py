"""Compute a function of token rows tile by tile, so that intermediate tensors exist for only one tile at a time.

AutoChunk (arXiv 2401.10652) computes tile by tile in inference. In training, backward computes each tile again, because
autograd would otherwise save the intermediate tensors of all tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Forward = Callable[..., tuple[Tensor, Tensor | None]]


def map_token_tiles(
    function: Callable[..., Tensor], tiles: int, inputs: Sequence[tuple[Tensor, int]], *, out_dim: int
) -> Tensor:
    """Return ``function(*inputs)``, computed in exactly ``tiles`` tiles of tokens.

    The number of tiles must not depend on the number of tokens. Megatron's data parallelism counts how often each
    parameter receives a gradient, and expects the same count in every step. Tiles may be empty.

    Args:
        function: function that computes one tile of the output from one tile of each input, each token independently.
        tiles: number of tiles, at least 1.
        inputs: (tensor, token dimension) of each input, all with the same number of tokens.
        out_dim: token dimension of the output.
    """
    from megatron.core import tensor_parallel

    # Megatron's checkpoint also restores the random states of tensor parallelism.
    run = partial(tensor_parallel.checkpoint, function, False) if torch.is_grad_enabled() else function
    parts = zip(*(_split(tensor, tiles, dim) for tensor, dim in inputs), strict=True)
    return torch.cat([run(*part) for part in parts], out_dim)


def tiled_mlp_forward(original: Forward, tiles: int) -> Forward:
    """Return an ``MLP.forward`` that computes the tokens in tiles.

    A SwiGLU MLP saves three tensors of ``--ffn-hidden-size`` elements per token for backward. With tiles of tokens,
    memory contains the saved tensors of only one tile at a time, because backward computes each tile again.

    Shared experts (a subclass of MLP) and experts (which get a scale per token) use the original function. The number
    of tokens of an expert differs between ranks and steps.

    Args:
        original: Megatron's ``MLP.forward``.
        tiles: number of tiles, equal on all ranks and in all steps.
    """
    from megatron.core.transformer.mlp import MLP

    def forward(
        mlp: Any, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if type(mlp) is not MLP or per_token_scale is not None:
            return original(mlp, hidden_states, per_token_scale, **kwargs)
        bias: Tensor | None = None

        def output_of_tile(hidden: Tensor) -> Tensor:
            nonlocal bias
            # The bias is a parameter, equal for all tiles, which the caller adds.
            output, bias = original(mlp, hidden, **kwargs)
            return output

        return map_token_tiles(output_of_tile, tiles, [(hidden_states, 0)], out_dim=0), bias

    return forward


def _split(tensor: Tensor, tiles: int, dim: int) -> tuple[Tensor, ...]:
    """Return the tensors of ``torch.tensor_split``.

    Backward of ``torch.tensor_split`` allocates a gradient of the whole tensor for each tile. This function uses
    ``torch.split``, whose backward allocates the gradient of the whole tensor once.
    """
    size, larger = divmod(tensor.shape[dim], tiles)
    return torch.split(tensor, [size + (number < larger) for number in range(tiles)], dim)
