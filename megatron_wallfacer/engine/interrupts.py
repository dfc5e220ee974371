"""Ctrl-C waits while ranks make process groups together.

A rank that leaves between two collective calls of that work would hold all other ranks of the job until the timeout of
process groups. Nothing can release them: the groups whose connections could be closed do not exist yet.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Deliver a SIGINT that arrives inside of the block when the block ends.

    Without effect outside of the main thread, and where a program has set SIGINT to be ignored or to end the process.

    Raises:
        KeyboardInterrupt: by Python's own handler, at the end of the block.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if arrived:
        handler(*arrived[0])
