"""Gather and reduce-scatter parts of different lengths over gloo, on the CPU or for ranks that share a GPU.

With tensor and expert parallelism the all-to-all dispatcher gathers a different number of tokens from each
tensor-parallel rank. NCCL supports parts of different lengths, but gloo does not, so this module pads the parts to the
longest. Groups whose backend is not gloo use Megatron's own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.megatron.replace import wrap

_MODULE = "megatron.core.tensor_parallel.mappings"


def install() -> None:
    """Wrap the gather and reduce-scatter functions that Megatron's autograd functions call."""
    wrap(f"{_MODULE}:_gather_along_first_dim", _gathering)
    wrap(f"{_MODULE}:_reduce_scatter_along_first_dim", _reduce_scattering)


def _gathering(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def gather(
        input_: Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if output_split_sizes is None or len(set(output_split_sizes)) == 1 or not _is_gloo(group):
            return original(input_, group, output_split_sizes, use_global_buffer)
        return gather_uneven(input_, group, output_split_sizes)

    return gather


def _reduce_scattering(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce_scatter(
        input_: Tensor, group: Any, input_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if input_split_sizes is None or len(set(input_split_sizes)) == 1 or not _is_gloo(group):
            return original(input_, group, input_split_sizes, use_global_buffer)
        return reduce_scatter_uneven(input_, group, input_split_sizes)

    return reduce_scatter


def _is_gloo(group: dist.ProcessGroup) -> bool:
    return dist.get_backend(group) == dist.Backend.GLOO


def gather_uneven(tensor: Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """Return the concatenation of the tensors of all ranks.

    Args:
        tensor: tensor of this rank, ``[sizes[rank], ...]``.
        group: process group of the ranks.
        sizes: length of each rank's tensor along the first dimension.

    Returns:
        ``[sum(sizes), ...]``.
    """
    longest = max(sizes)
    parts = [tensor.new_empty(longest, *tensor.shape[1:]) for _ in sizes]
    dist.all_gather(parts, _padded(tensor, longest), group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatter_uneven(tensor: Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """Return this rank's part of the sum of all ranks' tensors.

    Args:
        tensor: summand of this rank, ``[sum(sizes), ...]``.
        group: process group of the ranks.
        sizes: length of each rank's part along the first dimension.

    Returns:
        ``[sizes[rank], ...]``.
    """
    longest = max(sizes)
    parts = torch.cat([_padded(part, longest) for part in tensor.split(list(sizes))])
    own = tensor.new_empty(longest, *tensor.shape[1:])
    dist.reduce_scatter_tensor(own, parts, group=group)
    return own[: sizes[group.rank()]]


def _padded(tensor: Tensor, length: int) -> Tensor:
    """Return the tensor followed by zeros, ``[length, ...]``."""
    return torch.cat([tensor, tensor.new_zeros(length - tensor.shape[0], *tensor.shape[1:])])
