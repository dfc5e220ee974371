"""The longest sequence that a cluster trains, and what stops a longer one.

Bytes grow with the tokens: attention's buffers are taken from the schedules of one length and scaled. For each
combination of flags the longest sequence is found in closed form; the winner's length is then searched as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import lcm

from megatron_wallfacer.planning.configuration import Configuration, Request, fits_memory
from megatron_wallfacer.planning.configurations import (
    Way,
    attention_of,
    configurations,
    grid_pool,
    tried_in_closed_form,
    ways,
)
from megatron_wallfacer.planning.layer import Attention, Step
from megatron_wallfacer.planning.offers import Offer, offers
from megatron_wallfacer.planning.search import Choice

#: Tokens per rank whose schedules are scaled, and grids that are tried: those with the smallest buffers.
SCALED_FROM, GRIDS = 1 << 18, 3
#: Lengths are multiples of it, up to a million tokens of the smaller one.
UNITS = (8192, 65536)


@dataclass(frozen=True)
class Longest:
    """The longest sequence.

    Attributes:
        configuration: the fastest that trains it.
        unit: tokens that a longer one has more.
        needs: configuration of the longer one with the least device memory.
    """

    configuration: Configuration
    unit: int
    needs: Configuration


@dataclass(frozen=True)
class _Combination:
    """One grid with one combination of flags, at any length."""

    way: Way
    choice: Choice
    offer: Offer

    def fits(self, tokens: int) -> bool:
        """Whether a sequence fits; in closed form."""
        return fits_memory(self._step(tokens), self.way.request.cluster)

    def _step(self, tokens: int) -> Step:
        way, factor = self.way.at(tokens), tokens / self.way.request.tokens
        attention = attention_of(self.choice, self.offer)
        seconds = (factor * factor * one for one in (attention.seconds, attention.kernel_s, attention.forward_s))
        scaled = Attention(*seconds, attention.memory.scaled(factor))
        return way.around(scaled, way.resolved(self.offer, scaled))


def longest(request: Request) -> list[Longest]:
    """Return the longest sequence with flags that tests cover, then a longer one with other flags of the optimizer.

    Args:
        request: model, cluster and given sizes; its length has no meaning.

    Returns:
        None, one or two. None: not even the shortest sequence fits.

    Raises:
        OptionError: a size does not divide.
    """
    grids = [(way, choice) for way in _ways(request) for choice in _leanest_grids(way)]
    found: list[Longest] = []
    for tested_only in (True, False):
        tokens, spread = 0, None
        for way, choice in grids:
            for offer in offers(request.cluster, way.job.cp_size, tested_only=tested_only):
                if (offer.loss and offer.mlp) or offer.gradient_bytes == 2:
                    more = _most(_Combination(way, choice, offer).fits, tokens, request.cluster.ranks)
                    tokens, spread = (more, way.spread) if more else (tokens, spread)
        if spread is not None:
            best = _simulated(replace(request, tp=spread.tp, tokens=tokens, tested_only=tested_only))
            if not found or best.configuration.request.tokens > found[0].configuration.request.tokens:
                found.append(best)
    return found


def _ways(request: Request) -> list[Way]:
    """Sizes whose states leave memory for two tokens per rank."""
    found = ways(request, lambda spread: SCALED_FROM * spread.cp)
    return [way for way in found if tried_in_closed_form(way.at(2 * request.cluster.ranks)).fastest_s is not None]


def _leanest_grids(way: Way) -> list[Choice]:
    leanest = Offer("full", inputs=way.request.cluster.offers_host_memory, loss=True, mlp=True)
    _, pool = grid_pool(way, leanest)
    return sorted(pool, key=lambda one: one.attention.backward + one.attention.kept)[:GRIDS]


def _most(fits: Callable[[int], bool], start: int, ranks: int) -> int:
    """The longest length that fits, 0 if that is no longer than ``start``."""
    good = start + unit_of(start, ranks)
    if not fits(good):
        return 0
    bad = 2 * good
    while fits(bad):
        good, bad = bad, 2 * bad
    while True:
        unit = unit_of(good, ranks)
        # Units grow with the length: the middle, rounded down, may lie below a length of a smaller unit.
        middle = max((good + bad) // 2 // unit, good // unit + 1) * unit
        if middle >= bad:
            return good
        good, bad = (middle, bad) if fits(middle) else (good, middle)


def unit_of(tokens: int, ranks: int) -> int:
    """Return the tokens by which lengths near to ``tokens`` differ: two chunks per rank, or more."""
    return lcm(UNITS[tokens >= 1 << 20], 2 * ranks)


def _simulated(request: Request) -> Longest:
    """The length as any other is searched; a little shorter where scaled buffers were too small."""
    unit = unit_of(request.tokens, request.cluster.ranks)
    longer = configurations(replace(request, tokens=request.tokens + unit))
    while True:
        found = configurations(request)
        if found.best:
            return Longest(min(found.best, key=lambda one: (not one.is_tested, one.step.seconds)), unit, longer.leanest)
        request, longer = replace(request, tokens=request.tokens - unit), found
