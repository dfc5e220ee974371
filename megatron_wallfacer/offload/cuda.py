"""Copy tensors on side streams of a GPU, one stream per direction. This module has not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_wallfacer.offload.copies import Direction


class CudaCopies:
    """Copies by the GPU's copy engines. See :class:`megatron_wallfacer.offload.copies.Copies`.

    Before a tensor is freed, the kernels' stream waits until the tensor has been copied. So kernels can reuse its
    memory immediately. ``Tensor.record_stream`` would delay the reuse.
    """

    def __init__(self) -> None:
        self._streams: dict[Direction, torch.cuda.Stream] = {
            "to host": torch.cuda.Stream(),
            "to device": torch.cuda.Stream(),
        }

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor in memory that the allocator assigns to the kernels' stream."""
        return torch.empty(tuple(shape), dtype=dtype, device="cuda")

    def copy(
        self, direction: Direction, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        """Issue copies that run after the kernels launched so far."""
        stream = self._streams[direction]
        # Wait for kernels, which write the source of a copy to the host and may still use a target's reused memory.
        stream.wait_stream(torch.cuda.current_stream())
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, issued: torch.cuda.Event) -> None:
        """Make kernels launched after this call wait for the copies."""
        torch.cuda.current_stream().wait_event(issued)
