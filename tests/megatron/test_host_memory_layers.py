"""Which layers are in host memory, how many, and outputs of replayed graphs there."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_wallfacer.engine.call import Call
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.flags import INPUTS, KEEP, Flags, add_arguments
from megatron_wallfacer.megatron.host_memory.attention import keep_on_host, kept_sizes
from megatron_wallfacer.megatron.host_memory.inputs import LayerInputs
from megatron_wallfacer.megatron.host_memory.kinds import recomputed_groups
from megatron_wallfacer.megatron.host_memory.share import RESERVE, RankNeeds, Wanted, auto_fraction, check_room
from megatron_wallfacer.megatron.keep import Keeper
from megatron_wallfacer.megatron.unsupported_memory import MEMORY
from megatron_wallfacer.offload.copies import DeferredCopies
from megatron_wallfacer.offload.host import HostSlots, Left, slot_bytes
from megatron_wallfacer.offload.order import Pipeline, passes_of_step
from megatron_wallfacer.offload.queue import OffloadQueue
from megatron_wallfacer.offload.slots import assign_slots, uses_of_step
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.volume import Shape
from tests.engine.test_graphed import HEAD_DIM, KV_HEADS, PLANS, Q_HEADS, TOKENS, inputs, make_call
from tests.support.pool import Pool

LAYERS = 4
SHAPE = Shape(TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM, batch=2, itemsize=8, accumulate_itemsize=8)


def queue_of(call: Call) -> OffloadQueue:
    """Host memory for all layers of one micro-batch."""
    uses = uses_of_step(passes_of_step(Pipeline(), 1), {0: [(layer,) for layer in range(LAYERS)]})
    plan = assign_slots(uses, {(0, layer): slot_bytes(kept_sizes(call, SHAPE)) for layer in range(LAYERS)})
    return OffloadQueue(KEEP, lambda _: plan, lambda: 1, HostSlots(plan.slots.values(), pinned=False), DeferredCopies())


def trained(rank: int, call: Call, keepers: list[Keeper]) -> list[list[float]]:
    """Outputs and gradients of recomputed layers, all forward passes before the first backward pass."""
    layers: list[tuple[list[Tensor], Tensor, Tensor]] = []
    for layer, keeper in enumerate(keepers):
        tensors, dout = inputs(layer, rank)
        leaves = [x.detach().requires_grad_() for x in tensors]
        attend = lambda q, k, v, keeper=keeper: keeper.attend(q, k, v, call)  # noqa: E731
        layers.append((leaves, checkpoint(attend, *leaves, use_reentrant=True), dout))
    for _, out, dout in reversed(layers):
        out.backward(dout)
    return [x.flatten().tolist() for leaves, out, _ in layers for x in (out.detach(), *(y.grad for y in leaves))]


def on_host_and_device(rank: int, plan: Plan) -> tuple[bool, int]:
    """On a worker: whether three steps are equal, and how often graphs were replayed with outputs in host memory."""
    (plain, _), (call, capture) = make_call(plan, graphs=False), make_call(plan)
    host, device = ([Keeper(f"layer {layer}") for layer in range(LAYERS)] for _ in range(2))
    queue = queue_of(call)
    for layer, keeper in enumerate(host):
        keeper.hold = partial(keep_on_host, queue, 0, layer)
    equal = all(trained(rank, call, host) == trained(rank, plain, device) for _ in range(3))
    call.runtime.transfers.groups.close()
    plain.runtime.transfers.groups.close()
    return equal and not queue.waiting, sum(tape.replays for tape in capture.tapes)


@pytest.mark.parametrize("name", PLANS)
def test_a_replay_does_not_overwrite_an_output_on_its_way(pools: Callable[[int], Pool], name: str) -> None:
    """The results of a graph have fixed addresses; its copies run as late as they may."""
    for equal, replays in pools(2).run(on_host_and_device, PLANS[name]):
        assert equal
        assert replays >= 2 * LAYERS


@pytest.mark.parametrize("name", PLANS)
def test_sizes_are_those_of_the_tensors(name: str) -> None:
    call, _ = make_call(Plan(Grid()))
    with torch.no_grad():
        from megatron_wallfacer.engine.autograd import run_forward

        finished = run_forward(*inputs(0, 0)[0], call)
    tensors = finished.out, finished.lse, *finished.kept
    assert kept_sizes(call, SHAPE) == tuple(tensor.nbytes for tensor in tensors)


def recompute(granularity: str, method: str | None = None, layers: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(recompute_granularity=granularity, recompute_method=method, recompute_num_layers=layers)


def test_layers_that_backward_runs_again() -> None:
    assert recomputed_groups(recompute("selective"), 3) == [(0,), (1,), (2,)]
    assert recomputed_groups(recompute("full", "uniform", 2), 5) == [(0, 1), (2, 3), (4,)]
    assert recomputed_groups(recompute("full", "block", 2), 5) == [(0,), (1,)]
    assert recomputed_groups(recompute("full", "block", 9), 2) == [(0,), (1,)]


def ranks(left: int, *wanted: Wanted, nodes: tuple[str, ...] = ("a", "a")) -> list[RankNeeds]:
    return [RankNeeds(node, Left(left, "MemAvailable"), wanted) for node in nodes]


def test_auto_is_the_largest_part_for_which_every_node_has_room() -> None:
    per_layer = tuple(100 * count for count in range(9))
    auto, half = Wanted(KEEP, "auto", per_layer), Wanted(INPUTS, 0.5, per_layer)
    assert auto_fraction(ranks(10**6, auto)) == 1
    # Two ranks; half the inputs take 800 bytes, and 800 of 1,600 are left of nine tenths.
    room = int(1600 / (1 - RESERVE)) + 1
    assert auto_fraction(ranks(room, auto, half)) == 0.5
    assert auto_fraction(ranks(room, auto, Wanted(INPUTS, "auto", per_layer))) == 0.5
    assert auto_fraction(ranks(0, auto)) == 0
    # A layer has 100 bytes of one kind and 60 of the other: 80 bytes are copied in time, half of them.
    copied = Wanted(KEEP, "auto", per_layer, 100), Wanted(INPUTS, "auto", per_layer, 60)
    assert auto_fraction(ranks(10**6, *copied), 80.0) == 0.5
    assert auto_fraction(ranks(10**6, *copied), 200.0) == 1
    assert auto_fraction(ranks(10**6, *copied), 10.0) == 0
    assert auto_fraction([*ranks(10**6, auto), RankNeeds("b", Left(500, "cgroup"), (auto,))]) == 0.5


def test_the_last_layers_stay_on_the_device() -> None:
    wanted = Wanted(KEEP, 0.6, tuple(range(5)))  # 0.6 x 4 = 2.4 layers
    assert (wanted.count(0.6), wanted.count(1), wanted.count(0.75)) == (2, 4, 3)


def test_too_little_room_and_a_part_that_is_no_layer() -> None:
    whole = Wanted(KEEP, 1.0, (0, 10**9))
    check_room(ranks(2 * 10**9, whole), 0.0)
    with pytest.raises(
        WallfacerError, match=r"^--wallfacer-keep-on-host 1\.0: needs 2 GB .* 2 ranks on a, which has 1\.5 GB"
    ):
        check_room(ranks(15 * 10**8, whole), 0.0)
    with pytest.raises(
        WallfacerError, match=r"^--wallfacer-keep-on-host 0\.1: must be at least 0\.25 to select one of 4 layers"
    ):
        check_room(ranks(10**9, Wanted(KEEP, 0.1, (0, 1, 2, 3, 4))), 0.0)
    # A stage without such layers.
    check_room(ranks(10**9, Wanted(KEEP, 0.2, (0,))), 0.0)


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("1", 1.0), ("0.5", 0.5), (None, None)])
def test_values(text: str | None, value: object) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    argv = [] if text is None else [KEEP, text]
    assert Flags.of(parser.parse_args(argv)).keep_on_host == value


def test_arguments_that_only_a_configuration_has() -> None:
    given = {
        "wallfacer_keep_on_host": 1.0,
        "wallfacer_layer_inputs_on_host": 1.0,
        "wallfacer_keep_attention_output": True,
        "recompute_granularity": "full",
        "cpu_offloading": True,
    }
    found = [one.find(argparse.Namespace(**given), []) for one in MEMORY if "--cpu-offloading-" in one.example]
    assert found == [f"{KEEP} 1.0", f"{INPUTS} 1.0"]


def test_a_block_without_its_checkpoints_is_an_error() -> None:
    """A Megatron that checkpoints in another way must not leave inputs on the device in silence."""
    inputs_of, block = LayerInputs(queue=None, on_host=frozenset()), torch.nn.Identity()
    inputs_of.watch(0, block, 2)
    with pytest.raises(WallfacerError, match="model chunk 1 checkpointed 0 layers in a forward pass, not 2"):
        block(torch.zeros(1))
    with torch.no_grad():
        block(torch.zeros(1))
    block.eval()(torch.zeros(1))
