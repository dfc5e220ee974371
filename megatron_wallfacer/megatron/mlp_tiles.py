"""Compute dense MLPs in tiles of tokens: ``--wallfacer-mlp-tiles``.

A SwiGLU MLP saves three tensors of ``--ffn-hidden-size`` elements per token for backward. With tiles of tokens, memory
contains the saved tensors of only one tile at a time, because backward computes each tile again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_wallfacer.megatron.token_tiles import map_token_tiles

Forward = Callable[..., tuple[Tensor, Tensor | None]]


def tiled_mlp_forward(original: Forward, tiles: int) -> Forward:
    """Return an ``MLP.forward`` that computes the tokens in tiles.

    Shared experts (a subclass of MLP) and experts (which get a scale per token) use the original function. Expert
    parallelism decides how many tokens an expert gets, so ranks would disagree about tiles.

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
