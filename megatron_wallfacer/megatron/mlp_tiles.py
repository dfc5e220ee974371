"""Dense MLPs in tiles of tokens: ``--wallfacer-mlp-tiles``.

A SwiGLU MLP saves three tensors of ``--ffn-hidden-size`` per token for backward. Tiled, they exist for one tile at a
time and are computed again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_wallfacer.megatron.token_tiles import map_token_tiles

Forward = Callable[..., tuple[Tensor, Tensor | None]]


def tiled_mlp_forward(original: Forward, tiles: int) -> Forward:
    """Return ``MLP.forward`` that computes tokens in tiles.

    Shared experts (a subclass) and experts, whose tokens come with a scale each, keep the original: expert parallelism
    decides how many tokens they get.

    Args:
        original: Megatron's ``MLP.forward``.
        tiles: number of tiles, the same on all ranks and in all steps.
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
            # The bias is a parameter, which the caller adds to all tokens.
            output, bias = original(mlp, hidden, **kwargs)
            return output

        return map_token_tiles(output_of_tile, tiles, [(hidden_states, 0)], out_dim=0), bias

    return forward
