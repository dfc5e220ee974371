"""On a node without a CUDA device, replace the part of `torch.cuda` that Megatron's training loop calls.

Megatron uses `torch.cuda` for three purposes: properties of the device, ordering (streams, events, synchronise) and
memory statistics. On a CPU operations are always in order, so streams do nothing. Each rank gets the properties of one
device. Functions of `torch.cuda` that this module does not replace still raise errors, because a feature that needs a
GPU (graphs, memory pools, `cudart`) must not seem to work.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from megatron_wallfacer.megatron.replace import replace


def _do_nothing(*_: Any, **__: Any) -> None:
    """Accept any arguments."""


@dataclass(frozen=True)
class DeviceProperties:
    """Result of `torch.cuda.get_device_properties`.

    With compute capability 8.0 Megatron does not offer FP8. Below compute capability 10.0 `validate_args` requires
    CUDA_DEVICE_MAX_CONNECTIONS=1, which `environment` sets.
    """

    name: str = "CPU"
    major: int = 8
    minor: int = 0
    total_memory: int = 0
    multi_processor_count: int = 1


class Stream:
    """Replacement of `torch.cuda.Stream`. On a CPU every operation ends before its call returns."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cpu")
        self.priority = priority
        self.cuda_stream = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the least and the greatest stream priority: 0 and 0 on a CPU."""
        return 0, 0

    synchronize = wait_stream = wait_event = _do_nothing  # no work is ever pending

    def query(self) -> bool:
        """Return True: a CPU operation ends before its call returns."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record `event`, or a new event."""
        event = event or Event()
        event.record(self)
        return event


class Event:
    """Replacement of `torch.cuda.Event` that measures time with the host's clock."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any
    ) -> None:
        self._seconds: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Store the present time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Return the milliseconds from this event to `end`.

        Raises:
            RuntimeError: At least one of the two events was not recorded.
        """
        if self._seconds is None or end._seconds is None:
            raise RuntimeError("both events must be recorded before the time between them is asked for")
        return (end._seconds - self._seconds) * 1000.0

    wait = synchronize = _do_nothing

    def query(self) -> bool:
        """Return True: a CPU operation ends before its call returns."""
        return True


_STREAM = Stream()


def _replacements() -> dict[str, Any]:
    """Return the replacement of each name in `torch.cuda`."""
    properties = DeviceProperties()
    memory_statistics = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    orders = ("set_device", "synchronize", "empty_cache", "ipc_collect", "set_stream", "reset_peak_memory_stats")
    return {
        # With this value _lazy_init returns without looking for a driver. _lazy_call, which Megatron's
        # _set_cuda_rng_state uses, runs work at once instead of queuing it.
        "_initialized": True,
        "is_available": lambda: True,
        # One device per rank, as with one device in CUDA_VISIBLE_DEVICES, so the device index is always 0.
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        # Megatron's tracker (tensor_parallel/random.py) saves, seeds and restores the CUDA state around the
        # initialisation of weights and around dropout. These draws come from the CPU's generator here, so the tracker
        # must change its state. torch.cuda's own seeding functions use the generators too, and stay.
        "default_generators": (torch.default_generator,),
        "device": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: _STREAM,
        "default_stream": lambda device=None: _STREAM,
        "is_current_stream_capturing": lambda: False,
        "memory_stats": lambda device=None: defaultdict(int),
        **dict.fromkeys(memory_statistics, lambda device=None: 0),
        **dict.fromkeys(orders, _do_nothing),
    }


def install() -> None:
    """Replace names in `torch.cuda` and `torch.accelerator` before the import of Megatron, which binds the names."""
    for name, value in _replacements().items():
        replace(f"torch.cuda:{name}", value)
    # torch.cuda.random binds these names during the import of torch.
    for name in ("current_device", "device_count"):
        replace(f"torch.cuda.random:{name}", getattr(torch.cuda, name))
    # NVTX functions of a CPU build of torch raise errors.
    for name in ("range_push", "range_pop", "mark"):
        replace(f"torch.cuda.nvtx:{name}", _do_nothing)
    # Generic code of torch (data loader pinning, the optimiser's graph-capture check, checkpointing's device type) uses
    # torch.accelerator, which would follow torch.cuda.is_available.
    replace("torch.accelerator:is_available", lambda: False)
    replace("torch.accelerator:current_accelerator", lambda check_available=False: None)
