import pytest

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan


@pytest.mark.parametrize("order", ["paper", "permuted"])
def test_published_blocks_need_equal_teams(order: str) -> None:
    with pytest.raises(OptionError) as error:
        Plan(Grid(team=2, kv_team=1, ring_outer=2), "wallfacer", order)
    assert str(error.value) == f"kv_team_size=1: must be the team size 2 with kv_order {order}"


def test_both_directions_need_a_single_ring() -> None:
    with pytest.raises(OptionError) as error:
        Plan(Grid(ring_outer=2, ring_inner=4), bidirectional=True)
    allowed = "used with a single ring: ring_inner or ring_outer must be 1"
    assert str(error.value) == f"bidirectional=ring_outer 2 x ring_inner 4: must be {allowed}"


@pytest.mark.parametrize("ring", [{"ring_outer": 8}, {"ring_inner": 8}, {}])
def test_both_directions_of_a_single_ring_are_a_plan(ring: dict[str, int]) -> None:
    assert Plan(Grid(**ring), bidirectional=True).bidirectional


@pytest.mark.parametrize("groups", [0, -1])
def test_head_groups_below_one_are_rejected(groups: int) -> None:
    with pytest.raises(OptionError) as error:
        Plan(Grid(), head_groups=groups)
    assert str(error.value) == f"head_groups={groups}: must be a positive number"


def test_plans_of_equal_choices_are_equal() -> None:
    assert Plan(Grid(team=2, ring_outer=2)) == Plan(Grid(team=2, ring_outer=2))
    assert Plan(Grid(team=2, ring_outer=2)) != Plan(Grid(team=2, kv_team=2))
