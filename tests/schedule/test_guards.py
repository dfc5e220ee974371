"""The proof can fail: each schedule here is broken on purpose, and the check that should notice does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.moves import Gather, Hop
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import Schedule, Step
from megatron_wallfacer.schedule.tiles import Tile, tiles
from tests.schedule.cases import published
from tests.schedule.machine import check_play
from tests.schedule.proof import (
    Broken,
    Programs,
    check_arrivals,
    check_balance,
    check_coverage,
    check_gradient_path,
    check_moves,
    check_step,
    check_turn,
    chunks_of,
)

TEAM_RING = Plan(Grid(team=2, kv_team=1, ring=4))
PAPER = published(8, 2)


def programs(plan: Plan = TEAM_RING, *, backward: bool = False) -> Programs:
    return Programs(plan, backward=backward, causal=True)


def change_step(broken: Programs, rank: int, index: int, change: Callable[[Step], Step]) -> None:
    steps = list(broken[rank].steps)
    steps[index] = change(steps[index])
    broken[rank] = replace(broken[rank], steps=tuple(steps))


def change_all(broken: Programs, change: Callable[[Schedule], Schedule]) -> None:
    for rank in broken.ranks:
        broken[rank] = change(broken[rank])


def without_permutation(schedule: Schedule) -> Schedule:
    """No initial hop; every step names the block that then really is at hand."""
    size = 8
    grid = PAPER.grid
    here = grid.coordinates(schedule.rank)
    own_ring = [grid.rank({**here, "ring": (here["ring"] - step) % grid.ring}) for step in range(grid.ring)]
    blocks = [grid.neighbours(member, "team") for member in own_ring]
    return replace(
        schedule,
        prologue=tuple(move for move in schedule.prologue if not isinstance(move, Hop)),
        steps=tuple(
            replace(
                step,
                kv_ranks=block,
                tiles=tiles(chunks_of(step.q_ranks, size), chunks_of(block, size), causal=True),
            )
            for step, block in zip(schedule.steps, blocks, strict=True)
        ),
    )


# --- tiles ---


@pytest.fixture
def dropped_tile() -> Programs:
    broken = programs()
    change_step(broken, 5, 2, lambda step: replace(step, tiles=step.tiles[:-1]))
    return broken


@pytest.fixture
def flipped_flag() -> Programs:
    """The square causal tile of rank 0's first step as a full one."""
    broken = programs()
    change_step(broken, 0, 0, lambda step: replace(step, tiles=(replace(step.tiles[0], causal=False), *step.tiles[1:])))
    return broken


def test_dropped_tile_fails_coverage(dropped_tile: Programs) -> None:
    with pytest.raises(Broken, match="has not seen exactly the keys"):
        check_coverage(dropped_tile)


def test_dropped_tile_fails_its_step(dropped_tile: Programs) -> None:
    with pytest.raises(Broken, match="does not see the keys that it must"):
        check_step(dropped_tile[5].steps[2], 8, causal=True)


def test_dropped_tile_fails_balance(dropped_tile: Programs) -> None:
    with pytest.raises(Broken, match="steps of work"):
        check_balance(dropped_tile, dropped_tile.ranks)


def test_dropped_tile_leaves_a_sum_incomplete(dropped_tile: Programs) -> None:
    with pytest.raises(Broken, match="the sum is not complete"):
        check_play(dropped_tile)


def test_flipped_causal_flag_fails_coverage(flipped_flag: Programs) -> None:
    with pytest.raises(Broken, match="has not seen exactly the keys"):
        check_coverage(flipped_flag)


def test_flipped_causal_flag_fails_its_step(flipped_flag: Programs) -> None:
    with pytest.raises(Broken, match="does not see the keys that it must"):
        check_step(flipped_flag[0].steps[0], 8, causal=True)


def test_full_tile_marked_causal_fails_coverage() -> None:
    broken = programs(Plan(Grid(ring=8)))
    change_step(broken, 3, 1, lambda step: replace(step, tiles=(Tile((0, 2), (0, 2), causal=True),)))
    with pytest.raises(Broken, match="has not seen exactly the keys"):
        check_coverage(broken)


def test_tile_given_twice_fails_its_step() -> None:
    step = programs()[0].steps[1]
    with pytest.raises(Broken, match="meets a key chunk twice in one step"):
        check_step(replace(step, tiles=step.tiles * 2), 8, causal=True)


def test_tile_outside_its_block_fails_its_step() -> None:
    step = programs()[0].steps[1]
    with pytest.raises(Broken, match="outside its block"):
        check_step(replace(step, tiles=(Tile((0, 9), (0, 1)),)), 8, causal=True)


