"""Which kernel runs: chosen once, by name or by device, never changed behind the user's back."""

from __future__ import annotations

import torch

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel

KERNELS: tuple[str, ...] = ("auto", "torch", "reference")
NOT_BUILT_YET: tuple[str, ...] = ("te", "flash", "cudnn")
#: What ``auto`` is, by device type. There is no fused kernel for CUDA yet.
_AUTO = {"cpu": "torch", "cuda": "reference"}
_BUILT: dict[str, type[Kernel]] = {"torch": TorchCpuKernel, "reference": ReferenceKernel}


def select_kernel(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    v_head_dim: int | None = None,
    softcap: float = 0.0,
) -> Kernel:
    """The kernel of that name, or with ``auto`` the best that is built for the device.

    Raises:
        OptionError: the name is unknown, not built yet, or the kernel cannot serve such inputs.
    """
    if name in NOT_BUILT_YET:
        raise OptionError("kernel", name, f"one of {', '.join(KERNELS)}; {name} is not built yet")
    if name not in KERNELS:
        raise OptionError("kernel", name, f"one of {', '.join(KERNELS)}")
    kernel = _BUILT[_AUTO.get(device.type, "torch") if name == "auto" else name]()
    sizes = {"head_dim": head_dim, "v_head_dim": v_head_dim or head_dim}
    refusal = kernel.refusal(device=device, dtype=dtype, softcap=softcap, **sizes)
    if refusal is not None:
        raise OptionError("kernel", name, f"reference here, because {kernel.name} cannot: {refusal}")
    return kernel
