"""A function of token rows computed tile by tile, so that its intermediate tensors exist for one tile at a time.

AutoChunk (arXiv 2401.10652) does this for inference. In training each tile is also computed again in backward, because
its intermediate tensors would otherwise be saved for all tiles together.
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

    The number of tiles never depends on the number of tokens: Megatron's data parallelism counts how often each
    parameter receives a gradient, and expects the same count in every step. With fewer tokens some tiles are empty.

    Args:
        function: map from one tile of each input to one tile of the output. It treats tokens independently.
        tiles: number of tiles, at least 1.
        inputs: (tensor, dimension of its tokens) of each input, all with the same number of tokens.
        out_dim: dimension of the output's tokens.

    Returns:
        The output of all tokens.
    """
    from megatron.core import tensor_parallel

    # Megatron's checkpoint also restores the random states of tensor parallelism. Without gradients it only adds work.
    run = partial(tensor_parallel.checkpoint, function, False) if torch.is_grad_enabled() else function
    parts = zip(*(_split(tensor, tiles, dim) for tensor, dim in inputs), strict=True)
    return torch.cat([run(*part) for part in parts], out_dim)


def _split(tensor: Tensor, tiles: int, dim: int) -> tuple[Tensor, ...]:
    """Return the parts of ``torch.tensor_split``.

    Backward of that function makes a gradient of the whole size for each part; backward of ``torch.split`` makes one.
    """
    size, larger = divmod(tensor.shape[dim], tiles)
    return torch.split(tensor, [size + (number < larger) for number in range(tiles)], dim)
