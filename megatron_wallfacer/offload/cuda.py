"""Copies on side streams of a GPU, one for each direction. Not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_wallfacer.offload.copies import Direction


class CudaCopies:
    """Copies by the GPU's copy engines; see :class:`megatron_wallfacer.offload.copies.Copies`.

    A tensor is freed by its owner after its copy was waited for on the stream of the kernels, where the allocator
    reuses its memory. ``Tensor.record_stream`` would delay that until the allocator next looks at its events.
    """

    def __init__(self) -> None:
        self._streams: dict[Direction, torch.cuda.Stream] = {
            "to host": torch.cuda.Stream(),
            "to device": torch.cuda.Stream(),
        }

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor, in the memory of the stream of the kernels."""
        return torch.empty(tuple(shape), dtype=dtype, device="cuda")

    def copy(
        self, direction: Direction, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        """Issue copies behind the kernels that were launched so far."""
        stream = self._streams[direction]
        # Kernels make the source of a copy to the host, and may still use the memory of the target of the other one.
        stream.wait_stream(torch.cuda.current_stream())
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, issued: torch.cuda.Event) -> None:
        """Let later kernels wait for the copies."""
        torch.cuda.current_stream().wait_event(issued)
