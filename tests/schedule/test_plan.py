import pytest

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan


def test_published_order_needs_equal_teams() -> None:
    with pytest.raises(OptionError) as error:
        Plan(Grid(team=2, kv_team=1, ring=2), "wallfacer", "paper", "q")
    assert str(error.value) == "kv_team_size=1: must be the team size 2: the published scheme has team = kv_team"


@pytest.mark.parametrize(("order", "asked", "built"), [("native", "q", "kv"), ("paper", "kv", "q")])
def test_payload_that_is_not_built_is_refused(order: str, asked: str, built: str) -> None:
    with pytest.raises(OptionError) as error:
        Plan(Grid(ring=4), "some-scheme", order, asked)
    allowed = f"{built} or auto with scheme some-scheme; the other payload is not built yet"
    assert str(error.value) == f"backward={asked}: must be {allowed}"


def test_plans_of_equal_choices_are_equal() -> None:
    assert Plan(Grid(team=2, ring=2)) == Plan(Grid(team=2, ring=2))
    assert Plan(Grid(team=2, ring=2)) != Plan(Grid(team=2, kv_team=2))
