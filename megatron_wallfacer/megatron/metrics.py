"""Write metrics of attention to Megatron's TensorBoard and Weights & Biases: ``--wallfacer-log-metrics``."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megatron_wallfacer.engine.timeline import PASSES, Pass, no_observer
from megatron_wallfacer.schedule.ops import Op, Schedule, Transfer
from megatron_wallfacer.schedule.volume import Shape, received_bytes

PREFIX = "wallfacer/"
#: Number of schedules in the cache of received bytes. With packed documents every step has new schedules.
REMEMBERED = 64


class Clock(Protocol):
    """A clock that records points in time and computes the time between two of them."""

    def mark(self) -> Any:
        """Record and return the present time."""

    def has_passed(self, mark: Any) -> bool:
        """Return whether the device has finished all work before a recorded time."""

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two recorded times that have passed."""


class HostClock:
    """Clock of the process for work on a CPU. See :class:`Clock`."""

    def mark(self) -> float:
        """Return the present time."""
        return time.monotonic()

    def has_passed(self, mark: float) -> bool:
        """Return True, because a CPU has finished its work when the time is recorded."""
        return True

    def seconds(self, start: float, end: float) -> float:
        """Return the seconds between two times."""
        return end - start


class CudaClock:
    """Clock of a GPU that records events in the current stream without blocking the host. See :class:`Clock`."""

    def mark(self) -> torch.cuda.Event:
        """Record and return an event in the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, mark: torch.cuda.Event) -> bool:
        """Return whether the GPU has reached an event."""
        return mark.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the seconds between two events that the GPU has reached."""
        return start.elapsed_time(end) * 1e-3


@dataclass
class _Step:
    """Measurements of one step: times of ``forward``, ``backward`` and ``wait``; number and bytes of passes by name."""

    marks: list[tuple[str, Any, Any]] = field(default_factory=list)
    passes: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)


class StepSums:
    """An observer of the engine that sums seconds and bytes of attention over the steps since the last log entry.

    Recorded times are stored until the step ends and, on CUDA, until the device has finished the step.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._step, self._over = _Step(), deque[_Step]()
        self._steps, self._seconds = 0, Counter[str]()
        self._passes, self._received = Counter[str](), Counter[str]()
        self._known: dict[tuple[int, Shape], tuple[Schedule, float]] = {}

    def __call__(self, what: Pass | Op | Transfer) -> AbstractContextManager[None]:
        """Return a context manager that times a pass or a wait."""
        if isinstance(what, Pass):
            self._step.passes[what.name] += 1
            self._step.received[what.name] += self._bytes(what)
            return self._timed(what.name)
        return self._timed("wait") if isinstance(what, Transfer) else no_observer(what)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = self._clock.mark()
        yield
        self._step.marks.append((name, start, self._clock.mark()))

    def _bytes(self, one: Pass) -> float:
        """Return the bytes that a pass receives, from a cache, because layers with equal shapes share a schedule."""
        key = id(one.schedule), one.shape
        if key not in self._known:
            if len(self._known) == REMEMBERED:
                self._known.clear()
            # A reference to the schedule prevents Python from reusing its id.
            self._known[key] = one.schedule, sum(received_bytes(one.schedule, one.shape).values())
        return self._known[key][1]

    def end_step(self) -> None:
        """End a training step, and add the steps that the device has finished to the sums."""
        self._over.append(self._step)
        self._step = _Step()
        while self._over and self._is_done(self._over[0]):
            step = self._over.popleft()
            self._steps += 1
            self._passes += step.passes
            self._received += step.received
            for name, start, end in step.marks:
                self._seconds[name] += self._clock.seconds(start, end)

    def _is_done(self, step: _Step) -> bool:
        return not step.marks or self._clock.has_passed(step.marks[-1][2])

    def take(self) -> dict[str, float]:
        """Return the metrics by tag and reset the sums. The dict is empty if no step with attention has finished."""
        attention = sum(self._seconds[name] for name in PASSES)
        if not self._steps or not attention:
            return {}
        found = {f"attention-{name}-s": self._seconds[name] / self._steps for name in PASSES}
        found |= {"exposed-s": self._seconds["wait"] / self._steps, "exposed-share": self._seconds["wait"] / attention}
        for name in PASSES:
            if self._passes[name]:
                found[f"{name}-bytes-per-layer"] = self._received[name] / self._passes[name]
        self._steps = 0
        for sums in (self._seconds, self._passes, self._received):
            sums.clear()
        return {f"{PREFIX}{name}": value for name, value in found.items()}


def step_sums(device: torch.device) -> StepSums | None:
    """Return an observer on the rank where Megatron writes metrics, or None on other ranks."""
    if not _writers():
        return None
    return StepSums(CudaClock() if device.type == "cuda" else HostClock())


def log_step(sums: StepSums, iteration: int, interval: int) -> None:
    """End a training step, and write the metrics every ``interval`` steps (``--tensorboard-log-interval``)."""
    sums.end_step()
    if iteration % interval:
        return
    figures = sums.take()
    for write in _writers():
        write(figures, iteration)


def _writers() -> list[Callable[[dict[str, float], int], None]]:
    """Return a function for each writer that Megatron has made. Only Megatron's last rank has writers."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()

    def add_scalars(figures: dict[str, float], iteration: int) -> None:
        for tag, value in figures.items():
            tensorboard.add_scalar(tag, value, iteration)

    found: list[Callable[[dict[str, float], int], None]] = []
    if tensorboard is not None:
        found.append(add_scalars)
    if wandb is not None:
        found.append(lambda figures, iteration: wandb.log(figures, iteration))
    return found
