"""TransformerEngine's variables that turn kinds of attention off: ``auto`` takes no kernel of such a kind.

A kernel that is named is taken all the same.
"""

from __future__ import annotations

import os

import torch

_FUSED, _FLASH = "NVTE_FUSED_ATTN", "NVTE_FLASH_ATTN"
#: Kernel on a GPU -> variable. ``torch`` is PyTorch's copy of FlashAttention 2 there.
_VARIABLES = {"te": _FUSED, "cudnn": _FUSED, **dict.fromkeys(("flash4", "flash3", "flash2", "torch"), _FLASH)}


def switched_off(kernel: str, device: torch.device) -> str | None:
    """Return why ``auto`` leaves out a kernel, as a phrase, or None.

    Args:
        kernel: its name.
        device: device of the tensors; the variables are about GPUs.
    """
    variable = _VARIABLES.get(kernel)
    if device.type != "cuda" or variable is None or os.environ.get(variable, "1").strip() != "0":
        return None
    return f"{variable}=0 turns it off for auto"


def switches_in_effect(device: torch.device) -> str:
    """Return which variables ``auto`` obeys here, e.g. ``NVTE_FLASH_ATTN=0``; empty where none is set to 0."""
    kernels = {variable: kernel for kernel, variable in _VARIABLES.items()}
    return ", ".join(f"{variable}=0" for variable, kernel in kernels.items() if switched_off(kernel, device))
