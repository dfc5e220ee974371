"""Configurations of a training run (sizes, options, grid), their predicted time and memory, and their ranking."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from megatron_wallfacer.planning.choice import Choice
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.flag_combinations import Optimizers, has_plain_optimizer
from megatron_wallfacer.planning.inventory import Buffer
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.rank_memory import rank_buffers
from megatron_wallfacer.planning.search import TIE
from megatron_wallfacer.planning.training_options import ParallelSizes, TrainingOptions
from megatron_wallfacer.planning.training_step import StepEstimate, estimate_step

#: Part of the device memory below which using less memory gives no preference.
FREE_BELOW = 0.9


@dataclass(frozen=True)
class Request:
    """The model, the cluster and the given sizes of a plan.

    Attributes:
        model: trained model.
        cluster: whole cluster. A plan may use the whole device memory of the cluster.
        tokens: sequence length in tokens.
        tp: tensor-parallel size; None to search it.
        pp: number of pipeline stages.
        cp: context-parallel size; None for all remaining ranks.
        causal: whether the mask is causal; otherwise attention is full.
        cuda_graphs: whether passes of attention are CUDA graphs.
        optimizers: optimizers that the search considers.
    """

    model: Model
    cluster: Cluster
    tokens: int
    tp: int | None = None
    pp: int = 1
    cp: int | None = None
    causal: bool = True
    cuda_graphs: bool = False
    optimizers: Optimizers = "tested"


@dataclass(frozen=True)
class Configuration:
    """A complete configuration of a training run: model, cluster, sizes, options and plan of attention."""

    request: Request
    sizes: ParallelSizes
    options: TrainingOptions
    choice: Choice

    @cached_property
    def step(self) -> StepEstimate:
        """Return the predicted time and memory of a step."""
        return estimate_step(self.request.model, self.choice, self.request.cluster, self.sizes, self.options)

    @cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        """Return all buffers of one rank."""
        tokens = self.choice.job.shape.tokens
        return rank_buffers(self.request.model, tokens, self.choice.memory, self.sizes, self.options)

    @property
    def fits(self) -> bool:
        """Return whether the step fits in device memory and host memory."""
        return fits_memory(self.step, self.request.cluster)

    @property
    def has_plain_optimizer(self) -> bool:
        """Return whether gradients and Adam's states are in fp32 on the device."""
        return has_plain_optimizer(self.options)


def fits_memory(step: StepEstimate, cluster: Cluster) -> bool:
    """Return whether a step fits in device memory and host memory."""
    host_gb = cluster.host_memory_gb
    return step.fits and (not step.host_gb or (host_gb is not None and step.host_gb <= host_gb))


def ranked(options: list[Configuration]) -> list[Configuration]:
    """Return configurations in the order of :func:`plain_first`, but with the preferred configuration in front.

    Configurations count as equally fast if their time is at most :data:`TIE` times that of the first configuration.
    Among equally fast configurations those that use at most :data:`FREE_BELOW` of the device memory are preferred, then
    the configuration with the least host memory.
    """
    if not options:
        return options
    first = options[0]
    alike = [option for option in options if option.has_plain_optimizer == first.has_plain_optimizer]
    equal = [option for option in alike if option.step.seconds <= TIE * first.step.seconds]
    chosen = min(equal, key=lambda option: (_used(option) > FREE_BELOW, option.step.host_gb, option.step.seconds))
    options.insert(0, options.pop(options.index(chosen)))
    return options


def _used(configuration: Configuration) -> float:
    """Return the used fraction of the device memory. Fractions below :data:`FREE_BELOW` count as equal."""
    return max(FREE_BELOW, configuration.step.memory_gb / configuration.request.cluster.device.memory_gb)


def plain_first(option: Configuration) -> tuple[bool, float]:
    """Return a sort key: fp32 gradients and Adam states on the device before others, then shorter times first."""
    return not option.has_plain_optimizer, option.step.seconds


def not_dominated(options: Iterable[Configuration]) -> list[Configuration]:
    """Return configurations in the order of :func:`plain_first`, without dominated configurations.

    A configuration is dominated if an earlier configuration is at least as good in time, device memory and host memory.
    """
    kept: list[Configuration] = []
    for option in sorted(options, key=plain_first):
        if not any(_beats(better, option) for better in kept):
            kept.append(option)
    return kept


def _beats(better: Configuration, other: Configuration) -> bool:
    """Return whether ``better`` is at least as good as ``other`` in time, device memory and host memory."""
    if better.step.seconds > other.step.seconds or better.step.host_gb > other.step.host_gb:
        return False
    if better.sizes == other.sizes:
        return _used(better) <= _used(other)
    return better.step.memory_gb <= other.step.memory_gb
