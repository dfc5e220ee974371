"""Token counts of the mixture-of-experts dispatcher.

The all-to-all dispatcher hands gloo the split sizes as numpy arrays: `maybe_move_tensor_to_cpu` (moe_utils.py) converts
them on their way from the device to the host. It converts nothing that is on the host already, and a tensor is not
accepted as split sizes.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_wallfacer.megatron.replace import replace


def install() -> None:
    """Replace the function where the dispatcher has bound it."""
    replace("megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu", _on_the_host)


def _on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`tensor` as it is, or as the numpy array that is asked for."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
