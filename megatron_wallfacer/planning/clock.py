"""The simulated clock. It calls functions at simulated times, when a flow ends, or when a thread has woken up."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from megatron_wallfacer.planning.fluid import Fluid
from megatron_wallfacer.planning.processors import CORES, WakeUpDelay

Callback = Callable[[], None]


class Clock:
    """The clock of a simulation.

    Attributes:
        now: simulated seconds since the start.
        fluid: model of the shared resources and of the flows that use them.
    """

    def __init__(self, fluid: Fluid, wake_up: WakeUpDelay | None) -> None:
        self.now = 0.0
        self.fluid, self._wake_up = fluid, wake_up
        self._events: list[tuple[float, int, Callback]] = []
        self._number = count()

    def after(self, seconds: float, callback: Callback) -> None:
        """Call a function after some seconds of simulated time."""
        heapq.heappush(self._events, (self.now + seconds, next(self._number), callback))

    def after_wake_up(self, callback: Callback, sleeps: int = 1) -> None:
        """Call a function after the total delay of ``sleeps`` wake-ups, or at once if there is no model of delays."""
        if self._wake_up is None:
            callback()
        else:
            self.after(self._wake_up.seconds(self.fluid.used(CORES), sleeps), callback)

    def step(self) -> bool:
        """Advance to the next event, or to the end of a flow if that is earlier. Return False if neither remains."""
        flow_in = self.fluid.next_end_s()
        event_in = self._events[0][0] - self.now if self._events else None
        soonest = min((seconds for seconds in (flow_in, event_in) if seconds is not None), default=None)
        if soonest is None:
            return False
        ended = self.fluid.advance(max(0.0, soonest))
        self.now = self._events[0][0] if soonest == event_in else self.now + soonest
        for callback in ended:
            callback()
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()
        return True
