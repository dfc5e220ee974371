"""Inputs of checkpointed layers in host memory, by hooks on the tensors that autograd saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.flags import INPUTS
from megatron_wallfacer.offload.queue import OffloadQueue, Stored

#: Where Megatron makes the function of a layer's checkpoint: until 0.18, from 0.19 on.
_MODULES = ("megatron.core.transformer.transformer_block", "megatron.core.recompute")


class LayerInputs:
    """Hands the hidden states that a layer's checkpoint saves to a queue.

    Rotary positions and masks, which checkpoints save too, are shared by all layers and stay on the device.

    Args:
        queue: of layer inputs.
        on_host: (model chunk, checkpoint), both from 0, whose inputs are in host memory.
    """

    def __init__(self, queue: OffloadQueue, on_host: frozenset[tuple[int, int]]) -> None:
        self.queue, self._on_host = queue, on_host
        #: Chunk whose forward pass runs, and the number of its next checkpoint.
        self._chunk: int | None = None
        self._next = 0

    def watch(self, chunk: int, block: nn.Module, checkpoints: int) -> None:
        """Follow the forward passes of a chunk's transformer block.

        Args:
            chunk: number of the chunk, from 0.
            block: the block.
            checkpoints: checkpoints of layers in a forward pass. Another number is an error, not a step whose inputs
                stay on the device.
        """

        def begin(module: nn.Module, args: Any) -> None:
            self._chunk, self._next = (chunk if module.training else None), 0

        def end(module: nn.Module, args: Any, output: Any) -> None:
            trained, self._chunk = self._chunk is not None and torch.is_grad_enabled(), None
            # After an exception there is no output.
            if output is not None and trained and self._next != checkpoints:
                raise WallfacerError(
                    f"{INPUTS}: must be left out here: model chunk {chunk + 1} ran {self._next} checkpoints of layers, "
                    f"not {checkpoints}"
                )

        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end, always_call=True)

    def checkpoint(self, original: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        """Run Megatron's checkpoint.

        Args:
            original: ``tensor_parallel.checkpoint``.
            function: function that is checkpointed.
            args: further arguments of ``original``: whether to distribute activations, and those of ``function``.
        """
        # A checkpoint inside that of a layer runs without gradients, or in backward.
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
        # Not the tensor itself: the hook may live as long as what it returns.
        address, shape = hidden.data_ptr(), hidden.shape

        def pack(saved: Tensor) -> Tensor | Stored:
            is_hidden = saved.data_ptr() == address and saved.shape == shape
            return self.queue.store(*key, (saved,)) if is_hidden else saved

        return pack

    def _unpack(self, saved: Tensor | Stored) -> Tensor:
        return saved if isinstance(saved, Tensor) else self.queue.load(saved)[0]
