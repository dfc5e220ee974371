"""The time line of a training step: what ``--wallfacer-timeline`` records."""

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
    """An observer of the engine: the attention of the second training step of one rank, written down when it is over.

    The first step is left out: in it kernels are chosen, and buffers and connections made. A step ends when an
    optimizer first steps after some attention. On CUDA the times are those of the host, which launches and goes on.

    Args:
        directory: for ``rank-R.json``, one a rank.
        origin: of this rank.
    """

    def __init__(self, directory: Path, origin: TraceSource) -> None:
        self._directory, self._origin = directory, origin
        self._output = Output(f"--wallfacer-timeline {directory}")
        self._timeline, self._step, self._busy = Timeline(origin.rank), 1, False
        register_optimizer_step_post_hook(lambda *_: self._stepped())
        atexit.register(self.say_if_cut_short)

    def __call__(self, what: Pass | Op | Transfer) -> AbstractContextManager[None]:
        """Return the context that records a pass, an operation or a wait."""
        self._busy = True
        return self._timeline(what) if self.observing else no_observer(what)

    @property
    def observing(self) -> bool:
        """Whether this is the step that is recorded."""
        return self._step == STEP

    def summary(self) -> str:
        """Seconds and exposed share of each kind of pass."""
        told = []
        for name in PASSES:
            found = total(self._timeline.events, name)
            times = f"{found.attention_s:.3f} s in {found.passes} calls"
            told.append(f"{name} {times}, {found.exposed_share:.0%} exposed")
        return "; ".join(told)

    def say_if_cut_short(self) -> None:
        """One line on rank 0 where the run is over and nothing was written; called when the process ends."""
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
            print(f"wallfacer: time line of step {STEP} in {self._directory}: attention {self.summary()}", flush=True)
