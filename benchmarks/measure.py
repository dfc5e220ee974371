"""A measurement: every scheme checked, then all of them timed in turns, in one run on one cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from benchmarks import jobs
from benchmarks.bound import Traffic, counted_traffic, planned_traffic
from benchmarks.calibrate import ROUNDS, Processors, measure_processors, middle
from benchmarks.cluster.cluster import Cluster
from benchmarks.cluster.quiet import MachineBusy, cpu_time, process_s, wait_until_idle
from benchmarks.cluster.ranks import Ranks
from benchmarks.compute import Alone, alone
from benchmarks.config import Config
from benchmarks.contender import Contender
from benchmarks.dense import make_problem
from benchmarks.peers.loading import PeerMissing, load

#: Tokens of a chunk in the correctness run: small, for its reference is quadratic.
CHECK_CHUNK = 16
#: Seconds between the order and the start, so that every rank has heard it.
_HEAD_START_S = 0.05
#: A rank that begins later than this was kept waiting for a processor.
_LATE_START_S = 0.02
_ATTEMPTS = 4
#: Length in seconds of the message that tries a link, and how often.
_PROBE_S, _PROBES = 0.3, 3

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """One forward + backward of all ranks.

    Attributes:
        seconds: until the last rank was done, from a start that all ranks share.
        forward_s: until the last rank's forward was done.
        cpu_s: processor seconds of all ranks.
        late_start_s: of the rank that began last.
        late_kernel_s: worst rank's sum of sleeps that ended too late.
        disturbed: somebody else used the processor meanwhile.
    """

    seconds: float
    forward_s: float
    cpu_s: float
    late_start_s: float
    late_kernel_s: float
    disturbed: bool


@dataclass
class Result:
    """All that is known of one scheme in one setting.

    Attributes:
        problem: why it could not run; then nothing else is there.
        errors: worst relative error of out, dq, dk, dv over all ranks, on real kernels.
        counted: traffic of one forward + backward by the interfaces' counters.
        planned: the same by the schedules, without headers.
        waiting: share of the time in which a rank waited for a move, by the engine's timelines; mean of the ranks.
    """

    label: str
    note: str
    check_dtype: str
    alone: Alone
    problem: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    counted: Traffic | None = None
    planned: Traffic | None = None
    waiting: float | None = None

    @property
    def median_s(self) -> float:
        """Of the samples."""
        return median(sample.seconds for sample in self.samples)

    @property
    def forward_s(self) -> float:
        """Median of the forward part."""
        return median(sample.forward_s for sample in self.samples)

    @property
    def exposed_s(self) -> float:
        """Seconds in which the last rank did not compute: moves that nothing hid, and the processor's work for them."""
        return self.median_s - self.alone.rank_s

    @property
    def bound_s(self) -> float:
        """max(compute alone, busiest link); by the schedules if there are any, else by the counters."""
        traffic = self.planned or self.counted
        return max(self.alone.rank_s, traffic.link_s if traffic else 0.0)

    @property
    def worst_error(self) -> float:
        """Over out and gradients."""
        return max(self.errors.values())


