"""Convert token counts of the mixture-of-experts dispatcher to numpy arrays on the CPU.

The all-to-all dispatcher passes split sizes to gloo as numpy arrays. `maybe_move_tensor_to_cpu` (moe_utils.py) converts
only tensors on a device, not tensors on the host, and gloo does not accept a tensor as split sizes.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_wallfacer.megatron.replace import replace


def install() -> None:
    """Replace `maybe_move_tensor_to_cpu` in the dispatcher's module."""
    replace("megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu", _on_the_host)


def _on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return `tensor`, or its numpy array if the caller requests it."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
