"""What ranks do on request. Each function is a job of :class:`benchmarks.cluster.ranks.Ranks`."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cluster.counters import LinkBytes, read_counters
from benchmarks.compute import SleepKernel, make_kernel
from benchmarks.config import Config
from benchmarks.contender import Contender
from benchmarks.dense import NAMES, Problem, relative_error
from benchmarks.groups import SharedGroups
from megatron_wallfacer.chrome_trace import trace_events, write_trace
from megatron_wallfacer.engine.timeline import Timeline, TimelineEvent, no_observer
from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel


@dataclass(frozen=True)
class RankTiming:
    """One forward + backward on one rank.

    Attributes:
        late_start_s: seconds after the agreed start at which it really began.
        forward_end, end: seconds after the agreed start.
        cpu_s: processor seconds of all threads of the rank, user and system.
        late_s: seconds by which sleeps of modelled kernels ended too late, summed.
    """

    late_start_s: float
    forward_end: float
    end: float
    cpu_s: float
    late_s: float


class RankState:
    """What a rank keeps between jobs."""

    def __init__(self, config: Config, contenders: list[Contender], problem: Problem | None) -> None:
        self.contenders = {contender.label: contender for contender in contenders}
        self.problem, self.groups = problem, SharedGroups()
        self.kernel: Kernel = make_kernel(config.compute)
        shape = config.shape
        rows, dtype = shape.tokens // config.topology.ranks, getattr(torch, shape.dtype)
        heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        tensors = [torch.randn(1, rows, width, shape.head_dim).to(dtype) for width in heads]
        self.inputs, self.dout = [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3]
        # A collection in the middle of a sample would be one rank's, at a time of its own. What was there before the
        # fork is left out of all later ones: to touch it would be to copy it.
        gc.freeze()
        gc.disable()


def prepare(state: RankState, label: str) -> None:
    """Make the groups of a scheme."""
    with state.groups.for_one_scheme():
        state.contenders[label].prepare()


def attempt(state: RankState, label: str) -> str | None:
    """As :func:`prepare`, and one untimed run; None, or why it cannot run.

    Only for what fails on every rank alike: others would wait for a rank that does not take part.
    """
    try:
        prepare(state, label)
        timed(state, label, time.monotonic())
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


def check(state: RankState, label: str, dtype: str) -> dict[str, float]:
    """Relative error of this rank's out, dq, dk, dv on real kernels, against dense attention in fp64."""
    contender, problem = state.contenders[label], state.problem
    local = {name: contender.shard(x).to(getattr(torch, dtype)).contiguous() for name, x in problem.inputs.items()}
    q, k, v = (local[name].requires_grad_() for name in "qkv")
    out = contender.attend(q, k, v, TorchCpuKernel())
    out.backward(local["dout"])
    got = dict(zip(NAMES, (out.detach(), q.grad, k.grad, v.grad), strict=True))
    return {name: relative_error(got[name], contender.shard(problem.answers[name])) for name in NAMES}


def settle(state: RankState) -> None:
    """What has to be done between samples, and takes time."""
    for tensor in state.inputs:
        tensor.grad = None
    gc.collect()


def timed(state: RankState, label: str, start: float) -> RankTiming:
    """Forward + backward, beginning at ``start`` on the machine's monotonic clock, which all ranks share."""
    attend, kernel = state.contenders[label].attend, state.kernel
    cpu, late = time.process_time(), _late(kernel)
    time.sleep(max(0.0, start - time.monotonic()))
    begun = time.monotonic()
    out = attend(*state.inputs, kernel)
    forward_end = time.monotonic()
    out.backward(state.dout)
    end = time.monotonic()
    return RankTiming(
        late_start_s=begun - start,
        forward_end=forward_end - start,
        end=end - start,
        cpu_s=time.process_time() - cpu,
        late_s=_late(kernel) - late,
    )


def recorded(state: RankState, label: str, start: float, directory: Path) -> float | None:
    """As :func:`timed`, once, with a timeline of ours written to a file; the share of the time that it waited."""
    contender = state.contenders[label]
    if not hasattr(contender, "observer"):
        return None
    timeline = Timeline(dist.get_rank())
    contender.observer = timeline
    timed(state, label, start)
    contender.observer = no_observer
    write_trace(trace_events(timeline.rank, timeline.events), directory / f"rank-{timeline.rank}.json")
    return waiting_share(timeline.events)


def waiting_share(events: Sequence[TimelineEvent]) -> float:
    """Share of the time from the first to the last event of a rank in which it waited for a transfer."""
    if not events:
        return 0.0
    waited = sum(event.end - event.start for event in events if event.row == "wait")
    return waited / (max(event.end for event in events) - min(event.start for event in events))


def counters(state: RankState) -> LinkBytes:
    """What went over this rank's links so far."""
    return read_counters()


def goodput(state: RankState, source: int, target: int, size: int) -> float | None:
    """Mbit/s of ``size`` bytes from one rank to another, as the receiver sees it; None elsewhere."""
    rank = dist.get_rank()
    payload: Tensor = torch.zeros(size, dtype=torch.uint8)
    dist.barrier()
    if rank == source:
        dist.send(payload, target)
    if rank != target:
        return None
    begin = time.monotonic()
    dist.recv(payload, source)
    return size * 8 / 1e6 / (time.monotonic() - begin)


def _late(kernel: Kernel) -> float:
    return kernel.late_s if isinstance(kernel, SleepKernel) else 0.0
