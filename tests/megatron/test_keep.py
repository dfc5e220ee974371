"""What a kept forward pass saves, and that it is the right one that is taken up."""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.keep import Keeper, _keepers
from megatron_wallfacer.megatron.unsupported import KEEP, UNSUPPORTED
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.passes import Case, call_of, leaves
from tests.support.dense import Problem
from tests.support.pool import Pool

LONE = Case(Plan(Grid()), Problem(1))
PLANS = {
    "ring": Plan(Grid(ring_outer=4)),
    "team-ring": Plan(Grid(team=2, ring_outer=2)),
    "usp": Plan(Grid(head=2, ring_outer=2), head_groups=2),
    "wallfacer": Plan(Grid(team=2, kv_team=2), kv_order="paper", backward="pass-q"),
    "all-gather": Plan(Grid(kv_team=4)),
}


def lone_call() -> Call:
    return call_of(LONE, Transfers(connect(None, LONE.plan.grid)))


def inputs(seed: int) -> tuple[Tensor, ...]:
    return leaves(0, Problem(1, seed=seed))[:3]


def recomputed(keeper: Keeper, call: Call, qkv: tuple[Tensor, ...]) -> Tensor:
    """Attention under a checkpoint, as Megatron's: without gradients first, then again in backward."""
    return checkpoint(lambda q, k, v: keeper.attend(q, k, v, call), *qkv, use_reentrant=True)


def received_by(rank: int, case: Case, run: str) -> tuple[int, list[list[float]]]:
    """On a worker: bytes that one pass forward and backward received, and the gradients."""
    transfers = Transfers(connect(None, case.plan.grid))
    call, keeper = call_of(case, transfers), Keeper("layer 1")
    q, k, v, dout = leaves(rank, case.problem)
    attention = keeper.attend if run == "kept" else attend
    if run == "plain":
        out = attend(q, k, v, call)
    else:
        out = checkpoint(lambda q, k, v: attention(q, k, v, call), q, k, v, use_reentrant=True)
    out.backward(dout)
    transfers.groups.close()
    assert not keeper._kept
    return sum(transfers.received.values()), [x.grad.flatten().tolist() for x in (q, k, v)]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("keep_gathered_q", [False, True])
def test_a_kept_forward_receives_nothing_twice(pools: Callable[[int], Pool], name: str, keep_gathered_q: bool) -> None:
    case = Case(PLANS[name], Problem(4), keep_gathered_q)
    plain, kept, replayed = (pools(4).run(received_by, case, run) for run in ("plain", "kept", "replayed"))
    for (received, gradients), kept_by_rank, replayed_by_rank in zip(plain, kept, replayed, strict=True):
        assert kept_by_rank == (received, gradients)  # the same operations on the same numbers: bitwise
        assert replayed_by_rank[0] > received  # without the flag the same count sees the messages of forward twice


