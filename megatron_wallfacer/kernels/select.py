"""The attention kernels, and the selection of one kernel by name or by device, without a fallback."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.flash import FLASH2, FLASH3, FLASH4, FlashKernel, FlashVersion
from megatron_wallfacer.kernels.optional import UnavailableError
from megatron_wallfacer.kernels.prepared import PreparedKernel, deterministic_requested
from megatron_wallfacer.kernels.protocol import Capabilities, Inputs, Kernel
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.kernels.te import TransformerEngineKernel
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.kernels.torch_cuda import TorchCudnnKernel, TorchFlashKernel


@dataclass(frozen=True)
class KernelEntry:
    """One kernel of :data:`REGISTRY`.

    Attributes:
        name: value of ``--wallfacer-kernel``. Entries for different devices may have the same name.
        build: constructor of the kernel, which raises :class:`UnavailableError` if a library is not installed.
        capabilities: inputs that the newest release of the library supports. Older releases may support fewer inputs.
        library: name and device of the library, for the table of kernels in the docs. ``releases`` are the releases
            that tests check, and ``deterministic`` is the condition under which gradients repeat bit by bit.
        in_auto: whether ``--wallfacer-kernel auto`` may select the kernel.
        in_flash: whether ``--wallfacer-kernel flash`` may select the kernel.
        variable: environment variable of TransformerEngine whose value 0 excludes the kernel from ``auto``.
    """

    name: str
    build: Callable[[], Kernel]
    capabilities: Capabilities
    library: str
    releases: str
    deterministic: str = "on request"
    in_auto: bool = False
    in_flash: bool = False
    variable: str | None = None


_FUSED, _FLASH = "NVTE_FUSED_ATTN", "NVTE_FLASH_ATTN"
_OF_TORCH = "operator schemas of the installed PyTorch"


def _entry(kernel: type[PreparedKernel], library: str, releases: str, **options: Any) -> KernelEntry:
    return KernelEntry(kernel.name, kernel, kernel.capabilities, library, releases, **options)


def _flash(version: FlashVersion, library: str, releases: str) -> KernelEntry:
    options = {"in_auto": True, "in_flash": True, "variable": _FLASH}
    build = partial(FlashKernel, version)
    return KernelEntry(version.name, build, version.capabilities, library, releases, **options)


#: All kernels. ``auto`` and ``flash`` select the first kernel in this order that is installed and supports the inputs.
REGISTRY = (
    _entry(
        TransformerEngineKernel,
        "transformer-engine, cuDNN",
        "2.1.0, 2.2.0, 2.8.0, 2.10.0, 2.12.0, 2.15.0, 2.16.1, 2.18.0, 2.20.2",
        in_auto=True,
        variable=_FUSED,
    ),
    _flash(FLASH4, "flash-attn-4, Hopper and Blackwell", "4.0.0b4, b10, b20, b36"),
    _flash(
        FLASH3, "flash-attn-3, Hopper", "`hopper/` of flash-attn 2.7.4.post1, 2.8.3, 2.8.3.post2; main branch, by hand"
    ),
    _flash(FLASH2, "flash-attn >= 2.6", "2.6.3, 2.7.4.post1, 2.8.3, 2.8.3.post2"),
    _entry(TorchCudnnKernel, "cuDNN through PyTorch", _OF_TORCH, deterministic="not supported", variable=_FUSED),
    _entry(
        TorchFlashKernel,
        "PyTorch's copy of FlashAttention 2, on CUDA",
        _OF_TORCH,
        deterministic="by PyTorch's setting",
        in_auto=True,
        variable=_FLASH,
    ),
    _entry(TorchCpuKernel, "PyTorch, on a CPU", "-", deterministic="yes", in_auto=True),
    _entry(ReferenceKernel, "PyTorch, on any device", "-", deterministic="by PyTorch's setting"),
)
#: Values of ``--wallfacer-kernel``.
KERNELS = ("auto", "flash", *dict.fromkeys(entry.name for entry in REGISTRY))


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
    """Return the first kernel for a given name that is installed and supports the inputs.

    The name is one of :data:`KERNELS`, and the other arguments are the fields of :class:`Inputs`. Value heads have
    ``head_dim`` channels unless ``v_head_dim`` is given.

    Raises:
        OptionError: The name is unknown, or no kernel of this name can be used. The message gives the reason for each
            kernel.
    """
    if name not in KERNELS:
        raise OptionError("kernel", name, f"one of {', '.join(KERNELS)}")
    inputs = Inputs(device, dtype, head_dim, v_head_dim or head_dim, softcap, window)
    reasons, others = [], "a kernel by its name" if name == "auto" else "auto or reference"
    for entry in _entries(name, device):
        kernel, reason = _built(entry, inputs, by_auto=name == "auto")
        if kernel is not None and reason is None:
            return kernel
        reasons.append(f"{entry.name} cannot: {reason}")
        if kernel is not None:
            others = "reference"
    raise OptionError("kernel", name, f"{others} here, because {'; '.join(reasons)}")


def candidates(name: str, inputs: Inputs) -> list[tuple[str, str | None]]:
    """Return the kernels that ``--wallfacer-kernel`` means by ``name``, each with an error text or None, best first."""
    return [(entry.name, _built(entry, inputs, by_auto=name == "auto")[1]) for entry in _entries(name, inputs.device)]


def switches_in_effect(device: torch.device) -> str:
    """Return the settings that exclude kernels from ``auto``, such as ``NVTE_FLASH_ATTN=0``; else an empty text."""
    entries = _entries("auto", device)
    return ", ".join(dict.fromkeys(f"{entry.variable}=0" for entry in entries if _is_switched_off(entry)))


def _entries(name: str, device: torch.device) -> Sequence[KernelEntry]:
    """Return the kernels that a value of ``--wallfacer-kernel`` may select on a device."""
    if name == "flash":
        return [entry for entry in REGISTRY if entry.in_flash]
    kind = "cuda" if device.type == "cuda" else "cpu"
    named = [entry for entry in REGISTRY if (entry.in_auto if name == "auto" else entry.name == name)]
    return [entry for entry in named if kind in (entry.capabilities.devices or (kind,))] or named[:1]


def _is_switched_off(entry: KernelEntry) -> bool:
    return entry.variable is not None and os.environ.get(entry.variable, "1").strip() == "0"


def _built(entry: KernelEntry, inputs: Inputs, *, by_auto: bool) -> tuple[Kernel | None, str | None]:
    """Return (kernel, None), (None, why it cannot be built), or (kernel, why it does not support the inputs)."""
    if by_auto and _is_switched_off(entry):
        return None, f"{entry.variable}=0 turns it off for auto"
    try:
        kernel = _shared(entry.build, deterministic_requested())
    except UnavailableError as error:
        return None, str(error)
    return kernel, kernel.unsupported_reason(inputs)


@lru_cache(maxsize=32)
def _shared(build: Callable[[], Kernel], deterministic: bool) -> Kernel:
    """Build a kernel once, so that all layers share its caches. The argument ``deterministic`` is only a cache key."""
    return build()
