"""Records of ranks in, lines out."""

from __future__ import annotations

import pytest

from megatron_wallfacer.engine.agreement.compare import Record, Verdict, compare, ranks_text

SAME = {"--wallfacer-head-groups": "1", "--bf16": "", "--window-size": "100,0", "--load": None}


def records(ranks: int, *others: tuple[int, Record], settings: dict = SAME) -> dict[int, Record]:
    """The same record on all ranks but some."""
    return dict.fromkeys(range(ranks), Record(settings)) | dict(others)


def test_equal_records_agree() -> None:
    assert compare(records(4)) == Verdict()
    # Read from other texts, but equal.
    assert compare({rank: Record(dict(SAME)) for rank in range(4)}) == Verdict()


@pytest.mark.parametrize("rank", [0, 2, 3])
@pytest.mark.parametrize(
    ("change", "on_one", "on_others"),
    [
        ({"--wallfacer-head-groups": "2"}, "--wallfacer-head-groups 2", "1"),
        ({"--window-size": "200,0"}, "--window-size 200,0", "100,0"),
        ({"--bf16": None}, "no --bf16", "it"),
        ({"--load": "PATH"}, "--load PATH", "none"),
        ({"--new": "1"}, "--new 1", "none"),
    ],
)
def test_a_rank_with_another_value_is_named(rank: int, change: dict, on_one: str, on_others: str) -> None:
    verdict = compare(records(4, (rank, Record(SAME | change))))
    others = ranks_text(set(range(4)) - {rank})
    assert verdict.errors == (f"rank {rank} has {on_one}, {others} have {on_others}",)


def test_each_setting_has_a_line_and_each_value_its_ranks() -> None:
    verdict = compare(
        records(6, (1, Record(SAME | {"--window-size": "1,0", "--bf16": None})), (4, Record(SAME | {"--bf16": "x"})))
    )
    assert verdict.errors == (
        "rank 4 has --bf16 x, rank 1 has none, ranks 0, 2, 3, 5 have it",
        "rank 1 has --window-size 1,0, ranks 0, 2-5 have 100,0",
    )


def test_of_two_halves_rank_0_has_the_rule() -> None:
    verdict = compare(dict.fromkeys((0, 2), Record({"--x": "a"})) | dict.fromkeys((1, 3), Record({"--x": "b"})))
    assert verdict.errors == ("ranks 1, 3 have --x b, ranks 0, 2 have a",)


def test_what_follows_from_settings_is_not_reported_with_them() -> None:
    plain = Record(SAME, {"plan": "ring"})
    assert compare({0: plain, 1: Record(SAME, {"plan": "mesh"})}).errors == ("rank 1 has plan mesh, rank 0 has ring",)
    both = compare({0: plain, 1: Record(SAME | {"--bf16": None}, {"plan": "mesh"})})
    assert both.errors == ("rank 1 has no --bf16, rank 0 has it",)


def test_labels_warn() -> None:
    verdict = compare({0: Record(SAME, labels={"torch": "2.14"}), 1: Record(SAME, labels={"torch": "2.14+x"})})
    assert verdict == Verdict((), ("rank 1 has torch 2.14+x, rank 0 has 2.14",))


def test_ranks_without_the_plugin_may_differ_among_themselves() -> None:
    lax = {rank: Record({"--lr": str(rank)}, strict=False) for rank in range(2)}
    assert compare(lax) == Verdict()
    assert len(compare(lax | {2: Record({"--lr": "0"})}).errors) == 1


def test_long_values_are_cut() -> None:
    (line,) = compare({0: Record({"--x": "a" * 500}), 1: Record({"--x": "b" * 500})}).errors
    assert len(line) < 300


def test_texts_give_the_same_back() -> None:
    record = Record(SAME, {"plan": "ring"}, {"torch": None}, strict=False)
    assert Record.from_text(record.to_text()) == record
    verdict = Verdict(("a",), ("b", "c"))
    assert Verdict.from_text(verdict.to_text()) == verdict


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([2], "rank 2"), ([3, 0, 1], "ranks 0, 1, 3"), (range(512), "ranks 0-511"), ([0, 1, 2, 4, 5], "ranks 0-2, 4, 5")],
)
def test_ranks_in_words(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text
