"""Triton without a device: it finds, specialises and launches kernels as on a GPU, and the launch itself does nothing.

Row operations on a GPU are launches of Triton kernels, so their host time is that of Triton's Python code and of what
calls it. One variant of each kernel is compiled, for compute capability 9.0, and stands for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_wallfacer.engine import compiled, operators, steps, triton_proxy

#: What Triton's launcher takes before the arguments of a kernel: the grid, stream, function, metadata and hooks.
BEFORE_ARGUMENTS = 9


@contextmanager
def fake_device(launch: Callable[..., None]) -> Iterator[None]:
    """Let passes on CPU tensors launch Triton kernels for their row operations.

    Args:
        launch: is called in place of each launch, with what Triton's launcher gets: :data:`BEFORE_ARGUMENTS`, then all
            arguments of the kernel.
    """
    made: dict[JITFunction, Any] = {}
    compile_kernel = JITFunction._do_compile

    def one_for_all(self: JITFunction, key: Any, signature: Any, device: int, *rest: Any) -> Any:
        if self not in made:
            made[self] = compile_kernel(self, key, signature, device, *rest)
        self.device_caches[device][0][key] = made[self]
        return made[self]

    before = driver._active
    driver.set_active(_Driver(launch))
    with ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "_do_compile", one_for_all),
            (compiled, "rows_in_one_launch", lambda device: True),
            (steps, "out_proxy", triton_proxy.out_proxy),
            (operators, "row_sums", triton_proxy.row_sums),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        try:
            yield
        finally:
            for kernel, found in made.items():
                kernel.device_caches.clear()
                found.module = None  # there is nothing to unload
            triton_proxy._prepared.cache_clear()
            driver._active = before


class _Utils:
    """What Triton does with compiled code."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 18}


class _Driver(DriverBase):
    """A device on which nothing runs."""

    utils = _Utils()

    def __init__(self, launch: Callable[..., None]) -> None:
        self.launcher_cls = lambda source, metadata: launch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
