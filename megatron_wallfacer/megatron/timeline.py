"""The time line of a training step: what ``--wallfacer-timeline`` records."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from megatron_wallfacer.engine.timeline import Event, Timeline, nothing
from megatron_wallfacer.schedule.ops import Attend, Load, Move, Op, Store


class StepRecorder:
    """A recorder of the engine: the attention of the second training step of one rank, written down when it is over.

    The first step is left out: in it kernels are chosen, and buffers and connections made. A step ends when an
    optimizer first steps after some attention. On CUDA the times are those of the host, which launches and goes on.

    Args:
        directory: for ``rank-R.json``, one a rank.
        rank: of this process, over all.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory, self._timeline, self._step = directory, Timeline(rank), 1
        self._passes: list[int] = []  # where each begins among the events
        self._backward: list[bool] = []
        self._busy, self._ending = False, True
        register_optimizer_step_post_hook(lambda *_: self._stepped())

    def __call__(self, what: Op | Move) -> AbstractContextManager[None]:
        self._busy = True
        if self._step != 2:
            return nothing(what)
        # A pass begins by naming the rank's own tensors, and ends by storing its results.
        if self._ending and isinstance(what, Load):
            self._passes.append(len(self._timeline.events))
            self._backward.append(False)
        self._ending = isinstance(what, Store)
        if isinstance(what, Attend):
            self._backward[-1] = what.kv_into is not None
        return self._timeline(what)

    def summary(self) -> str:
        """Seconds and exposed share of each kind of pass."""
        told = []
        for name, backward in (("forward", False), ("backward", True)):
            passes = [events for events, is_backward in self._split() if is_backward == backward]
            spans = sum(max(e.end for e in events) - min(e.start for e in events) for events in passes)
            waits = sum(e.end - e.start for events in passes for e in events if e.row == "wait")
            told.append(f"{name} {spans:.3f} s in {len(passes)} calls, {waits / (spans or 1):.0%} exposed")
        return "; ".join(told)

    def _split(self) -> list[tuple[list[Event], bool]]:
        """The events of each pass, and whether it is a backward one."""
        ends = [*self._passes[1:], len(self._timeline.events)]
        events = [self._timeline.events[start:end] for start, end in zip(self._passes, ends, strict=True)]
        return list(zip(events, self._backward, strict=True))

    def _stepped(self) -> None:
        if not self._busy:
            return
        self._busy, self._step = False, self._step + 1
        if self._step == 3:
            path = self._directory / f"rank-{self._timeline.rank}.json"
            self._timeline.write(path)
            if self._timeline.rank == 0:
                print(f"wallfacer: time line of step 2 in {self._directory}: attention {self.summary()}", flush=True)
