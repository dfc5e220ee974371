"""The part of `torch.cuda` that Megatron's training loop calls, answered by a machine that has no such device.

Megatron asks `torch.cuda` for three kinds of things: facts about the device, order (streams, events, synchronise) and
memory figures. On a CPU everything is already in order, so streams are inert; facts are those of one plausible
device a rank. What is not listed here keeps torch's own behaviour, which is to raise: a feature that really needs a GPU
(graphs, memory pools, `cudart`) must not seem to work.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from megatron_wallfacer.megatron.replace import replace


@dataclass(frozen=True)
class DeviceProperties:
    """What `torch.cuda.get_device_properties` answers.

    Compute capability 8.0: old enough that Megatron offers no FP8, and below 10, where it wants
    CUDA_DEVICE_MAX_CONNECTIONS=1 (`validate_args`), which `environment` sets.
    """

    name: str = "CPU"
    major: int = 8
    minor: int = 0
    total_memory: int = 0
    multi_processor_count: int = 1


class Stream:
    """A CUDA stream on a machine where every operation has ended when its call returns."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cpu")
        self.priority = priority
        self.cuda_stream = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Least and greatest priority, as of a device that knows only one."""
        return 0, 0

    def synchronize(self) -> None:
        """Nothing is pending."""

    def wait_stream(self, stream: Stream) -> None:
        """Nothing is pending."""

    def wait_event(self, event: Event) -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        """Whether all work is done: always."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record `event`, or a new one, now."""
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A CUDA event: a reading of the host's clock."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any
    ) -> None:
        self._seconds: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Read the clock."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`.

        Raises:
            RuntimeError: One of the two was not recorded, as in torch.
        """
        if self._seconds is None or end._seconds is None:
            raise RuntimeError("both events must be recorded before the time between them is asked for")
        return (end._seconds - self._seconds) * 1000.0

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing is pending."""

    def synchronize(self) -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        """Whether the event has passed: always."""
        return True


class _DeviceContext(contextlib.AbstractContextManager):
    """`with torch.cuda.device(...)` and `with torch.cuda.stream(...)`: there is nothing to switch."""

    def __init__(self, target: Any = None) -> None:
        self.target = target

    def __exit__(self, *_: object) -> None:
        return None


_STREAM = Stream()


def _do_nothing(*_: Any, **__: Any) -> None:
    """Take any arguments, do nothing."""


def _zero(*_: Any, **__: Any) -> int:
    """No device memory is in use."""
    return 0


def _the_stream(*_: Any, **__: Any) -> Stream:
    """The one stream there is."""
    return _STREAM


def _replacements() -> dict[str, Any]:
    """Name in `torch.cuda` -> what stands there on a machine without a device."""
    properties = DeviceProperties()
    memory_figures = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    orders = ("set_device", "synchronize", "empty_cache", "ipc_collect", "set_stream", "reset_peak_memory_stats")
    return {
        # torch then neither looks for a driver (_lazy_init returns) nor queues work for later (_lazy_call runs it:
        # Megatron's _set_cuda_rng_state hands it the setting of the state).
        "_initialized": True,
        "is_available": lambda: True,
        # One device a rank, as under CUDA_VISIBLE_DEVICES=<one>: the device index is then always 0.
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "device": _DeviceContext,
        "stream": _DeviceContext,
        "Stream": Stream,
        "Event": Event,
        "current_stream": _the_stream,
        "default_stream": _the_stream,
        "is_current_stream_capturing": lambda: False,
        "memory_stats": lambda device=None: defaultdict(int),
        **dict.fromkeys(memory_figures, _zero),
        **dict.fromkeys(orders, _do_nothing),
    }


def install() -> None:
    """Put the replacements into `torch.cuda` and `torch.accelerator`. Before Megatron is imported: it binds some."""
    for name, value in _replacements().items():
        replace(f"torch.cuda.{name}", value)
    # A CPU build of torch raises from NVTX; profiler ranges have no meaning here.
    for name in ("range_push", "range_pop", "mark"):
        replace(f"torch.cuda.nvtx.{name}", _do_nothing)
    # torch's own generic code (data loader pinning, the optimiser's graph-capture check, checkpointing's device type)
    # asks torch.accelerator, which would follow torch.cuda.is_available. It gets the truth.
    replace("torch.accelerator.is_available", lambda: False)
    replace("torch.accelerator.current_accelerator", lambda check_available=False: None)
