"""States of ranks in, the rank that holds the others up out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.engine.waits.explain import Seen, State, chain_line, wait_line
from megatron_wallfacer.engine.waits.progress import Label

DKV = Label.of(("dk", "dv"), (2,), "ring_outer")
WAITS = State(3, "n3", 7, 60, 12, True, DKV, 60.4, "train.py:9 (step)")


def chain(*others: State | Seen) -> str | None:
    """The chain behind :data:`WAITS`."""
    seen = {(one if isinstance(one, State) else one.state).rank: one for one in others}
    return chain_line(WAITS, lambda rank: Seen(one) if isinstance(one := seen.get(rank), State) else one)


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (DKV, "rank 3, layer 12 backward: no dK, dV from rank 2 (ring_outer) for 60 s"),
        (
            Label.of(("q", "dout", "lse", "delta"), (5, 4, 5), "team"),
            "rank 3, layer 12 backward: no Q, dO, lse, delta from ranks 5, 4 (team) for 60 s",
        ),
        (
            Label.of(("out",), (1,), "ring_inner", sends=True),
            "rank 3, layer 12 backward: O to rank 1 not received there (ring_inner) for 60 s",
        ),
        (None, "rank 3, layer 12 backward: waits for no message of attention, at train.py:9 (step)"),
    ],
)
def test_a_wait_in_one_line(label: Label | None, text: str) -> None:
    assert wait_line(replace(WAITS, label=label)) == text


def test_outside_a_model_and_before_attention() -> None:
    assert replace(WAITS, layer=None, backward=False).where == "forward"
    assert replace(WAITS, passes=0).where == "before its first call of attention"


def test_the_chain_ends_at_a_rank_that_does_not_wait() -> None:
    """It is not the direct sender."""
    two = replace(WAITS, rank=2, label=Label.of(("k",), (1,), "ring_inner"))
    one = State(1, "n1", 7, 57, 11, True, None, 0.0, "loader.py:5 (read)")
    assert chain(two, one) == (
        "rank 3 waits for rank 2 (layer 12 backward), which waits for rank 1 on n1, which waits for no message of "
        "attention: an earlier pass, layer 11 backward (pass 57, rank 3 is in pass 60), at loader.py:5 (read)"
    )


def test_the_chain_ends_at_a_silent_rank() -> None:
    two = replace(WAITS, rank=2, host="n2", label=Label.of(("k",), (1,), "ring_inner"))
    line = chain(Seen(two, 31.0))
    assert line == (
        "rank 3 waits for rank 2 on n2, which has given no sign of life for 31 s: stopped, dead or cut off; "
        "last seen in layer 12 backward, at train.py:9 (step)"
    )
    assert "has published nothing" in chain()


def test_a_circle_names_the_earliest_rank() -> None:
    two = replace(WAITS, rank=2, host="n2", passes=58, layer=10, label=Label.of(("k",), (3,), "ring_inner"))
    assert chain(two) == (
        "rank 3 waits for rank 2 (layer 10 backward), which waits for rank 3, a circle of ranks that wait for each "
        "other: the earliest is rank 2: rank 3 on n3 in pass 60 (layer 12 backward), rank 2 on n2 in pass 58 "
        "(layer 10 backward)"
    )


def test_of_several_peers_the_one_that_holds_up_is_followed() -> None:
    waits = replace(WAITS, label=Label.of(("k",), (0, 1, 2), "head"))
    fine = replace(WAITS, rank=0, label=Label.of(("k",), (1,), "head"))
    busy, silent = State(1, "n1", 1, 60, place="x"), State(2, "n2", 1, 60, place="x")
    assert "rank 1 on n1, which waits for no message" in chain_line(
        waits, [Seen(fine), Seen(busy), Seen(busy)].__getitem__
    )
    seen = [Seen(fine), Seen(busy), Seen(silent, 40)]
    assert "rank 2 on n2, which has given no sign of life" in chain_line(waits, seen.__getitem__)


def test_texts_give_the_same_back() -> None:
    for state in (WAITS, replace(WAITS, label=None)):
        assert State.from_text(state.to_text()) == state
