"""The streams and events of copies on a GPU, by a record of what torch.cuda is told. No GPU."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from megatron_wallfacer.offload.cuda import CudaCopies


def test_copies_wait_for_kernels_and_kernels_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Stream:
        names = iter(("to host", "to device"))

        def __init__(self, name: str | None = None) -> None:
            self.name = name or next(self.names)

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: str) -> None:
            told.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            return f"event {len(told)} of {self.name}"

    class Slot:
        def copy_(self, source: object, *, non_blocking: bool) -> None:
            told.append(f"{current[-1].name} copies{' without blocking' if non_blocking else ''}")

    current = [Stream("kernels")]

    @contextmanager
    def stream(entered: Stream):
        current.append(entered)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    copies = CudaCopies()
    first = copies.copy("to host", [(Slot(), torch.zeros(1))], None)
    second = copies.copy("to device", [(Slot(), torch.zeros(1))], first)
    copies.wait(second)
    assert told == [
        "to host waits for kernels",
        "to host copies without blocking",
        "to device waits for kernels",
        "to device waits for event 2 of to host",
        "to device copies without blocking",
        "kernels waits for event 5 of to device",
    ]