def test_oblong_causal_tile_fails_its_step() -> None:
    step = programs()[0].steps[1]
    with pytest.raises(Broken, match="not square"):
        check_step(replace(step, tiles=(Tile((0, 2), (0, 1), causal=True),)), 8, causal=True)


# --- blocks ---


@pytest.fixture
def swapped_keys() -> Programs:
    """Rank 2 names the keys of step 2 at step 1 and those of step 1 at step 2, with the tiles that go with them."""
    broken = programs()
    first, second = broken[2].steps[1:3]
    change_step(broken, 2, 1, lambda step: replace(step, kv_ranks=second.kv_ranks, tiles=second.tiles))
    change_step(broken, 2, 2, lambda step: replace(step, kv_ranks=first.kv_ranks, tiles=first.tiles))
    return broken


def test_swapped_keys_still_cover_everything(swapped_keys: Programs) -> None:
    check_coverage(swapped_keys)


def test_swapped_keys_are_not_those_that_arrive(swapped_keys: Programs) -> None:
    with pytest.raises(Broken, match="at step 1, which names"):
        check_arrivals(swapped_keys, 2)


def test_swapped_keys_are_not_at_hand(swapped_keys: Programs) -> None:
    with pytest.raises(Broken, match="at hand at step 1, which names"):
        check_play(swapped_keys)


def test_keys_met_twice_fail_the_turn() -> None:
    broken = programs()
    change_step(broken, 2, 1, lambda step: replace(step, kv_ranks=broken[2].steps[0].kv_ranks))
    with pytest.raises(Broken, match="twice"):
        check_turn(broken, 2)


def test_keys_never_met_fail_the_turn() -> None:
    broken = programs()
    change_all(broken, lambda schedule: replace(schedule, steps=schedule.steps[:-1]))
    with pytest.raises(Broken, match="never meets the shards"):
        check_turn(broken, 2)


def test_queries_of_another_team_fail_the_turn() -> None:
    broken = programs()
    change_step(broken, 3, 1, lambda step: replace(step, q_ranks=(4, 5)))
    with pytest.raises(Broken, match="should share a block"):
        check_turn(broken, 2)


def test_identity_for_a_permutation_fails_coverage() -> None:
    broken = programs(PAPER)
    change_all(broken, without_permutation)
    for rank in broken.ranks:
        check_arrivals(broken, rank)
        check_moves(broken, rank)
    with pytest.raises(Broken, match="computes again"):
        check_coverage(broken)
    with pytest.raises(Broken, match="twice"):
        check_turn(broken, 0)
    with pytest.raises(Broken, match="counted twice"):
        check_play(broken)


def test_left_out_permutation_is_not_what_the_first_step_names() -> None:
    broken = programs(PAPER)
    change_all(broken, lambda schedule: replace(schedule, prologue=without_permutation(schedule).prologue))
    with pytest.raises(Broken, match="at step 0, which names"):
        check_arrivals(broken, 1)


# --- moves ---


@pytest.fixture
def wrong_peer() -> Programs:
    """Rank 2 sends its second hop to rank 6 instead of 4."""
    broken = programs()
    change_step(broken, 2, 1, lambda step: replace(step, hop=replace(step.hop, send_to=6)))
    return broken


@pytest.mark.parametrize("rank", [2, 4])
def test_hop_to_a_wrong_peer_has_no_counterpart(wrong_peer: Programs, rank: int) -> None:
    with pytest.raises(Broken, match="which expects"):
        check_moves(wrong_peer, rank)


def test_hop_to_a_wrong_peer_gets_the_ranks_stuck(wrong_peer: Programs) -> None:
    with pytest.raises(Broken, match="stuck"):
        check_play(wrong_peer)


def test_hop_of_another_payload_has_no_counterpart() -> None:
    broken = programs()
    change_step(broken, 2, 1, lambda step: replace(step, hop=replace(step.hop, payload=("v", "k"))))
    with pytest.raises(Broken, match="which expects"):
        check_moves(broken, 2)
    with pytest.raises(Broken, match="stuck"):
        check_play(broken)


def test_hop_of_another_size_has_no_counterpart() -> None:
    broken = programs()
    change_step(broken, 2, 1, lambda step: replace(step, hop=replace(step.hop, shards=2)))
    with pytest.raises(Broken, match="which expects"):
        check_moves(broken, 4)


def test_missing_hop_gets_the_ranks_stuck() -> None:
    broken = programs()
    change_step(broken, 2, 1, lambda step: replace(step, hop=None))
    with pytest.raises(Broken, match=r"stuck|names"):
        check_play(broken)


def test_needless_hop_in_the_last_step_is_found() -> None:
    broken = programs()
    change_all(broken, lambda s: replace(s, steps=(*s.steps[:-1], replace(s.steps[-1], hop=s.steps[0].hop))))
    with pytest.raises(Broken, match="which nobody needs"):
        check_arrivals(broken, 0)


