"""Compute a function of token rows tile by tile, so that intermediate tensors exist for only one tile at a time.

AutoChunk (arXiv 2401.10652) computes tiles in inference. In training, backward computes each tile again, because
autograd would otherwise save the intermediate tensors of all tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor


def map_token_tiles(
    function: Callable[..., Tensor], tiles: int, inputs: Sequence[tuple[Tensor, int]], *, out_dim: int
) -> Tensor:
    """Return ``function(*inputs)``, computed in exactly ``tiles`` tiles of tokens.

    The number of tiles must not depend on the number of tokens. Megatron's data parallelism counts how often each
    parameter receives a gradient, and expects the same count in every step. Tiles may be empty.

    Args:
        function: map from one tile of each input to one tile of the output, independent for each token.
        tiles: number of tiles, at least 1.
        inputs: (tensor, token dimension) of each input, all with the same number of tokens.
        out_dim: token dimension of the output.
    """
    from megatron.core import tensor_parallel

    # Megatron's checkpoint also restores the random states of tensor parallelism.
    run = partial(tensor_parallel.checkpoint, function, False) if torch.is_grad_enabled() else function
    parts = zip(*(_split(tensor, tiles, dim) for tensor, dim in inputs), strict=True)
    return torch.cat([run(*part) for part in parts], out_dim)


def _split(tensor: Tensor, tiles: int, dim: int) -> tuple[Tensor, ...]:
    """Return the tensors of ``torch.tensor_split``.

    Backward of ``torch.tensor_split`` makes one gradient of the full size per tile. Backward of ``torch.split``, which
    this function uses, makes one gradient of the full size for all tiles.
    """
    size, larger = divmod(tensor.shape[dim], tiles)
    return torch.split(tensor, [size + (number < larger) for number in range(tiles)], dim)
