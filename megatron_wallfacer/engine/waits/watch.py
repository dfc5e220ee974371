"""The watchdog of a rank: a thread that publishes what the rank waits for, and explains a long wait.

The thread reads :data:`PROGRESS`. The watchdog never queries a ``Work`` of gloo, because its state changes only in the
thread that waits for it. The watchdog queries a ``Work`` of NCCL only after a long time without a new message.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from socket import gethostname
from types import FrameType
from typing import Any

import torch.distributed as dist

from megatron_wallfacer.engine.waits.explain import Seen, State, chain_line, wait_line
from megatron_wallfacer.engine.waits.progress import PROGRESS, Label, Progress
from megatron_wallfacer.errors import OptionError

#: Environment variable with the seconds after which a wait is explained; 0 for no explanation.
VARIABLE = "WALLFACER_WAIT_S"
DEFAULT_S = 60.0
#: Signal that makes a rank explain its state at once.
SIGNAL = signal.SIGQUIT
#: Number of publications of the state in the time after which a wait is explained.
BEATS = 6
#: Number of missed publications after which other ranks consider a rank silent.
MISSED = 3
#: Timeout of one operation on the store in the watchdog thread.
STORE_TIMEOUT = timedelta(seconds=10)


class Watch(threading.Thread):
    """A thread that prints an explanation if this process waits more than ``limit`` seconds for a message.

    No other thread may use the connection ``store``.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        limit: float,
        progress: Progress = PROGRESS,
        say: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(name="wallfacer-watch", daemon=True)
        self._store, self._limit, self._progress, self._say = store, limit, progress, say or _say
        self._interval = limit / BEATS
        self._state = State(rank, gethostname())
        self._mark: tuple[Any, ...] = ()
        self._since = time.monotonic()
        self._explained = False
        self._seen: dict[int, tuple[int, float]] = {}
        self._wake, self._woken = os.pipe()
        os.set_blocking(self._woken, False)
        self._stopped = False

    def run(self) -> None:
        """Publish this rank's state and report long waits, until :meth:`stop` is called or the store is closed."""
        while not self._stopped:
            ready, _, _ = select.select([self._wake], [], [], self._interval)
            requested = bool(ready) and SIGNAL in os.read(self._wake, 64)
            try:
                self._beat(requested=requested)
            except RuntimeError:
                if self._state.label is not None:
                    self._say(f"{wait_line(self._state)}; the store is gone: the rank that held it has ended")
                return

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        os.write(self._woken, b"\0")
        if threading.current_thread() is not self:
            self.join(timeout=2.0)

    def listen(self) -> None:
        """Print what this rank waits for when :data:`SIGNAL` arrives, unless the signal has another handler."""
        if threading.current_thread() is not threading.main_thread():
            return
        # Shells start background jobs with the signal ignored.
        if signal.getsignal(SIGNAL) not in (signal.SIG_DFL, signal.SIG_IGN):
            return
        before = signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            return
        # Python writes the number of the signal to the pipe at once. A handler would run only after the wait.
        signal.signal(SIGNAL, _no_action)

    def _beat(self, *, requested: bool) -> None:
        progress, now = self._progress, time.monotonic()
        mark = (progress.label, progress.waits, progress.passes, progress.posted)
        if mark != self._mark:
            self._mark, self._since, self._explained = mark, now, False
        waited = now - self._since
        self._state = replace(
            self._state,
            beat=self._state.beat + 1,
            passes=progress.passes,
            layer=progress.layer,
            backward=progress.backward,
            label=self._label(waited),
            seconds=waited,
            place=_place(),
        )
        self._store.set(f"state/{self._state.rank}", self._state.to_text())
        if self._state.label is None and not requested:
            return
        # The states of other ranks are read after half of the limit, so that silent ranks are recognised at the limit.
        chain = chain_line(self._state, self._read) if waited > self._limit / 2 or requested else None
        if requested or (waited >= self._limit and not self._explained):
            self._explained = True
            for line in filter(None, (wait_line(self._state), chain)):
                self._say(line)

    def _label(self, waited: float) -> Label | None:
        """Return the messages for which the host waits.

        If the host does not wait, return those for which the GPU waits. For these, ``waited`` must be half the limit.
        """
        if self._progress.label is not None or waited < self._limit / 2 or self._progress.posted is None:
            return self._progress.label
        label, work = self._progress.posted
        try:
            return None if work.is_completed() else label
        except RuntimeError:  # the work belongs to a CUDA graph, or its communicator was aborted
            return None

    def _read(self, rank: int) -> Seen | None:
        key, now = f"state/{rank}", time.monotonic()
        if not self._store.check([key]):
            return None
        state = State.from_text(self._store.get(key).decode())
        beat, since = self._seen.get(rank, (-1, now))
        if beat != state.beat:
            since = now
            self._seen[rank] = state.beat, now
        silent = now - since
        return Seen(state, silent if silent >= MISSED * self._interval else None)


_watch: tuple[Any, Watch] | None = None


def start_watch() -> None:
    """Start the watchdog unless ``WALLFACER_WAIT_S`` is 0, the world has only one rank, or the watchdog already runs.

    Raises:
        OptionError: The value of ``WALLFACER_WAIT_S`` is not allowed.
    """
    global _watch
    limit = wait_limit()
    if not dist.is_initialized() or dist.get_world_size() < 2 or not limit or dist.get_backend() == "fake":
        return
    if _watch is not None and _watch[0] is dist.group.WORLD and _watch[1].is_alive():
        return
    stop_watch()
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(STORE_TIMEOUT)
    watch = Watch(dist.PrefixStore("wallfacer/watch", store), dist.get_rank(), limit)
    _watch = dist.group.WORLD, watch
    watch.listen()
    watch.start()
    atexit.register(stop_watch)


def stop_watch() -> None:
    """Stop the watchdog if it runs."""
    global _watch
    if _watch is not None:
        _watch[1].stop()
        _watch = None


def wait_limit() -> float:
    """Return the seconds after which a rank prints what it waits for.

    Raises:
        OptionError: The value of ``WALLFACER_WAIT_S`` is not allowed.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        limit = float(text or DEFAULT_S)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1e6:
        raise OptionError(
            VARIABLE, text, "a number of seconds after which a waiting rank prints what it waits for, or 0 for never"
        )
    return limit


def _place() -> str:
    """Return the line of code that the main thread runs. Lines inside torch are skipped if possible."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame
    while frame is not None and ((file := frame.f_code.co_filename) == __file__ or f"{os.sep}torch{os.sep}" in file):
        frame = frame.f_back
    shown = frame or innermost
    if shown is None:
        return "an unknown line"
    return f"{shown.f_code.co_filename}:{shown.f_lineno} ({shown.f_code.co_name})"


def _no_action(number: int, frame: FrameType | None) -> None:
    """Do nothing. Python writes the number of a signal to the wake-up pipe only if the signal has a handler."""


def _say(line: str) -> None:
    print(f"wallfacer: {line}", file=sys.stderr, flush=True)
