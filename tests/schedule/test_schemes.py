from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import RINGS_ADJACENT, TEAMS_ADJACENT, Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import (
    NOT_BUILT_YET,
    SCHEMES,
    divisors,
    make_plan,
    published_words,
    team_ring_words,
)
from megatron_wallfacer.schedule.volume import Shape, words
from tests.schedule.cases import published

HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (64, 1)]


def counted(plan: Plan, q_heads: int, kv_heads: int) -> float:
    """Words of the busiest rank, forward and backward, counted from its schedules, in units of n*H."""
    shape = Shape(1, q_heads, kv_heads, head_dim=1)
    ranks = range(plan.grid.cp_size) if plan.kv_order == "paper" else [0]
    return (
        max(words(forward_schedule(plan, rank), shape) + words(backward_schedule(plan, rank), shape) for rank in ranks)
        / shape.unit
    )


# --- names ---


@pytest.mark.parametrize(
    ("scheme", "options", "axes"),
    [
        ("ring", {}, (1, 1, 16)),
        ("all-gather", {}, (1, 16, 1)),
        ("team-ring", {"team_size": 2}, (2, 1, 8)),
        ("team-ring", {"team_size": 2, "kv_team_size": 4}, (2, 4, 2)),
        ("wallfacer", {"team_size": 2}, (2, 2, 4)),
        ("wallfacer", {"team_size": 4}, (4, 4, 1)),
        ("wallfacer", {"team_size": 2, "kv_team_size": 2}, (2, 2, 4)),
        ("ring", {"team_size": 1, "kv_team_size": 1}, (1, 1, 16)),
        ("all-gather", {"team_size": 1, "kv_team_size": 16}, (1, 16, 1)),
        ("auto", {"team_size": 8}, (8, 1, 2)),
    ],
)
def test_axes_of_a_scheme(scheme: str, options: dict[str, int], axes: tuple[int, int, int]) -> None:
    assert make_plan(scheme, 16, **options).grid == Grid(*axes)


def test_wallfacer_is_the_published_arrangement() -> None:
    assert make_plan("wallfacer", 32, team_size=2) == published(32, 2)


@pytest.mark.parametrize("scheme", ["ring", "all-gather", "team-ring", "auto"])
def test_other_schemes_are_native_with_keys_riding(scheme: str) -> None:
    plan = make_plan(scheme, 16)
    assert (plan.kv_order, plan.backward) == ("native", "kv")


@pytest.mark.parametrize(
    ("placement", "order"),
    [
        (None, TEAMS_ADJACENT),
        ("teams-adjacent", TEAMS_ADJACENT),
        ("rings-adjacent", RINGS_ADJACENT),
        ("kv_team,ring,team", ("kv_team", "ring", "team")),
        (("kv_team", "ring", "team"), ("kv_team", "ring", "team")),
    ],
)
def test_placement_by_name_or_by_order(placement: object, order: tuple[str, ...]) -> None:
    assert make_plan("ring", 4, placement=placement).grid.placement == order


@pytest.mark.parametrize(("scheme", "backward"), [("ring", "kv"), ("team-ring", "kv"), ("wallfacer", "q")])
def test_built_payload_may_be_asked_for_by_name(scheme: str, backward: str) -> None:
    assert make_plan(scheme, 16, backward=backward) == make_plan(scheme, 16)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_works_on_one_rank(scheme: str) -> None:
    assert make_plan(scheme, 1).grid == Grid(1, 1, 1)


# --- the choice of C ---


