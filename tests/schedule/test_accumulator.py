"""Accumulators: what is written and what waits to be added, held against a count of every row."""

from __future__ import annotations

import itertools
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from megatron_wallfacer.schedule.accumulator import Accumulator, Part
from megatron_wallfacer.schedule.program import WORKSPACE, Operand
from megatron_wallfacer.schedule.rows import Range, Rows

TOKENS = 12
some_rows = st.tuples(st.integers(0, TOKENS - 1), st.integers(1, TOKENS)).filter(lambda rows: rows[0] < rows[1])


def accumulator(tokens: int = TOKENS) -> Accumulator:
    return Accumulator(Rows({}, (0,)), tokens)


def part(rows: Range, name: str = "part", first: int | None = None) -> Part:
    """Rows of a named source; row ``first`` of it comes first."""
    first = rows[0] if first is None else first

    def sources(wanted: Range) -> tuple[Operand, ...]:
        start = wanted[0] - rows[0] + first
        return (Operand(name, "input", (wanted[1] - wanted[0],), (1,), start),)

    return Part(rows, sources)


def own(rows: Range) -> tuple[Operand, ...]:
    return (Operand(WORKSPACE, "wide", (rows[1] - rows[0],), (1,), rows[0]),)


def write(total: Accumulator, rows: Range) -> list[tuple[Range, bool]]:
    """Add one part at once."""
    total.parts.append(part(rows))
    return [(some, held) for some, held, _ in total.take()]


def test_rows_are_split_where_some_have_been_written() -> None:
    total = accumulator(10)
    assert write(total, (2, 4)) == [((2, 4), False)]
    assert write(total, (6, 8)) == [((6, 8), False)]
    assert write(total, (0, 10)) == [
        ((0, 2), False),
        ((2, 4), True),
        ((4, 6), False),
        ((6, 8), True),
        ((8, 10), False),
    ]
    assert write(total, (1, 9)) == [((1, 9), True)]


def test_what_was_not_written_is_named_once() -> None:
    total = accumulator(10)
    write(total, (2, 4))
    total.parts.append(part((8, 10)))
    assert total.unwritten((0, 10)) == [(0, 2), (4, 8)]
    assert total.unwritten((0, 10)) == []
    assert [rows for rows, _, _ in total.take()] == [(8, 10)]
    assert write(total, (0, 10)) == [((0, 10), True)]


@given(st.lists(st.lists(some_rows, max_size=4), max_size=5))
def test_every_row_is_written_first_and_gets_each_of_its_parts_once(together: list[list[Range]]) -> None:
    total, held = accumulator(), [False] * TOKENS
    for writes in together:
        wanted = defaultdict(list)
        for number, rows in enumerate(writes):
            total.parts.append(part(rows, str(number), 100 * number))
            for token in range(*rows):
                wanted[token].append((str(number), 100 * number + token - rows[0]))
        got = defaultdict(list)
        for rows, known, parts in total.take():
            assert all(held[token] == known for token in range(*rows))
            for source in itertools.chain(*(one.sources(rows) for one in parts)):
                for row, token in enumerate(range(*rows)):
                    got[token].append((source.buffer, source.offset + row))
        assert got == wanted
        for token in wanted:
            held[token] = True
    left = [token for rows in total.unwritten((0, TOKENS)) for token in range(*rows)]
    assert left == [token for token in range(TOKENS) if not held[token]]


@given(st.lists(some_rows, max_size=3), st.lists(some_rows, max_size=3), some_rows, st.integers(0, 5))
def test_what_is_passed_on_arrives_once_and_the_rest_stays(
    written: list[Range], waiting: list[Range], rows: Range, first: int
) -> None:
    total, into = accumulator(), accumulator(TOKENS + 5)
    for one in written:
        write(total, one)
    for number, one in enumerate(waiting):
        total.parts.append(part(one, str(number)))
    total.unwritten(rows)
    wanted, stays = defaultdict(list), defaultdict(list)
    for token in range(TOKENS):
        held = token in range(*rows) and not any(token in range(*one) for one in waiting)
        if held or any(token in range(*one) for one in written):
            wanted[token].append(WORKSPACE)
        here = [str(number) for number, one in enumerate(waiting) if token in range(*one)]
        wanted[token] += here
        stays[token] = here
    total.hand_over(rows, into, first, own)
    arrived = {
        token - first + rows[0]: [one.buffer for part in parts for one in part.sources((token, token + 1))]
        for some, held, parts in into.take()
        for token in range(*some)
        if not held
    }
    assert arrived == {token: wanted[token] for token in range(*rows)}
    left = defaultdict(list)
    for one in total.parts:
        for token in range(*one.rows):
            (source,) = one.sources((token, token + 1))
            assert source.offset == token - waiting[int(source.buffer)][0] + waiting[int(source.buffer)][0]
            left[token].append(source.buffer)
    assert {token: left[token] for token in range(TOKENS) if token not in range(*rows) and left[token]} == {
        token: names for token, names in stays.items() if token not in range(*rows) and names
    }
