"""Which kernel runs: chosen once, by name or by device, never changed behind the user's back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.flash2 import Flash2Kernel
from megatron_wallfacer.kernels.flash3 import Flash3Kernel
from megatron_wallfacer.kernels.flash4 import Flash4Kernel
from megatron_wallfacer.kernels.optional import UnavailableError
from megatron_wallfacer.kernels.protocol import Inputs, Kernel
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.kernels.switches import switched_off
from megatron_wallfacer.kernels.te import TransformerEngineKernel
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.kernels.torch_cuda import TorchCudnnKernel, TorchFlashKernel

_FLASH = ("flash4", "flash3", "flash2")
KERNELS: tuple[str, ...] = ("auto", "te", "flash", *reversed(_FLASH), "cudnn", "torch", "reference")
_BUILT: dict[str, Callable[[], Kernel]] = {
    "te": TransformerEngineKernel,
    "flash4": Flash4Kernel,
    "flash3": Flash3Kernel,
    "flash2": Flash2Kernel,
    "cudnn": TorchCudnnKernel,
    "reference": ReferenceKernel,
}


def select_kernel(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    v_head_dim: int | None = None,
    softcap: float = 0.0,
    banded: bool = False,
) -> Kernel:
    """The kernel of that name; with ``auto`` or ``flash`` the first of several that is installed and serves the inputs.

    Raises:
        OptionError: the name is unknown, or the kernels that it stands for are not installed or cannot serve such
            inputs; with the reason of each.
    """
    if name not in KERNELS:
        raise OptionError("kernel", name, f"one of {', '.join(KERNELS)}")
    inputs = Inputs(device, dtype, head_dim, v_head_dim or head_dim, softcap, banded)
    reasons, others = [], "a kernel by its name" if name == "auto" else "auto or reference"
    for candidate in _candidates(name, device):
        kernel, reason = _try(candidate, inputs, by_auto=name == "auto")
        if kernel is not None and reason is None:
            return kernel
        reasons.append(f"{candidate} cannot: {reason}")
        if kernel is not None:
            others = "reference"
    raise OptionError("kernel", name, f"{others} here, because {'; '.join(reasons)}")


def candidates(
    name: str = "auto",
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    v_head_dim: int | None = None,
    softcap: float = 0.0,
    banded: bool = False,
) -> list[tuple[str, str | None]]:
    """The kernels that a name stands for, in the order of trying, and why each is not taken; None if it could be.

    The first with None is what :func:`select_kernel` takes.
    """
    inputs = Inputs(device, dtype, head_dim, v_head_dim or head_dim, softcap, banded)
    return [(one, _try(one, inputs, by_auto=name == "auto")[1]) for one in _candidates(name, device)]


def _candidates(name: str, device: torch.device) -> tuple[str, ...]:
    if name == "auto":
        return ("te", *_FLASH, "torch") if device.type == "cuda" else ("torch",)
    return _FLASH if name == "flash" else (name,)


def _try(name: str, inputs: Inputs, *, by_auto: bool) -> tuple[Kernel | None, str | None]:
    """A kernel, or the reason why there is none; both if it is there and cannot serve the inputs."""
    if by_auto and (reason := switched_off(name, inputs.device)):
        return None, reason
    try:
        kernel = _make(name, inputs.device)
    except UnavailableError as error:
        return None, str(error)
    return kernel, kernel.refusal(inputs)


def _make(name: str, device: torch.device) -> Kernel:
    if name == "torch":
        return TorchFlashKernel() if device.type == "cuda" else TorchCpuKernel()
    return _BUILT[name]()
