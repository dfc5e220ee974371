"""The search for the longest sequence that a cluster can train.

Memory is proportional to the tokens, so attention's buffers are computed for one length and scaled to others. For each
combination of flags, formulas give the longest sequence that fits. The search over configurations then simulates
the longest of these sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import lcm

from megatron_wallfacer.planning.choice import Choice
from megatron_wallfacer.planning.configuration import Configuration, Request, fits_memory, plain_first
from megatron_wallfacer.planning.configurations import (
    SizeCandidate,
    attention_of,
    closed_forms,
    grid_pool,
    search_configurations,
    size_candidates,
)
from megatron_wallfacer.planning.flag_combinations import FlagCombination, flag_combinations
from megatron_wallfacer.planning.training_step import AttentionEstimate

#: Tokens per rank of the schedules whose buffers are scaled.
SCALED_FROM = 1 << 18
#: Number of grids that are tried, which are the grids with the smallest buffers.
GRIDS = 3
#: Units of lengths in tokens: up to 1,048,576 tokens, and above.
UNITS = (8192, 65536)


@dataclass(frozen=True)
class LongestSequence:
    """The longest sequence that fits, with the configuration that trains it.

    Attributes:
        configuration: fastest configuration for the longest sequence.
        unit: accuracy of the search in tokens. With the same optimizers, the longest sequence + ``unit`` does not fit.
        longer: configuration that needs the least device memory for a sequence that is longer by ``unit``.
    """

    configuration: Configuration
    unit: int
    longer: Configuration


def longest_sequences(request: Request) -> list[LongestSequence]:
    """Return the longest sequence that fits with Megatron's default Adam (fp32 gradients and states).

    If a longer sequence fits with another optimizer in ``request.optimizers``, the list also contains that sequence.
    The sequence length of the request is ignored. The list is empty if even the shortest sequence does not fit.

    Raises:
        OptionError: A given size does not divide ranks, heads or tokens.
    """
    grids = [(candidate, choice) for candidate in _candidates(request) for choice in _leanest_grids(candidate)]
    longest: list[LongestSequence] = []
    for optimizers in dict.fromkeys(("plain", request.optimizers)):
        tokens, sizes = 0, None
        for candidate, choice in grids:
            for flags in flag_combinations(request.cluster, candidate.job.cp_size, optimizers):
                if (flags.loss_tiles and flags.mlp_tiles) or flags.gradient_bytes == 2:
                    fits = partial(_fits, candidate, choice, flags)
                    more = _most_tokens(fits, tokens, request.cluster.ranks)
                    tokens, sizes = (more, candidate.sizes) if more else (tokens, sizes)
        if sizes is not None:
            best = _simulated(replace(request, tp=sizes.tp, tokens=tokens, optimizers=optimizers))
            if not longest or best.configuration.request.tokens > longest[0].configuration.request.tokens:
                longest.append(best)
    return longest


def _candidates(request: Request) -> list[SizeCandidate]:
    """Return the parallel sizes with which a step of two tokens per rank fits in memory."""
    shortest = 2 * request.cluster.ranks
    sizes = size_candidates(request, lambda sizes: SCALED_FROM * sizes.cp)
    return [size for size in sizes if closed_forms(size.with_tokens(shortest)).fastest_s is not None]


def _fits(candidate: SizeCandidate, choice: Choice, flags: FlagCombination, tokens: int) -> bool:
    """Return whether ``tokens`` tokens fit. Time and memory of the grid's attention are scaled to ``tokens`` tokens."""
    factor = tokens / candidate.request.tokens
    attention = attention_of(choice, flags)
    times = (factor * factor * seconds for seconds in (attention.seconds, attention.kernel_s, attention.forward_s))
    scaled = AttentionEstimate(*times, attention.memory.scaled(factor))
    return fits_memory(candidate.with_tokens(tokens).step(flags, scaled), candidate.request.cluster)


def _leanest_grids(candidate: SizeCandidate) -> list[Choice]:
    on_host = candidate.request.cluster.offers_host_memory
    leanest = FlagCombination("full", inputs_on_host=on_host, loss_tiles=True, mlp_tiles=True)
    _, pool = grid_pool(candidate, leanest)
    return sorted(pool, key=lambda choice: choice.memory.backward + choice.memory.kept)[:GRIDS]


def _most_tokens(fits: Callable[[int], bool], start: int, ranks: int) -> int:
    """Return the longest length that fits; 0 if it does not exceed ``start``."""
    good = start + unit_of(start, ranks)
    if not fits(good):
        return 0
    bad = 2 * good
    while fits(bad):
        good, bad = bad, 2 * bad
    while True:
        unit = unit_of(good, ranks)
        # Units grow with the length. So the middle, rounded down, may be below `good`.
        middle = max((good + bad) // 2 // unit, good // unit + 1) * unit
        if middle >= bad:
            return good
        good, bad = (middle, bad) if fits(middle) else (good, middle)


def unit_of(tokens: int, ranks: int) -> int:
    """Return the increment in tokens of the sequence lengths in the search, for lengths of about ``tokens``.

    The increment is a multiple of 2 x ``ranks``.
    """
    return lcm(UNITS[tokens >= 1 << 20], 2 * ranks)


def _simulated(request: Request) -> LongestSequence:
    """Search the requested length, then ever shorter lengths, and return the result for the first length that fits."""
    unit = unit_of(request.tokens, request.cluster.ranks)
    longer = search_configurations(replace(request, tokens=request.tokens + unit))
    while True:
        result = search_configurations(request)
        if result.best:
            return LongestSequence(min(result.best, key=plain_first), unit, longer.leanest)
        request, longer = replace(request, tokens=request.tokens - unit), result