@dataclass
class Measurement:
    """A run.

    Attributes:
        results: of each scheme.
        goodput: Mbit/s that a message reached between two nodes (``inter``) and within one (``intra``), if limited.
        processors: what the ranks cost this machine, for predictions; measured after each turn, the medians.
    """

    results: list[Result]
    goodput: dict[str, float]
    processors: Processors | None = None


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        repeats: samples of each scheme.
        idle_wait_s: seconds to wait for an idle machine; None to measure on a busy one.
        timelines: where to write the timelines of one more run of each of ours; none if None.
    """

    repeats: int = 7
    idle_wait_s: float | None = 300.0
    timelines: Path | None = None


def measure(
    config: Config, contenders: Sequence[Contender], options: Options, say: Say, keep: Callable[[Measurement], None]
) -> Measurement:
    """Check and time schemes in a setting.

    Args:
        config: the setting.
        contenders: what is compared.
        options: how.
        say: told of progress.
        keep: given what there is after each turn, for a long run may be interrupted.

    Raises:
        ClusterUnavailable, RankFailed, MachineBusy: as they say.
    """
    # No pool of threads in the parent: the ranks are forks of it, and one thread each is what they get.
    torch.set_num_threads(1)
    shape, ranks = config.shape, config.topology.ranks
    results, able = _open_results(config, contenders)
    problem = make_problem(2 * CHECK_CHUNK * ranks, shape.heads, shape.kv_heads, shape.head_dim)

    def make_state(rank: int) -> jobs.RankState:
        return jobs.RankState(config, able, problem)

    with Cluster(config.topology) as cluster, Ranks(cluster.wiring, make_state) as running:
        say(f"{config.topology}; {ranks} ranks")
        session = _Session(config, running, options, say)
        goodput = session.goodput()
        good = [contender for contender in able if session.admit(contender, results[contender.label])]
        measurement = Measurement(list(results.values()), goodput)
        found: list[Processors] = []

        def after_each_turn() -> None:
            found.append(measure_processors(running, config.topology, min(ROUNDS, options.repeats)))
            measurement.processors = middle(found)
            keep(measurement)

        session.turns([results[contender.label] for contender in good], after_each_turn)
        if options.timelines is not None:
            session.record([results[contender.label] for contender in good], options.timelines)
            keep(measurement)
    return measurement


def _open_results(config: Config, contenders: Sequence[Contender]) -> tuple[dict[str, Result], list[Contender]]:
    """Empty results of all, and those that can be imported."""
    without_moving = alone(config.compute, config.shape, config.topology.ranks)
    results, able = {}, []
    for contender in contenders:
        result = Result(contender.label, contender.note, contender.check_dtype, without_moving)
        results[contender.label] = result
        try:
            if contender.package is not None:
                load(contender.package)  # before the fork, once for all ranks
            able.append(contender)
        except PeerMissing as error:
            result.problem = str(error)
    return results, able


class _Session:
    """One run on ranks that are up."""

    def __init__(self, config: Config, ranks: Ranks, options: Options, say: Say) -> None:
        self._config, self._ranks, self._options, self._say = config, ranks, options, say
        self._own = [os.getpid(), *ranks.pids]
        self._volume = config.shard

    def goodput(self) -> dict[str, float]:
        """What the limits leave to a message, Mbit/s; the best of some tries."""
        topology, found = self._config.topology, {}
        pairs = {"intra": (1, topology.intra_mbit)} if topology.ranks_per_node > 1 else {}
        if topology.nodes > 1:
            pairs["inter"] = (topology.ranks_per_node, topology.inter_mbit)
        for name, (target, mbit) in pairs.items():
            if mbit is not None:
                size = round(mbit * 1e6 / 8 * _PROBE_S)
                tries = [self._ranks.run(jobs.goodput, 0, target, size)[target] for _ in range(_PROBES)]
                found[name] = max(tries)
                self._say(f"{name} link: {found[name]:.1f} of {mbit:g} Mbit/s")
        return found

    def admit(self, contender: Contender, result: Result) -> bool:
        """Prepare, warm up and check a scheme; count what it sends. False if it cannot run."""
        label = contender.label
        errors = self._ranks.run(jobs.attempt, label)
        if any(errors):
            result.problem = next(filter(None, errors))
            self._say(f"{label}: cannot run: {result.problem}")
            return False
        errors = self._ranks.run(jobs.check, label, contender.check_dtype)
        result.errors = {name: max(error[name] for error in errors) for name in errors[0]}
        result.planned = planned_traffic(contender, self._config.topology, self._volume)
        self._say(f"{label}: worst error {result.worst_error:.1e} ({contender.check_dtype})")
        return True

    def turns(self, results: list[Result], after_each: Callable[[], None]) -> None:
        """Time all of them in turns, so that whatever drifts drifts for all.

        Raises:
            MachineBusy: in the first turn. Later it ends the measurement, and what the whole turns gave is kept.
        """
        for turn in range(self._options.repeats):
            try:
                samples = [self._sample(result) for result in results]
            except MachineBusy as error:
                if turn == 0:
                    raise
                self._say(f"ended after {turn} turns: {error}")
                return
            for result, sample in zip(results, samples, strict=True):
                result.samples.append(sample)
            after_each()
            self._say(f"turn {turn + 1} of {self._options.repeats} done")

    def record(self, results: list[Result], directory: Path) -> None:
        """One more run of each with the engine's timelines, rank by rank, in a folder for each scheme."""
        for result in results:
            self._ranks.run(jobs.settle)
            start = time.monotonic() + _HEAD_START_S
            shares = self._ranks.run(jobs.recorded, result.label, start, directory / result.label)
            if None not in shares:
                result.waiting = sum(shares) / len(shares)

    def _sample(self, result: Result) -> Sample:
        """One undisturbed sample; a disturbed one, marked, if none of some attempts was undisturbed."""
        for _ in range(_ATTEMPTS):
            if self._options.idle_wait_s is not None:
                wait_until_idle(self._options.idle_wait_s, self._own)
            sample = self._once(result)
            if not sample.disturbed or self._options.idle_wait_s is None:
                break
            self._say(f"{result.label}: disturbed, again")
        return sample

    def _once(self, result: Result) -> Sample:
        self._ranks.run(jobs.settle)
        links, cpu, own = self._ranks.run(jobs.counters), cpu_time(), process_s(self._own)
        start = time.monotonic() + _HEAD_START_S
        timings = self._ranks.run(jobs.timed, result.label, start)
        used, own = cpu_time() - cpu, process_s(self._own) - own
        after = self._ranks.run(jobs.counters)
        counted = [b - a for a, b in zip(links, after, strict=True)]
        result.counted = counted_traffic(counted, self._config.topology)
        late_start_s = max(timing.late_start_s for timing in timings)
        return Sample(
            seconds=max(timing.end for timing in timings),
            forward_s=max(timing.forward_end for timing in timings),
            cpu_s=sum(timing.cpu_s for timing in timings),
            late_start_s=late_start_s,
            late_kernel_s=max(timing.late_s for timing in timings),
            disturbed=used.disturbed(own) or late_start_s > _LATE_START_S,
        )
