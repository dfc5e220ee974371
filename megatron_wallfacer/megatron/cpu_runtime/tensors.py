"""Allocate tensors on the host where Megatron's code asks for a CUDA device.

Megatron names the device in every allocation (`device=torch.cuda.current_device()`, `.cuda()`, `device="cuda"`). A
torch function mode intercepts all torch calls, so Megatron's functions need no replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_wallfacer.megatron.replace import wrap

_HOST = torch.device("cpu")


def _names_cuda(device: Any) -> bool:
    """Return whether `device` is an index or names a CUDA device."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _to(func: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
    """Handle `tensor.to(device, ...)`. Of the positional arguments only the first can be a device."""
    if len(args) > 1 and _names_cuda(args[1]):
        args = (args[0], _HOST, *args[2:])
    return func(*args, **kwargs)


def _type(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Return `tensor.type()` as on CUDA: Megatron's optimisers compare the type with 'torch.cuda.FloatTensor'."""
    answer = func(*args, **kwargs)
    if len(args) > 1 or kwargs:
        return answer  # with arguments the call is a cast
    return answer.replace("torch.", "torch.cuda.", 1)


_METHODS: dict[Callable, Callable[[Callable, tuple, dict], Any]] = {
    torch.Tensor.cuda: lambda func, args, kwargs: args[0],
    torch.Tensor.pin_memory: lambda func, args, kwargs: args[0],
    torch.Tensor.to: _to,
    torch.Tensor.type: _type,
}


class HostTensors(TorchFunctionMode):
    """A torch function mode that replaces CUDA devices and pinned memory by plain host memory."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` on the host, even if the arguments name a CUDA device."""
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _HOST}
        if kwargs.get("pin_memory"):
            # Pinning needs the CUDA allocator (RoPE's get_pos_emb_on_this_cp_rank pins its index).
            kwargs = {**kwargs, "pin_memory": False}
        method = _METHODS.get(func)
        return method(func, args, kwargs) if method else func(*args, **kwargs)


def install() -> None:
    """Enter :class:`HostTensors` on the calling thread until the process ends. Training must run on this thread."""
    HostTensors().__enter__()
    # torch turns a mode off inside a call that the mode intercepts. Megatron recomputes layers in such a call,
    # torch.autograd.backward, so backward functions need a mode of their own.
    wrap("torch.autograd:_engine_run_backward", _in_mode)


def _in_mode(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with HostTensors():
            return original(*args, **kwargs)

    return run