def test_gather_of_other_ranks_is_found() -> None:
    broken = programs()
    broken[0] = replace(broken[0], prologue=(Gather("team", ("q",), (0, 2)),))
    with pytest.raises(Broken, match=r"outside its group|does not do the same"):
        check_moves(broken, 0)
    with pytest.raises(Broken, match="stuck"):
        check_play(broken)


def test_hop_that_leaves_its_group_is_found() -> None:
    broken = programs()
    change_step(broken, 2, 0, lambda step: replace(step, hop=replace(step.hop, send_to=3)))
    change_step(broken, 3, 0, lambda step: replace(step, hop=replace(step.hop, recv_from=2)))
    change_step(broken, 1, 0, lambda step: replace(step, hop=replace(step.hop, send_to=4)))
    change_step(broken, 4, 0, lambda step: replace(step, hop=replace(step.hop, recv_from=1)))
    with pytest.raises(Broken, match="outside its group"):
        check_moves(broken, 2)


def test_collectives_in_another_order_get_the_ranks_stuck() -> None:
    broken = programs(Plan(Grid(team=2, kv_team=2)), backward=True)
    broken[0] = replace(broken[0], prologue=broken[0].prologue[::-1])
    check_play(broken)  # Over different groups the order is free where nobody waits between.
    broken = programs(PAPER)
    broken[0] = replace(broken[0], prologue=(broken[0].prologue[1], broken[0].prologue[0], *broken[0].prologue[2:]))
    with pytest.raises(Broken, match="stuck"):
        check_play(broken)
    with pytest.raises(Broken, match="does not do the same"):
        check_moves(broken, 0)


def test_hops_of_a_ring_in_another_order_get_the_ranks_stuck() -> None:
    broken = programs(backward=True)
    change_step(broken, 2, 2, lambda step: replace(step, hop=step.grad_hop, grad_hop=step.hop))
    with pytest.raises(Broken, match=r"stuck|names"):
        check_play(broken)
    with pytest.raises(Broken, match="which expects"):
        check_moves(broken, 2)


# --- gradients ---


@pytest.mark.parametrize("plan", [TEAM_RING, PAPER])
def test_gradient_sent_home_to_another_is_found(plan: Plan) -> None:
    broken = programs(plan, backward=True)
    exits = {rank: next(move for move in broken[rank].epilogue if isinstance(move, Hop)) for rank in (2, 5)}
    for rank, other in ((2, 5), (5, 2)):
        wrong = replace(exits[rank], send_to=exits[other].send_to)
        broken[rank] = replace(
            broken[rank], epilogue=tuple(wrong if move == exits[rank] else move for move in broken[rank].epilogue)
        )
    with pytest.raises(Broken, match="ends on"):
        check_gradient_path(broken, exits[2].send_to)
    with pytest.raises(Broken, match="stuck"):
        check_play(broken)


@pytest.mark.parametrize("plan", [TEAM_RING, PAPER])
def test_gradient_that_is_left_behind_is_found(plan: Plan) -> None:
    broken = programs(plan, backward=True)
    last = len(broken[0].steps) - 1
    for rank in broken.ranks:
        change_step(broken, rank, last, lambda step: replace(step, grad_hop=None))
    with pytest.raises(Broken, match="does not go from rank"):
        check_gradient_path(broken, 0)
    with pytest.raises(Broken, match="the sum is not complete"):
        check_play(broken)


def test_gradient_that_leaves_home_too_early_is_found() -> None:
    broken = programs(backward=True)
    for rank in broken.ranks:
        change_step(broken, rank, 1, lambda step: replace(step, grad_hop=replace(step.hop, payload=("dk", "dv"))))
    with pytest.raises(Broken, match="leaves home before step 2"):
        check_gradient_path(broken, 0)
    with pytest.raises(Broken, match="does not exist"):
        check_play(broken)


def test_gradient_that_never_comes_home_is_found() -> None:
    broken = programs(backward=True)
    change_all(broken, lambda s: replace(s, epilogue=tuple(m for m in s.epilogue if not isinstance(m, Hop))))
    with pytest.raises(Broken, match="ends on"):
        check_gradient_path(broken, 0)
    with pytest.raises(Broken, match="the sum is not complete"):
        check_play(broken)


def test_gradient_kept_at_the_wrong_rank_is_found() -> None:
    broken = programs(PAPER, backward=True)
    change_all(broken, lambda schedule: replace(schedule, keeps_first=True))
    with pytest.raises(Broken, match="not its own"):
        check_gradient_path(broken, 2)
    with pytest.raises(Broken):
        check_play(broken)
