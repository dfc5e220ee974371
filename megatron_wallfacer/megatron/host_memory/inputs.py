"""Move inputs of checkpointed layers to host memory through hooks on the tensors that autograd saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.flags import INPUTS
from megatron_wallfacer.offload.queue import OffloadQueue, Stored

#: Modules that define the checkpointed function of a layer: until Megatron 0.18, and from 0.19 on.
_MODULES = ("megatron.core.transformer.transformer_block", "megatron.core.recompute")


class LayerInputs:
    """Wrapper of Megatron's activation checkpoint. The wrapper puts layer inputs (hidden states) into a queue.

    Activation checkpoints also save rotary embeddings and masks. All layers share these, so they stay on the device.

    Args:
        queue: queue that stores layer inputs in host memory.
        on_host: inputs to keep in host memory, as (model chunk, recomputed group of layers). Both are counted from 0.
    """

    def __init__(self, queue: OffloadQueue, on_host: frozenset[tuple[int, int]]) -> None:
        self.queue, self._on_host = queue, on_host
        #: Chunk in its forward pass, and the number of the chunk's next checkpoint.
        self._chunk: int | None = None
        self._next = 0

    def watch(self, chunk: int, block: nn.Module, checkpoints: int) -> None:
        """Count the recomputed groups of layers in each forward pass of a model chunk's transformer block.

        Args:
            chunk: number of the chunk from 0.
            block: transformer block of the chunk.
            checkpoints: number of recomputed groups of layers that a forward pass must have. Any other number raises an
                error, because layer inputs might stay on the device unnoticed.
        """

        def begin(module: nn.Module, args: Any) -> None:
            self._chunk, self._next = (chunk if module.training else None), 0

        def end(module: nn.Module, args: Any, output: Any) -> None:
            trained, self._chunk = self._chunk is not None and torch.is_grad_enabled(), None
            # The output is None after an exception.
            if output is not None and trained and self._next != checkpoints:
                raise WallfacerError(
                    f"{INPUTS}: must be left out, because model chunk {chunk + 1} checkpointed {self._next} "
                    f"layers in a forward pass, not {checkpoints}"
                )

        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end, always_call=True)

    def checkpoint(self, original: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        """Call Megatron's activation checkpointing, and move the saved layer input to the host.

        Args:
            original: ``tensor_parallel.checkpoint``.
            function: function that is checkpointed.
            args: a bool, whether to distribute the saved activations over ranks, then the arguments of ``function``.
        """
        # A checkpoint inside a layer's checkpoint runs without gradients, or in backward.
        is_layer = getattr(function, "__name__", "") == "custom_forward" and function.__module__ in _MODULES
        if self._chunk is None or not is_layer or not torch.is_grad_enabled():
            return original(function, *args)
        key = self._chunk, self._next
        self._next += 1
        if key not in self._on_host:
            return original(function, *args)
        with saved_tensors_hooks(self._pack(key, args[1]), self._unpack):
            return original(function, *args)

    def _pack(self, key: tuple[int, int], hidden: Tensor) -> Callable[[Tensor], Tensor | Stored]:
        # A reference to the tensor could keep it on the device, because the hook may live as long as its result.
        address, shape = hidden.data_ptr(), hidden.shape

        def pack(saved: Tensor) -> Tensor | Stored:
            is_hidden = saved.data_ptr() == address and saved.shape == shape
            return self.queue.store(*key, (saved,)) if is_hidden else saved

        return pack

    def _unpack(self, saved: Tensor | Stored) -> Tensor:
        return saved if isinstance(saved, Tensor) else self.queue.load(saved)[0]
