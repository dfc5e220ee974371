"""Copies between device and host memory, beside the kernels of a step."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Direction = Literal["to host", "to device"]


class Copies(Protocol):
    """Issues copies behind the kernels that were launched so far, and lets later kernels wait for them.

    Copies of one direction run one after the other. Nothing here blocks the host.
    """

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor on the device."""

    def copy(self, direction: Direction, pairs: Sequence[tuple[Tensor, Tensor]], after: Any | None) -> Any:
        """Issue copies.

        Args:
            direction: of all of them.
            pairs: (target, source); both must live until the copies were waited for.
            after: earlier copies that must have ended, or None.

        Returns:
            What :meth:`wait` takes.
        """

    def wait(self, issued: Any) -> None:
        """Let all kernels that are launched from now on run after these copies."""


class Record(NamedTuple):
    """One call, as :class:`DeferredCopies` records it.

    Attributes:
        what: ``allocate``, ``to host``, ``to device`` or ``wait``.
        number: number of the copies, from 0; of an allocation its bytes.
        addresses: addresses of the host tensors.
        after: number of the copies that must have ended before, or None.
    """

    what: str
    number: int
    addresses: tuple[int, ...] = ()
    after: int | None = None


class _Issued:
    """Copies that may not have run yet."""

    def __init__(self, number: int, run: Callable[[], None], after: _Issued | None) -> None:
        self.number, self.run, self.after, self.done = number, run, after, False


class DeferredCopies:
    """Copies on a CPU that run as late as is allowed: when something waits for them.

    A GPU may run a copy at any time until a kernel waits for it. Here a wait that is missing leaves NaN, and a tensor
    that is written or freed before its copy was waited for gives wrong values or an error.

    Args:
        observe: gets a :class:`Record` of every call.
    """

    def __init__(self, observe: Callable[[Record], None] = lambda record: None) -> None:
        self._observe, self._count = observe, 0
        self._streams: dict[Direction, deque[_Issued]] = {"to host": deque(), "to device": deque()}

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of all ones as bits: NaN."""
        tensor = torch.empty(shape, dtype=dtype)
        tensor.view(torch.uint8).fill_(255)
        self._observe(Record("allocate", tensor.nbytes))
        return tensor

    def copy(self, direction: Direction, pairs: Sequence[tuple[Tensor, Tensor]], after: _Issued | None) -> _Issued:
        """Remember copies; see :class:`Copies`."""
        # Tensors on the device may be freed too early; host memory is the caller's for the whole run.
        weak = [(weakref.ref(target), weakref.ref(source)) for target, source in pairs]
        hosts = [target if direction == "to host" else source for target, source in pairs]
        issued = _Issued(self._count, lambda: _copy_all(direction, weak, hosts), after)
        self._count += 1
        self._streams[direction].append(issued)
        addresses = tuple(host.data_ptr() for host in hosts)
        self._observe(Record(direction, issued.number, addresses, None if after is None else after.number))
        return issued

    def wait(self, issued: _Issued) -> None:
        """Run the copies, and all earlier ones of their direction."""
        self._observe(Record("wait", issued.number))
        self._run_until(issued)

    def _run_until(self, issued: _Issued) -> None:
        stream = next((queue for queue in self._streams.values() if issued in queue), None)
        while stream is not None and not issued.done:
            first = stream.popleft()
            if first.after is not None:
                self._run_until(first.after)
            first.run()
            first.done = True


def _copy_all(direction: Direction, weak: Sequence[tuple[Any, Any]], hosts: Sequence[Tensor]) -> None:
    for (target, source), host in zip(weak, hosts, strict=True):
        device = (source if direction == "to host" else target)()
        if device is None:
            raise AssertionError(f"a copy {direction} was not waited for before its tensor was freed")
        if direction == "to host":
            host.copy_(device)
        else:
            device.copy_(host)
