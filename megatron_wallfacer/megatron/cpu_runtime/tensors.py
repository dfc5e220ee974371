"""Tensors that are asked onto a CUDA device stay where they are.

Megatron names the device in every allocation (`device=torch.cuda.current_device()`, `.cuda()`, `device="cuda"`).
A torch function mode sees all those calls, whoever makes them, so no Megatron function has to be replaced for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_wallfacer.megatron.replace import wrap

_HOST = torch.device("cpu")


def _names_cuda(device: Any) -> bool:
    """Whether `device` (a torch.device, a string or an index) means a CUDA device. A bare index does."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _stay(func: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
    """`tensor.cuda()` and `tensor.pin_memory()`: the tensor itself."""
    return args[0]


def _to(func: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
    """`tensor.to(device, ...)`: only the first positional argument can be a device."""
    if len(args) > 1 and _names_cuda(args[1]):
        args = (args[0], _HOST, *args[2:])
    return func(*args, **kwargs)


def _type(func: Callable, args: tuple, kwargs: dict) -> Any:
    """`tensor.type()`: the name that Megatron's optimisers and clip_grads compare with 'torch.cuda.FloatTensor'."""
    answer = func(*args, **kwargs)
    if len(args) > 1 or kwargs:
        return answer  # a cast, not a question
    return answer.replace("torch.", "torch.cuda.", 1)


_METHODS: dict[Callable, Callable[[Callable, tuple, dict], Any]] = {
    torch.Tensor.cuda: _stay,
    torch.Tensor.pin_memory: _stay,
    torch.Tensor.to: _to,
    torch.Tensor.type: _type,
}


class HostTensors(TorchFunctionMode):
    """Rewrites every request for a CUDA device or pinned memory into one for plain host memory."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` with the host in place of a CUDA device."""
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _HOST}
        if kwargs.get("pin_memory"):
            # Pinning needs the CUDA allocator (RoPE's get_pos_emb_on_this_cp_rank pins its index).
            kwargs = {**kwargs, "pin_memory": False}
        method = _METHODS.get(func)
        return method(func, args, kwargs) if method else func(*args, **kwargs)


def install() -> None:
    """Enter the mode for the rest of the process, on this thread: the one that trains."""
    HostTensors().__enter__()
    # torch.autograd.backward, which Megatron calls to recompute layers, is itself a call that the mode sees, and while
    # a mode looks at a call it is off: the backward functions that the call runs would not be seen.
    wrap("torch.autograd._engine_run_backward", _seen)


def _seen(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with HostTensors():
            return original(*args, **kwargs)

    return run
