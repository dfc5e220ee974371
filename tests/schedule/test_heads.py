import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.heads import check_heads, head_groups, slice_heads
from megatron_wallfacer.schedule.plan import Plan


@st.composite
def heads(draw: st.DrawFn) -> tuple[int, int, int]:
    """(U, query heads, kv heads) that the head axis can divide."""
    size, shared = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    kv_heads = draw(st.sampled_from([size * draw(st.integers(1, 4)), *(d for d in range(1, size) if size % d == 0)]))
    q_heads = kv_heads * shared * (size if kv_heads % size else 1)
    return size, q_heads, kv_heads


@given(heads(), st.integers(1, 8))
def test_head_slices_share_out_the_query_heads(case: tuple[int, int, int], wanted: int) -> None:
    size, q_heads, kv_heads = case
    head_slices = size * head_groups(Plan(Grid(head=size), head_groups=wanted), q_heads, kv_heads)
    found = [slice_heads(head_slice, head_slices, q_heads, kv_heads)[0] for head_slice in range(head_slices)]
    assert [head for head_slice in found for head in head_slice] == list(range(q_heads))


@given(heads(), st.integers(1, 8))
def test_head_slice_has_the_kv_heads_of_its_query_heads(case: tuple[int, int, int], wanted: int) -> None:
    size, q_heads, kv_heads = case
    head_slices = size * head_groups(Plan(Grid(head=size), head_groups=wanted), q_heads, kv_heads)
    for head_slice in range(head_slices):
        queries, keys = slice_heads(head_slice, head_slices, q_heads, kv_heads)
        assert set(keys) == {head * kv_heads // q_heads for head in queries}
        assert len(queries) % len(keys) == 0


@given(heads(), st.integers(1, 8))
def test_groups_are_as_wanted_or_fewer_and_never_share_a_kv_head(case: tuple[int, int, int], wanted: int) -> None:
    size, q_heads, kv_heads = case
    plan = Plan(Grid(head=size), head_groups=wanted)
    groups = head_groups(plan, q_heads, kv_heads)
    possible = [g for g in range(1, wanted + 1) if q_heads % (size * g) == 0 and kv_heads % (size * g) == 0]
    assert groups == max(possible, default=1)
    for u in range(size if groups > 1 else 0):
        mine = [slice_heads(u * groups + group, size * groups, q_heads, kv_heads)[1] for group in range(groups)]
        assert len({head for keys in mine for head in keys}) == sum(map(len, mine))


@given(heads())
def test_heads_that_divide_are_accepted(case: tuple[int, int, int]) -> None:
    size, q_heads, kv_heads = case
    check_heads(Plan(Grid(head=size)), q_heads, kv_heads)


@pytest.mark.parametrize(
    ("size", "q_heads", "kv_heads", "fitting"),
    [(3, 8, 8, "1, 2, 4, 8"), (16, 8, 2, "1, 2, 4, 8"), (4, 12, 6, "1, 2, 3, 6, 12")],
)
def test_heads_that_do_not_divide_are_rejected(size: int, q_heads: int, kv_heads: int, fitting: str) -> None:
    with pytest.raises(OptionError) as error:
        check_heads(Plan(Grid(head=size)), q_heads, kv_heads)
    allowed = f"one of {fitting} for {q_heads} query and {kv_heads} kv heads"
    assert str(error.value) == f"head_size={size}: must be {allowed}"
