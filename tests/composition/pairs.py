"""A pairwise cover: rows of levels, one of each factor, so that every pair of levels that may meet meets in some row.

Greedy, as AETG: each row starts from a pair that is not covered yet and takes, factor by factor, the level that covers
most. Constraints are functions of a few factors; a pair may meet if some whole row that holds it breaks none.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

Row = dict[str, str]
Pair = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Constraint:
    """What may not meet.

    Attributes:
        factors: those that it looks at.
        allows: given a level of each of them by name, whether they may meet.
        why: one line, with the place in Megatron that says so.
    """

    factors: tuple[str, ...]
    allows: Callable[..., bool]
    why: str


class Space:
    """All rows that break no constraint.

    Args:
        factors: name -> levels.
        constraints: what may not meet.
    """

    def __init__(self, factors: Mapping[str, Sequence[str]], constraints: Sequence[Constraint] = ()) -> None:
        self.factors = {name: tuple(levels) for name, levels in factors.items()}
        self._by_factor = {
            name: [constraint for constraint in constraints if name in constraint.factors] for name in factors
        }
        self._allows = cache(self._found)

    def broken(self, row: Mapping[str, str], factor: str) -> Constraint | None:
        """The first constraint on `factor` that `row`, whole or not, breaks."""
        for constraint in self._by_factor[factor]:
            if all(name in row for name in constraint.factors) and not constraint.allows(
                **{name: row[name] for name in constraint.factors}
            ):
                return constraint
        return None

    def allows(self, row: Mapping[str, str]) -> bool:
        """Whether some whole row holds `row`. Factors without a constraint decide nothing, so they are left out."""
        return self._allows(frozenset(item for item in row.items() if self._by_factor[item[0]]))

    def _found(self, constrained: frozenset[tuple[str, str]]) -> bool:
        row = dict(constrained)
        if any(self.broken(row, factor) for factor in row):
            return False
        return self._completes(row, [name for name, own in self._by_factor.items() if own and name not in row])

    def _completes(self, row: Row, open_factors: Sequence[str]) -> bool:
        """Depth first: `row` breaks nothing so far."""
        if not open_factors:
            return True
        factor, *rest = open_factors
        longer = (row | {factor: level} for level in self.factors[factor])
        return any(self.broken(one, factor) is None and self._completes(one, rest) for one in longer)

    def pairs(self) -> Iterator[Pair]:
        """Every pair of levels of two factors, allowed or not."""
        for one, other in combinations(self.factors, 2):
            for levels in product(self.factors[one], self.factors[other]):
                yield frozenset(zip((one, other), levels, strict=True))

    def allowed_pairs(self) -> set[Pair]:
        """Those that some whole row holds."""
        return {pair for pair in self.pairs() if self.allows(dict(pair))}


def pairs_of(row: Mapping[str, str]) -> Iterator[Pair]:
    """The pairs that meet in `row`."""
    yield from map(frozenset, combinations(row.items(), 2))


def cover(space: Space, *, seed: int = 0, candidates: int = 4) -> list[Row]:
    """Rows that together hold every allowed pair.

    Args:
        space: factors and constraints.
        seed: the same seed gives the same rows.
        candidates: rows that are tried for each row that is taken.
    """
    dice = random.Random(seed)
    # A list, sorted: the order of a set of strings is another one in each process.
    missing = dict.fromkeys(sorted(space.allowed_pairs(), key=sorted))
    rows = []
    while missing:
        tried = [_row(space, missing, dice) for _ in range(candidates)]
        best = max(tried, key=lambda row: sum(pair in missing for pair in pairs_of(row)))
        for pair in pairs_of(best):
            missing.pop(pair, None)
        rows.append(best)
    return rows


def place_lightly(
    space: Space, rows: Sequence[Row], factor: str, level: str, weight: Callable[[Row], float]
) -> list[Row]:
    """The same pairs, with an expensive level where it costs least: elsewhere its factor has the first level.

    Args:
        space: factors and constraints.
        rows: of a cover.
        factor: the one whose levels are placed anew.
        level: the expensive one.
        weight: what a row costs with it.

    Returns:
        Rows that hold all pairs of the old ones; where none are found, the old ones.
    """
    first = space.factors[factor][0]

    def fits(row: Row) -> bool:
        return space.broken(row, factor) is None

    emptied = [row | {factor: first} if row[factor] == level else row for row in rows]
    placed = [new if fits(new) else old for new, old in zip(emptied, rows, strict=True)]
    covered = {pair for row in rows for pair in pairs_of(row)}
    meetings = Counter(pair for row in placed for pair in pairs_of(row))
    while missing := covered - set(+meetings):
        gains = {}
        for place, old in enumerate(placed):
            new = old | {factor: level}
            if fits(new) and all(meetings[pair] > 1 for pair in set(pairs_of(old)) - set(pairs_of(new))):
                gains[place] = len(missing & set(pairs_of(new))) / weight(new)
        place = max(gains, key=lambda place: gains[place], default=None)
        if place is None or not gains[place]:
            return list(rows)
        meetings.subtract(pairs_of(placed[place]))
        placed[place] = placed[place] | {factor: level}
        meetings.update(pairs_of(placed[place]))
    return placed


def _row(space: Space, missing: Mapping[Pair, None], dice: random.Random) -> Row:
    """One candidate, begun from a pair of `missing`."""
    row: Row = dict(sorted(dice.choice(list(missing))))
    others = [name for name in space.factors if name not in row]
    dice.shuffle(others)
    for factor in others:
        gains = {level: _gain(row, factor, level, missing) for level in space.factors[factor]}
        # What gains nothing comes in its own order: the first level of a factor is the cheapest to run.
        levels = sorted(gains, key=lambda level: (-gains[level], dice.random() if gains[level] else 0))
        row[factor] = next(level for level in levels if space.allows(row | {factor: level}))
    return {name: row[name] for name in space.factors}


def _gain(row: Row, factor: str, level: str, missing: Mapping[Pair, None]) -> int:
    """Pairs of `missing` that `level` makes with what `row` has."""
    return sum(frozenset(((factor, level), item)) in missing for item in row.items())
