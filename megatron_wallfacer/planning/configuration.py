"""A configuration of a training: sizes, flags and grid, with its time and memory; and which of some to take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.inventory import Buffer
from megatron_wallfacer.planning.layer import Step, step
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.offers import is_tested
from megatron_wallfacer.planning.parallel import Software, Spread
from megatron_wallfacer.planning.rank_memory import rank_buffers
from megatron_wallfacer.planning.search import TIE, Choice

#: Part of the device's memory up to which less memory is no reason to prefer a configuration.
ROOM = 0.9


@dataclass(frozen=True)
class Request:
    """What is planned.

    Attributes:
        model: that is trained.
        cluster: all of it; its device has the memory that may be used.
        tokens: of a sequence.
        tp, cp: sizes that are given; None is searched, or all that is left.
        pp: pipeline stages.
        causal: causal mask, else full attention.
        cuda_graphs: passes of attention are CUDA graphs.
        tested_only: only what tests of this project train with.
    """

    model: Model
    cluster: Cluster
    tokens: int
    tp: int | None = None
    pp: int = 1
    cp: int | None = None
    causal: bool = True
    cuda_graphs: bool = False
    tested_only: bool = False


@dataclass(frozen=True)
class Configuration:
    """Everything that a training needs to be told.

    Attributes:
        request: what it is for.
        spread: sizes of the groups.
        software: recomputation, tiles, what is on the host, the optimizer.
        choice: grid of attention, simulated.
    """

    request: Request
    spread: Spread
    software: Software
    choice: Choice

    @cached_property
    def step(self) -> Step:
        """Its time and memory."""
        return step(self.request.model, self.choice, self.request.cluster, self.spread, self.software)

    @cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        """Everything that one rank holds."""
        tokens = self.choice.job.shape.tokens
        return rank_buffers(self.request.model, tokens, self.choice.attention, self.spread, self.software)

    @property
    def fits(self) -> bool:
        """Whether device and host have the memory."""
        return fits_memory(self.step, self.request.cluster)

    @property
    def is_tested(self) -> bool:
        """Whether tests of this project train with its optimizer."""
        return is_tested(self.software)


def fits_memory(found: Step, cluster: Cluster) -> bool:
    """Whether device and host have the memory that a step needs."""
    host_gb = cluster.host_memory_gb
    return found.fits and (not found.host_gb or (host_gb is not None and found.host_gb <= host_gb))


def ranked(options: list[Configuration]) -> list[Configuration]:
    """By tests and time; before all of them the one to take of those as good as equal to the first.

    That is one which leaves device memory free (:data:`ROOM`), then the one with the least host memory.
    """
    if not options:
        return options
    first = options[0]
    equal = [one for one in options if one.is_tested == first.is_tested]
    equal = [one for one in equal if one.step.seconds <= TIE * first.step.seconds]
    chosen = min(equal, key=lambda one: (_used(one) > ROOM, one.step.host_gb, one.step.seconds))
    options.insert(0, options.pop(options.index(chosen)))
    return options


def _used(one: Configuration) -> float:
    """Part of the device's memory that is used, but no less than :data:`ROOM`."""
    return max(ROOM, one.step.memory_gb / one.request.cluster.device.memory_gb)


def not_dominated(options: Iterable[Configuration]) -> list[Configuration]:
    """Without those that another one beats, or equals, in time, device memory and host memory."""
    kept: list[Configuration] = []
    for one in sorted(options, key=lambda one: (not one.is_tested, one.step.seconds)):
        if not any(_beats(other, one) for other in kept):
            kept.append(one)
    return kept


def _beats(one: Configuration, other: Configuration) -> bool:
    """Of as many tensor-parallel ranks none needs to leave more than a part of the memory free."""
    if one.step.seconds > other.step.seconds or one.step.host_gb > other.step.host_gb:
        return False
    if one.spread == other.spread:
        return _used(one) <= _used(other)
    return one.step.memory_gb <= other.step.memory_gb
