"""Copy tensors between device and host memory while the kernels of a step run."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Direction = Literal["to host", "to device"]


class Copies(Protocol):
    """An object that issues copies after the kernels launched so far, and makes later kernels wait for copies.

    Copies of one direction run one after the other. No method blocks the host.
    """

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor on the device."""

    def copy(self, direction: Direction, pairs: Sequence[tuple[Tensor, Tensor]], after: Any | None) -> Any:
        """Start copies of (target, source) pairs, and return a handle.

        If ``after`` is the handle of earlier copies, the new copies run after them.

        Target and source must exist until :meth:`wait` is called with the returned handle.
        """

    def wait(self, issued: Any) -> None:
        """Make all kernels launched after this call run after the copies."""


class Record(NamedTuple):
    """Record of one call of :class:`DeferredCopies`.

    Attributes:
        what: kind of call: ``allocate``, ``to host``, ``to device`` or ``wait``.
        number: number of the call of ``copy``, counted from 0. For ``allocate``: bytes of the allocation.
        addresses: memory addresses of the host tensors.
        after: number of an earlier call whose copies must end before this call's copies start; or None.
    """

    what: str
    number: int
    addresses: tuple[int, ...] = ()
    after: int | None = None


class _Issued(NamedTuple):
    """Copies that were issued but may not have run yet."""

    number: int
    run: Callable[[], None]
    after: _Issued | None


class DeferredCopies:
    """Copies on a CPU that run only when :meth:`wait` is called. Tests use them to find missing calls of :meth:`wait`.

    On a GPU a copy may start late: only a kernel that waits for the copy can rely on it. If the caller does not wait
    for a copy to the device, the target keeps the NaN of :meth:`allocate`. Writing or freeing a tensor before the wait
    for its copy causes wrong values or an error. ``observe`` is called with a :class:`Record` of every call.
    """

    def __init__(self, observe: Callable[[Record], None] = lambda record: None) -> None:
        self._observe, self._count = observe, 0
        self._streams: dict[Direction, deque[_Issued]] = {"to host": deque(), "to device": deque()}

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of NaN: all its bits are 1."""
        tensor = torch.empty(shape, dtype=dtype)
        tensor.view(torch.uint8).fill_(255)
        self._observe(Record("allocate", tensor.nbytes))
        return tensor

    def copy(self, direction: Direction, pairs: Sequence[tuple[Tensor, Tensor]], after: _Issued | None) -> _Issued:
        """Put copies into a queue. They run in :meth:`wait`. See :class:`Copies`."""
        # Weak references detect a device tensor that is freed too early. Host memory exists for the whole run.
        weak = [(weakref.ref(target), weakref.ref(source)) for target, source in pairs]
        hosts = [target if direction == "to host" else source for target, source in pairs]
        issued = _Issued(self._count, lambda: _copy_all(direction, weak, hosts), after)
        self._count += 1
        self._streams[direction].append(issued)
        addresses = tuple(host.data_ptr() for host in hosts)
        self._observe(Record(direction, issued.number, addresses, None if after is None else after.number))
        return issued

    def wait(self, issued: _Issued) -> None:
        """Run the queued copies of one direction up to ``issued``, and all copies that must run before these."""
        self._observe(Record("wait", issued.number))
        self._run_until(issued)

    def _run_until(self, issued: _Issued) -> None:
        for stream in self._streams.values():
            while issued in stream:
                first = stream.popleft()
                if first.after is not None:
                    self._run_until(first.after)
                first.run()


def _copy_all(direction: Direction, weak: Sequence[tuple[Any, Any]], hosts: Sequence[Tensor]) -> None:
    for (target, source), host in zip(weak, hosts, strict=True):
        device = (source if direction == "to host" else target)()
        if device is None:
            raise AssertionError(f"a copy {direction} was not waited for before its tensor was freed")
        if direction == "to host":
            host.copy_(device)
        else:
            device.copy_(host)
