"""Record the timeline of attention in a training step: ``--wallfacer-timeline``."""

from __future__ import annotations

import atexit
from contextlib import AbstractContextManager
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from megatron_wallfacer.chrome_trace import TraceSource, trace_events, write_trace
from megatron_wallfacer.engine.timeline import PASSES, Pass, Timeline, no_observer, total
from megatron_wallfacer.megatron.outputs import Output
from megatron_wallfacer.schedule.ops import Op, Transfer

STEP = 2


class StepObserver:
    """Observer that records attention in the second training step of a rank and then writes a file.

    The first training step is not recorded, because in that step kernels are chosen, buffers allocated and connections
    made. A training step ends at the first call of the optimizer's ``step`` after attention. On CUDA the recorded times
    are host times: the host launches kernels and does not wait for their end.

    Args:
        directory: folder for the file ``rank-R.json`` of each rank.
        origin: rank, run, device and host that the file names as the source of the events.
    """

    def __init__(self, directory: Path, origin: TraceSource) -> None:
        self._directory, self._origin = directory, origin
        self._output = Output(f"--wallfacer-timeline {directory}")
        self._timeline, self._step, self._busy = Timeline(origin.rank), 1, False
        register_optimizer_step_post_hook(lambda *_: self._stepped())
        atexit.register(self.say_if_cut_short)

    def __call__(self, what: Pass | Op | Transfer) -> AbstractContextManager[None]:
        """Return a context manager that records a pass, an operation or a wait."""
        self._busy = True
        return self._timeline(what) if self.observing else no_observer(what)

    @property
    def observing(self) -> bool:
        """Whether the present step is recorded."""
        return self._step == STEP

    def summary(self) -> str:
        """Return a text with the seconds of attention and their exposed fraction, for forward and for backward."""
        told = []
        for name in PASSES:
            found = total(self._timeline.events, name)
            times = f"{found.attention_s:.3f} s in {found.passes} calls"
            told.append(f"{name} {times}, {found.exposed_share:.0%} exposed")
        return "; ".join(told)

    def say_if_cut_short(self) -> None:
        """Print a line on rank 0 if the process ends before the timeline was written."""
        if self._step <= STEP and self._timeline.rank == 0:
            print(
                f"wallfacer: --wallfacer-timeline {self._directory}: nothing was written, the run ended before its "
                f"step {STEP} did",
                flush=True,
            )

    def _stepped(self) -> None:
        if not self._busy:
            return
        self._busy, self._step = False, self._step + 1
        if self._step == STEP + 1:
            self._output.write(self._write)

    def _write(self) -> None:
        path = self._directory / f"rank-{self._timeline.rank}.json"
        write_trace(trace_events(self._timeline.rank, self._timeline.events), path, self._origin.as_dict())
        if self._timeline.rank == 0:
            print(f"wallfacer: timeline of step {STEP} in {self._directory}: attention {self.summary()}", flush=True)
