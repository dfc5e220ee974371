"""The cover holds every pair that may meet, the same one each time."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.composition.combination import COVER_SEED, Combination, combinations_of_cover
from tests.composition.features import CONSTRAINTS, FACTORS, FLAGS, OURS, SPACE
from tests.composition.pairs import Constraint, Space, cover, pairs_of, place_lightly

SMALL = Space(
    {"a": ("0", "1", "2"), "b": ("0", "1"), "c": ("0", "1"), "d": ("0", "1")},
    [
        Constraint(("a", "b"), lambda a, b: (a, b) != ("2", "1"), "said for the test"),
        Constraint(("b", "c", "d"), lambda b, c, d: b == "1" or c == d, "with b 0, c is d"),
    ],
)


def rows_by_enumeration(space, constraints):
    """Every whole row that breaks no constraint, without the code that is tested."""
    for levels in product(*space.factors.values()):
        row = dict(zip(space.factors, levels, strict=True))
        if all(one.allows(**{name: row[name] for name in one.factors}) for one in constraints):
            yield row


SMALL_CONSTRAINTS = (
    Constraint(("a", "b"), lambda a, b: (a, b) != ("2", "1"), ""),
    Constraint(("b", "c", "d"), lambda b, c, d: b == "1" or c == d, ""),
)


def test_allowed_pairs_are_those_of_all_rows() -> None:
    # (a 2) forces (b 0), and that c is d: a pair may be forbidden by two constraints together.
    by_hand = {pair for row in rows_by_enumeration(SMALL, SMALL_CONSTRAINTS) for pair in pairs_of(row)}
    assert SMALL.allowed_pairs() == by_hand
    assert len(by_hand) < len(list(SMALL.pairs()))


@pytest.mark.parametrize("seed", range(5))
def test_a_small_cover(seed: int) -> None:
    rows = cover(SMALL, seed=seed)
    assert {pair for row in rows for pair in pairs_of(row)} == SMALL.allowed_pairs()
    allowed = list(rows_by_enumeration(SMALL, SMALL_CONSTRAINTS))
    assert all(row in allowed for row in rows)
    assert len(rows) < len(allowed)


def test_the_same_seed_gives_the_same_cover() -> None:
    assert cover(SMALL, seed=3) == cover(SMALL, seed=3)


@pytest.mark.parametrize("seed", range(5))
def test_an_expensive_level_is_placed_where_it_costs_least(seed: int) -> None:
    def cost(rows: list[dict[str, str]]) -> int:
        return sum(10 if row["a"] == "1" else 1 for row in rows if row["c"] == "1")

    rows = cover(SMALL, seed=seed)
    placed = place_lightly(SMALL, rows, "c", "1", lambda row: 10 if row["a"] == "1" else 1)
    assert {pair for row in placed for pair in pairs_of(row)} == SMALL.allowed_pairs()
    assert all(row in list(rows_by_enumeration(SMALL, SMALL_CONSTRAINTS)) for row in placed)
    assert cost(placed) <= cost(rows)


def test_the_matrix_has_bf16_where_it_costs_less_than_the_cover_put_it() -> None:
    counts = [
        sum(Combination(0, row).weight for row in rows if row["dtype"] == "bf16")
        for rows in (cover(SPACE, seed=COVER_SEED), [one.row for one in combinations_of_cover()])
    ]
    assert counts[1] < counts[0] / 1.5


def met_by_the_matrix() -> set[frozenset[tuple[str, str]]]:
    """Counted here, pair by pair."""
    return {frozenset(pair) for one in combinations_of_cover() for pair in combinations(one.row.items(), 2)}


def test_the_matrix_holds_every_allowed_pair() -> None:
    assert met_by_the_matrix() == SPACE.allowed_pairs()
    assert len(combinations_of_cover()) >= 40


def test_no_combination_breaks_a_constraint() -> None:
    for one in combinations_of_cover():
        assert set(one.row) == set(FACTORS)
        for constraint in CONSTRAINTS:
            assert constraint.allows(**{name: one.row[name] for name in constraint.factors}), constraint.why


#: Pairs that no row can hold. Whoever adds one has to write it here too: a constraint must not eat pairs in silence.
FORBIDDEN = {
    *((("cp", "8"), other) for other in (("tensor", "2"), ("pipeline", "1F1B"), ("pipeline", "interleaved"))),
    (("cp", "8"), ("data", "2")),
    (("batch", "single"), ("pipeline", "interleaved")),
    (("mtp", "on"), ("positions", "learned")),
    (("mtp", "on"), ("documents", "masked")),
    (("mtp", "on"), ("tiles", "on")),
    *((("optimizer", "bf16-gradients"), other) for other in (("dtype", "fp32"), ("tiles", "on"))),
    *((("host", host), ("recompute", recompute)) for host in ("inputs", "all") for recompute in ("none", "selective")),
    *((("host", "all"), ("recompute", recompute)) for recompute in ("uniform", "block")),
    *((("attention", "mla"), ("heads", heads)) for heads in ("gqa", "mqa")),
    *(
        (("cp", "2"), ("scheme", scheme))
        for scheme in ("wallfacer", "double-ring", "burst", "usp", "loongtrain", "mesh")
    ),
}


def test_only_these_pairs_are_left_out() -> None:
    assert set(SPACE.pairs()) - SPACE.allowed_pairs() == set(map(frozenset, FORBIDDEN))


def test_flags_of_the_plugin_belong_to_a_level() -> None:
    assert all(level in FLAGS[factor] for factor, levels in OURS.items() for level in levels)
