"""Amounts over shared resources."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_wallfacer.planning.fluid import FlowGroup, Fluid, set_fair_rates


def group(flows: int, *keys: str, limit: float | None = None, weight: float = 1.0) -> FlowGroup:
    return FlowGroup(tuple((key, weight) for key in keys), limit, ends=[(1.0, n, print) for n in range(flows)])


def test_unused_capacity_goes_to_flows_that_can_use_it() -> None:
    """Two on a slow link; a third that shares a fast link with one of them gets all the rest of it."""
    both, slow, fast = group(1, "a", "b"), group(1, "a"), group(1, "b")
    set_fair_rates([both, slow, fast], {"a": 2.0, "b": 10.0})
    assert (both.rate, slow.rate, fast.rate) == (1.0, 1.0, 9.0)


def test_a_limit_of_its_own_leaves_more_to_the_others() -> None:
    limited, free = group(1, "a", limit=1.0), group(2, "a")
    set_fair_rates([limited, free], {"a": 5.0})
    assert (limited.rate, free.rate) == (1.0, 2.0)


def test_weights_are_uses_of_a_unit_of_rate() -> None:
    heavy = group(1, "a", weight=4.0)
    set_fair_rates([heavy], {"a": 2.0})
    assert heavy.rate == 0.5


@given(st.lists(st.tuples(st.integers(1, 4), st.sets(st.sampled_from("abc"), min_size=1)), min_size=1, max_size=6))
def test_no_resource_is_overfull_and_a_full_one_limits_each_flow(wanted: list[tuple[int, set[str]]]) -> None:
    capacity = {"a": 1.0, "b": 3.0, "c": 7.0}
    groups = [group(flows, *sorted(keys)) for flows, keys in wanted]
    set_fair_rates(groups, capacity)
    load = {key: sum(g.rate * len(g.ends) for g in groups if (key, 1.0) in g.uses) for key in capacity}
    assert all(load[key] <= capacity[key] * (1 + 1e-6) for key in capacity)
    for one in groups:
        assert any(load[key] >= capacity[key] * (1 - 1e-6) for key, _ in one.uses)


def test_flows_end_when_their_amount_has_passed() -> None:
    fluid, ended = Fluid({"a": 2.0}), []
    fluid.add(2.0, (("a", 1.0),), lambda: ended.append("first"))
    assert fluid.next_end_s() == 1.0
    fluid.advance(0.5)
    fluid.add(3.0, (("a", 1.0),), lambda: ended.append("second"))
    times = []
    while (left := fluid.next_end_s()) is not None:
        times.append(left)
        for on_end in fluid.advance(left):
            on_end()
    # One unit of the first is left, at half the rate; then two of the second at the full rate.
    assert times == pytest.approx([1.0, 1.0])
    assert ended == ["first", "second"]


def test_what_nothing_limits_ends_at_once() -> None:
    fluid = Fluid({})
    fluid.add(5.0, (("unlimited", 1.0),), list)
    assert fluid.next_end_s() == 0.0
    assert len(fluid.advance(0.0)) == 1


def test_the_part_in_use_is_that_of_all_who_use_it() -> None:
    fluid = Fluid({"cores": 4.0, "link": 2.0})
    assert fluid.used("cores") == 0
    fluid.add(10.0, (("cores", 1.0),), lambda: None, limit=1.0)
    assert fluid.used("cores") == pytest.approx(0.25)
    fluid.add(10.0, (("link", 1.0), ("cores", 0.5)), lambda: None)
    assert fluid.used("cores") == pytest.approx(0.5)
    fluid.add(10.0, (("cores", 1.0),), lambda: None)
    assert fluid.used("cores") == pytest.approx(1.0)
