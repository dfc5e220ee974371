"""Write metrics of attention to Megatron's TensorBoard and Weights & Biases: ``--wallfacer-log-metrics``."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from megatron_wallfacer.engine.timeline import PASSES, Pass, no_observer
from megatron_wallfacer.megatron.cpu_runtime.torch_cuda import Event as HostEvent
from megatron_wallfacer.schedule.ops import Op, Schedule, Transfer
from megatron_wallfacer.schedule.volume import Shape, received_bytes

PREFIX = "wallfacer/"
#: Number of schedules in the cache of received bytes. With packed documents every step has new schedules.
REMEMBERED = 64


@dataclass
class _Step:
    """Measurements of one step: times of passes and waits, numbers of passes, and bytes that passes received."""

    marks: list[tuple[str, Any, Any]] = field(default_factory=list)
    passes: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)


class StepSums:
    """Observer that sums seconds and bytes of attention over the steps since the last log entry.

    Recorded events are stored until the step ends and, on CUDA, until the device has finished the step. The observer
    does not block the host.

    Args:
        event: function that makes an event with the methods of ``torch.cuda.Event``.
    """

    def __init__(self, event: Callable[[], Any]) -> None:
        self._event = event
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
        start, end = self._event(), self._event()
        start.record()
        yield
        end.record()
        self._step.marks.append((name, start, end))

    def _bytes(self, one: Pass) -> float:
        """Return the bytes that a pass receives. The result is cached for layers with the same schedule and shape."""
        key = id(one.schedule), one.shape
        if key not in self._known:
            if len(self._known) == REMEMBERED:
                self._known.clear()
            # A reference to the schedule prevents Python from reusing its id.
            self._known[key] = one.schedule, sum(received_bytes(one.schedule, one.shape).values())
        return self._known[key][1]

    def end_step(self) -> None:
        """End a training step. Update the sums with the steps that the device has finished."""
        self._over.append(self._step)
        self._step = _Step()
        while self._over and all(end.query() for *_, end in self._over[0].marks[-1:]):
            step = self._over.popleft()
            self._steps += 1
            self._passes += step.passes
            self._received += step.received
            for name, start, end in step.marks:
                self._seconds[name] += start.elapsed_time(end) / 1000

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
    if _writers() == (None, None):
        return None
    return StepSums(partial(torch.cuda.Event, enable_timing=True) if device.type == "cuda" else HostEvent)


def log_step(sums: StepSums, iteration: int, interval: int) -> None:
    """End a training step, and write the metrics every ``interval`` steps (``--tensorboard-log-interval``)."""
    sums.end_step()
    if iteration % interval:
        return
    metrics = sums.take()
    tensorboard, wandb = _writers()
    if tensorboard is not None:
        for tag, value in metrics.items():
            tensorboard.add_scalar(tag, value, iteration)
    if wandb is not None:
        wandb.log(metrics, iteration)


def _writers() -> tuple[Any, Any]:
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    return get_tensorboard_writer(), get_wandb_writer()