def test_micro_batches_on_their_way_find_their_own() -> None:
    call, keeper = lone_call(), Keeper("layer 1")
    batches = [inputs(seed) for seed in range(3)]
    outs = [recomputed(keeper, call, batch) for batch in batches]
    assert len(keeper._kept) == 3
    for out in outs:
        out.square().sum().backward()
    assert not keeper._kept
    for seed, batch in enumerate(batches):
        alone = inputs(seed)
        attend(*alone, call).square().sum().backward()
        for one, other in zip(batch, alone, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_a_layer_that_is_called_twice_finds_its_own_in_any_order() -> None:
    """A layer that predicts several tokens is replayed last call first."""
    call, keeper = lone_call(), Keeper("layer 1")
    first, second = inputs(0), inputs(1)
    outs = [recomputed(keeper, call, qkv) for qkv in (first, second)]
    outs[1].sum().backward()
    outs[0].sum().backward()
    alone = inputs(1)
    attend(*alone, call).sum().backward()
    torch.testing.assert_close(second[0].grad, alone[0].grad, rtol=0, atol=0)


def test_a_replay_of_something_else_is_rejected() -> None:
    call, keeper = lone_call(), Keeper("layer 7")
    with torch.no_grad():
        keeper.attend(*inputs(0), call)
    with pytest.raises(
        WallfacerError, match=r"layer 7: --wallfacer-keep-attention-output: .* none of the 1 kept forward passes"
    ):
        keeper.attend(*inputs(1), call)


def test_with_gradients_and_nothing_kept_it_is_attention() -> None:
    """As in the layers that `--recompute-method block` leaves alone."""
    call, keeper, qkv, alone = lone_call(), Keeper("layer 1"), inputs(0), inputs(0)
    keeper.attend(*qkv, call).sum().backward()
    attend(*alone, call).sum().backward()
    torch.testing.assert_close(qkv[0].grad, alone[0].grad, rtol=0, atol=0)


def test_what_nobody_came_for_stops_the_run_at_the_end_of_the_step() -> None:
    call, keeper = lone_call(), Keeper("layer 7")
    with torch.no_grad():
        keeper.attend(*inputs(0), call)
    with pytest.raises(WallfacerError, match=r"layer 7: --wallfacer-keep-attention-output: .*1 forward passes"):
        step()
    keeper._kept.clear()
    step()


def step() -> None:
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.ones(1)
    torch.optim.SGD([weight], lr=1.0).step()


def test_a_keeper_goes_with_its_layer() -> None:
    keeper = Keeper("layer 1")
    gone = weakref.ref(keeper)
    assert keeper in _keepers
    del keeper
    gc.collect()
    assert gone() is None


@contextmanager
def tensors_that_stay():
    """The tensors that come to life in the block and live after it."""
    found: list[Tensor] = []
    gc.collect()
    gc.freeze()
    try:
        yield found
        gc.collect()
        found += [thing for thing in gc.get_objects() if type(thing) is Tensor]
    finally:
        gc.unfreeze()


def what_stays(rank: int, case: Case, recompute: bool) -> list[str]:
    """On a worker: shapes of the tensors that live after a step whose inputs, outputs and gradients are gone."""
    transfers = Transfers(connect(None, case.plan.grid))
    call, keeper = call_of(case, transfers), Keeper("layer 1")
    # The first step makes the constants of the compiled passes.
    pass_by(rank, case, keeper, call, recompute)
    with tensors_that_stay() as staying:
        pass_by(rank, case, keeper, call, recompute)
    transfers.groups.close()
    return [str(tuple(x.shape)) for x in staying]


def pass_by(rank: int, case: Case, keeper: Keeper, call: Call, recompute: bool) -> None:
    q, k, v, dout = leaves(rank, case.problem)
    (recomputed(keeper, call, (q, k, v)) if recompute else attend(q, k, v, call)).backward(dout)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_nothing_of_a_call_lives_after_its_backward(pools: Callable[[int], Pool], name: str, recompute: bool) -> None:
    assert pools(4).run(what_stays, Case(PLANS[name], Problem(4)), recompute) == [[]] * 4


def what_stays_without_backward(rank: int, case: Case) -> list[str]:
    """On a worker: the same measurement of a keeper whose pass nobody takes up."""
    call, keeper = call_of(case, Transfers(connect(None, case.plan.grid))), Keeper("layer 1")
    with tensors_that_stay() as staying, torch.no_grad():
        keeper.attend(*leaves(rank, case.problem)[:3], call)
    return [str(tuple(x.shape)) for x in staying]


def test_what_stays_is_noticed(pools: Callable[[int], Pool]) -> None:
    """The measurement sees the output, lse and samples of a pass that was not taken up."""
    for staying in pools(4).run(what_stays_without_backward, Case(PLANS["ring"], Problem(4))):
        assert len(staying) >= 4


@pytest.mark.parametrize(
    ("given", "supported"),
    [
        ({}, False),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, False),
        ({"recompute_granularity": "selective"}, True),
        ({"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}, True),
        ({"recompute_granularity": "full", "recompute_modules": ["mlp"]}, True),
        ({"recompute_activations": True}, True),
        ({"wallfacer_keep_attention_output": False}, True),
    ],
)
def test_it_is_an_error_where_attention_is_not_recomputed(given: dict[str, object], supported: bool) -> None:
    plain = {"wallfacer_keep_attention_output": True, "recompute_granularity": None, "recompute_modules": None}
    (combination,) = (one for one in UNSUPPORTED if one.example == KEEP)
    found = combination.find(argparse.Namespace(**(plain | given)), [])
    assert found == (None if supported else KEEP)
