"""Which kernel runs: chosen once, by name or by device, never changed behind the user's back."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.capabilities import Inputs
from megatron_wallfacer.kernels.flash import FLASH2, FLASH3, FLASH4, FlashKernel
from megatron_wallfacer.kernels.optional import UnavailableError
from megatron_wallfacer.kernels.prepared import deterministic_requested
from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.kernels.switches import switched_off
from megatron_wallfacer.kernels.te import TransformerEngineKernel
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.kernels.torch_cuda import TorchCudnnKernel, TorchFlashKernel

_FLASH = ("flash4", "flash3", "flash2")
KERNELS: tuple[str, ...] = ("auto", "te", "flash", *reversed(_FLASH), "cudnn", "torch", "reference")
_BUILT: dict[str, Callable[[], Kernel]] = {
    "te": TransformerEngineKernel,
    "flash4": partial(FlashKernel, FLASH4),
    "flash3": partial(FlashKernel, FLASH3),
    "flash2": partial(FlashKernel, FLASH2),
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
    window: bool = False,
) -> Kernel:
    """The kernel of that name; with ``auto`` or ``flash`` the first of several that is installed and serves the inputs.

    Raises:
        OptionError: the name is unknown, or the kernels that it stands for are not installed or cannot serve such
            inputs; with the reason of each.
    """
    if name not in KERNELS:
        raise OptionError("kernel", name, f"one of {', '.join(KERNELS)}")
    inputs = Inputs(device, dtype, head_dim, v_head_dim or head_dim, softcap, window)
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
    window: bool = False,
) -> list[tuple[str, str | None]]:
    """The kernels that a name stands for, in the order of trying, and why each is not taken; None if it could be.

    The first with None is what :func:`select_kernel` takes.
    """
    inputs = Inputs(device, dtype, head_dim, v_head_dim or head_dim, softcap, window)
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
    return kernel, kernel.unsupported_reason(inputs)


def _make(name: str, device: torch.device) -> Kernel:
    torch_kernel = TorchFlashKernel if device.type == "cuda" else TorchCpuKernel
    return _shared(torch_kernel if name == "torch" else _BUILT[name], deterministic_requested())


@lru_cache(maxsize=32)
def _shared(build: Callable[[], Kernel], deterministic: bool) -> Kernel:
    """Return one kernel for all layers and calls, which share its prepared calls.

    Args:
        build: constructor of the kernel.
        deterministic: what the constructor finds requested.
    """
    return build()