@settings(max_examples=60)
@given(st.integers(1, 256), st.sampled_from(HEADS))
def test_auto_moves_the_fewest_words_of_all_team_rings(cp_size: int, heads: tuple[int, int]) -> None:
    chosen = make_plan("auto", cp_size, kappa=heads[1] / heads[0])
    all_team_rings = [Plan(Grid(team=team, ring=cp_size // team)) for team in divisors(cp_size)]
    assert counted(chosen, *heads) == min(counted(plan, *heads) for plan in all_team_rings)


@settings(max_examples=40)
@given(st.integers(1, 16), st.sampled_from([2, 3, 4]), st.sampled_from(HEADS))
def test_auto_chooses_beside_a_given_kv_team(rest: int, kv_team: int, heads: tuple[int, int]) -> None:
    cp_size = rest * kv_team
    chosen = make_plan("auto", cp_size, kv_team_size=kv_team, kappa=heads[1] / heads[0])
    others = [Plan(Grid(team, kv_team, rest // team)) for team in divisors(rest)]
    assert chosen.grid.kv_team == kv_team
    assert counted(chosen, *heads) == min(counted(plan, *heads) for plan in others)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8, 9, 12, 16, 18, 32, 36, 64, 72])
def test_wallfacer_chooses_the_fewest_words_of_all_its_teams(cp_size: int, heads: tuple[int, int]) -> None:
    chosen = make_plan("wallfacer", cp_size, kappa=heads[1] / heads[0])
    others = [published(cp_size, team) for team in divisors(cp_size) if cp_size % team**2 == 0]
    assert counted(chosen, *heads) == min(counted(plan, *heads) for plan in others)


@settings(max_examples=60)
@given(st.integers(1, 256), st.sampled_from(HEADS), st.data())
def test_team_ring_words_are_those_counted(cp_size: int, heads: tuple[int, int], data: st.DataObject) -> None:
    team = data.draw(st.sampled_from(divisors(cp_size)))
    plan = Plan(Grid(team=team, ring=cp_size // team))
    assert team_ring_words(cp_size, team, heads[1] / heads[0]) == pytest.approx(counted(plan, *heads))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("cp_size", "team"), [(1, 1), (2, 1), (8, 1), (4, 2), (8, 2), (12, 2), (16, 4), (36, 3), (64, 8)]
)
def test_published_words_are_those_counted(cp_size: int, team: int, heads: tuple[int, int]) -> None:
    expected = counted(published(cp_size, team), *heads)
    assert published_words(cp_size, team, heads[1] / heads[0]) == pytest.approx(expected)


@given(st.integers(1, 100_000))
def test_divisors(number: int) -> None:
    assert divisors(number) == tuple(d for d in range(1, number + 1) if number % d == 0)


# --- refusals ---

_DIVISORS_OF_8 = "a divisor of cp size 8: 1, 2, 4, 8"
_NAMES = "one of auto, wallfacer, team-ring, ring, all-gather"
_ORDER = "an order of team, kv_team, ring, each once"
REFUSED = [
    ("team-ring", 0, {}, "cp_size", 0, "a positive number of ranks"),
    ("concentric", 8, {}, "scheme", "concentric", _NAMES),
    ("grid", 8, {}, "scheme", "grid", _NAMES),
    ("ring", 8, {"team_size": 2}, "team_size", 2, "1 with scheme ring"),
    ("ring", 8, {"kv_team_size": 8}, "kv_team_size", 8, "1 with scheme ring"),
    ("all-gather", 8, {"team_size": 8}, "team_size", 8, "1 with scheme all-gather"),
    ("all-gather", 8, {"kv_team_size": 4}, "kv_team_size", 4, "8 with scheme all-gather"),
    ("team-ring", 8, {"team_size": 3}, "team_size", 3, _DIVISORS_OF_8),
    ("team-ring", 8, {"team_size": 0}, "team_size", 0, _DIVISORS_OF_8),
    ("team-ring", 8, {"team_size": -2}, "team_size", -2, _DIVISORS_OF_8),
    ("team-ring", 8, {"team_size": 16}, "team_size", 16, _DIVISORS_OF_8),
    ("team-ring", 8, {"kv_team_size": 3}, "kv_team_size", 3, _DIVISORS_OF_8),
    ("auto", 8, {"kv_team_size": 0}, "kv_team_size", 0, _DIVISORS_OF_8),
    (
        "team-ring",
        8,
        {"team_size": 4, "kv_team_size": 4},
        "kv_team_size",
        4,
        "a divisor of 2: team 4 x kv_team x ring must be cp size 8",
    ),
    ("wallfacer", 8, {"team_size": 4}, "team_size", 4, "one of 1, 2: scheme wallfacer needs C^2 to divide cp size 8"),
    ("wallfacer", 8, {"team_size": 3}, "team_size", 3, "one of 1, 2: scheme wallfacer needs C^2 to divide cp size 8"),
    ("wallfacer", 8, {"team_size": 0}, "team_size", 0, "one of 1, 2: scheme wallfacer needs C^2 to divide cp size 8"),
    (
        "wallfacer",
        8,
        {"team_size": 2, "kv_team_size": 1},
        "kv_team_size",
        1,
        "2: scheme wallfacer has team = kv_team",
    ),
    ("ring", 8, {"placement": "node-first"}, "placement", "node-first", _ORDER),
    ("ring", 8, {"placement": "team,ring"}, "placement", "team,ring", _ORDER),
    ("ring", 8, {"placement": ("ring", "ring", "team")}, "placement", "ring,ring,team", _ORDER),
    ("ring", 8, {"backward": "both"}, "backward", "both", "auto, kv or q"),
    (
        "team-ring",
        8,
        {"backward": "q"},
        "backward",
        "q",
        "kv or auto with scheme team-ring; the other payload is not built yet",
    ),
    (
        "wallfacer",
        8,
        {"backward": "kv"},
        "backward",
        "kv",
        "q or auto with scheme wallfacer; the other payload is not built yet",
    ),
]


@pytest.mark.parametrize(("scheme", "cp_size", "options", "option", "value", "allowed"), REFUSED)
def test_refusal_names_option_value_and_what_is_allowed(
    scheme: str, cp_size: int, options: dict[str, object], option: str, value: object, allowed: str
) -> None:
    with pytest.raises(OptionError) as error:
        make_plan(scheme, cp_size, **options)
    assert (error.value.option, error.value.value, error.value.allowed) == (option, value, allowed)
    assert str(error.value) == f"{option}={value}: must be {allowed}"


@pytest.mark.parametrize("scheme", NOT_BUILT_YET)
def test_scheme_that_is_not_built_yet_is_refused_as_such(scheme: str) -> None:
    with pytest.raises(OptionError) as error:
        make_plan(scheme, 8)
    assert str(error.value) == f"scheme={scheme}: must be {_NAMES}; {scheme} is not built yet"
