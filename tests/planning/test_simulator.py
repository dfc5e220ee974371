"""Simulations against results by hand, and of one rank per class against all ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from megatron_wallfacer.planning.choice import Choice
from megatron_wallfacer.planning.cluster import Cluster, HostProcessors, LinkSpeed, MessageCost, SwitchLevel
from megatron_wallfacer.planning.routing import Routing
from megatron_wallfacer.planning.simulator import DeadlockError, SimulationResult, simulate
from megatron_wallfacer.planning.symmetry import Symmetry
from megatron_wallfacer.planning.time_bound import kernel_seconds
from megatron_wallfacer.schedule.ops import Accumulate, Attend, Concat, Op, PostRecv, Schedule, SendRecv, WriteResult
from megatron_wallfacer.schedule.volume import received_bytes
from tests.planning.clusters import ALIKE, PLAIN, SHAPE, choice, with_device


def simulated(one: Choice, *, every_rank: bool) -> SimulationResult:
    symmetry = Symmetry(one.plan.grid, Routing(one.job.cluster).unit_sizes, every_rank=every_rank)
    return simulate(one.job.costs, one.schedules, symmetry)


@pytest.mark.parametrize("transport", ["nccl", "gloo"])
@pytest.mark.parametrize("name", ALIKE)
def test_one_rank_represents_its_class(name: str, transport: str) -> None:
    """To the last digit: only kernels and links take time here, and a class has the same."""
    one = choice(replace(PLAIN, transport=transport), **ALIKE[name])
    alone, all_ranks = simulated(one, every_rank=False), simulated(one, every_rank=True)
    assert alone.ranks < all_ranks.ranks == 16
    assert alone.seconds == pytest.approx(all_ranks.seconds, rel=1e-12)
    assert alone.pass_s == pytest.approx(all_ranks.pass_s, rel=1e-12)


SHARED = {
    "one NIC per node": replace(PLAIN, nics=1),
    "two NICs per node": replace(PLAIN, nics=2),
    "a bus": replace(PLAIN, node_gbyte_s=15.0),
    "switches": replace(PLAIN, levels=(SwitchLevel(2, 4.0),)),
}


@pytest.mark.parametrize("name", ["ring", "double-ring", "usp", "team of 8 across", "all axes"])
@pytest.mark.parametrize("shared", SHARED)
def test_it_does_where_links_are_shared(shared: str, name: str) -> None:
    one = choice(SHARED[shared], **ALIKE[name])
    assert simulated(one, every_rank=False).seconds == pytest.approx(simulated(one, every_rank=True).seconds, rel=1e-12)


@pytest.mark.parametrize("name", ALIKE)
def test_merging_and_calls_differ_a_little_from_rank_to_rank(name: str) -> None:
    """Tiles are cut otherwise on each rank; the time of one rank is still within five percent of that of all."""
    cluster = with_device(PLAIN, call_us=20.0, memory_gbyte_s=50.0)
    one = choice(cluster, **ALIKE[name])
    assert simulated(one, every_rank=False).seconds == pytest.approx(simulated(one, every_rank=True).seconds, rel=0.05)


def test_without_communication_it_is_the_kernels() -> None:
    free = replace(PLAIN, intra=LinkSpeed(None), inter=LinkSpeed(None))
    for options in ALIKE.values():
        one = choice(free, **options)
        assert one.simulation.seconds == pytest.approx(kernel_seconds(16, free, SHAPE), rel=1e-9)
        assert one.simulation.seconds - one.simulation.kernel_s == pytest.approx(0.0, abs=1e-12)


def test_a_ring_between_nodes_is_bound_by_one_nic_when_compute_is_free() -> None:
    """Each hop of K and V goes through the NIC of the rank at the node's edge, after the latency."""
    cluster = with_device(PLAIN, tflops=1e9)
    one = choice(cluster, scheme="ring")
    forward = sum(received_bytes(one.schedules(0)[0], SHAPE).values())
    # 15 hops, all ranks at once: as slow as the NIC.
    assert one.simulation.pass_s[0] == pytest.approx(forward / 1e9 + 15 * 10e-6, rel=1e-6)


@pytest.mark.parametrize("name", ALIKE)
def test_nothing_is_faster_than_its_bound(name: str) -> None:
    one = choice(**ALIKE[name])
    assert one.simulation.seconds >= one.bound.seconds * (1 - 1e-9)


def test_one_nic_per_node_is_slower_than_one_per_device() -> None:
    slow, fast = choice(replace(PLAIN, nics=1), **ALIKE["usp"]), choice(**ALIKE["usp"])
    assert slow.simulation.seconds > 1.5 * fast.simulation.seconds


def test_processors_that_all_ranks_share_make_copies_slow() -> None:
    host = HostProcessors(cores=2, copy_gbyte_s=1.0)
    one = choice(replace(PLAIN, transport="gloo", host=host), **ALIKE["ring"])
    many = choice(replace(PLAIN, transport="gloo", host=replace(host, cores=16)), **ALIKE["ring"])
    assert one.simulation.seconds > 1.2 * many.simulation.seconds


FREE = HostProcessors(cores=16, copy_gbyte_s=1e6)


def messages(thread_us: float = 0.0, transport_us: float = 0.0, transport_s_per_gbyte: float = 0.0) -> dict:
    """Return messages of one cost, except for their bytes."""
    larger = transport_us + 1e6 * transport_s_per_gbyte
    return {"messages": (MessageCost(0, thread_us, transport_us), MessageCost(1e9, thread_us, larger))}


def with_host(host: HostProcessors, **changes: object) -> float:
    """Return the seconds of a ring."""
    return choice(replace(PLAIN, transport="gloo", host=host, **changes), **ALIKE["ring"]).simulation.seconds


def operations() -> list[Op]:
    """Return the operations of a ring's rank, both passes."""
    return [op for schedule in choice(**ALIKE["ring"]).schedules(0) for op in schedule.ops]


#: Nothing limits them: what is left is kernels and processors.
FAST_LINKS = {"intra": LinkSpeed(1e4, 0.0), "inter": LinkSpeed(1e4, 0.0)}


def held_up(each_s: float, **of_a_message: float) -> float:
    """Return the part of the messages' time, ``each_s`` each, by which a ring takes longer."""
    count = sum(len(op.transfer.sends) for op in operations() if isinstance(op, SendRecv))
    costly = replace(FREE, **messages(transport_s_per_gbyte=1e-9, **of_a_message))
    return (with_host(costly, **FAST_LINKS) - with_host(FREE, **FAST_LINKS)) / (count * each_s)


def test_a_rank_that_posts_a_message_does_nothing_else() -> None:
    assert held_up(100e-6, thread_us=100.0) == pytest.approx(1.0, rel=0.01)


def test_what_moves_it_then_is_hidden_behind_kernels_if_they_are_longer() -> None:
    assert held_up(100e-6, transport_us=100.0) < 0.1
    assert held_up(0.1, transport_us=1e5) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("attend_us", (Attend,)),
        ("operation_us", (Concat, PostRecv, Accumulate, SendRecv, WriteResult)),
        ("pass_us", ()),
    ],
)
def test_operations_take_processors_whatever_their_size(name: str, kinds: tuple[type, ...]) -> None:
    count = sum(isinstance(op, kinds) for op in operations()) if kinds else 2
    more = with_host(replace(FREE, **{name: 100.0}), **FAST_LINKS) - with_host(FREE, **FAST_LINKS)
    assert more == pytest.approx(count * 100e-6, rel=0.01)


def test_sleeping_kernels_end_late_where_processors_are_busy() -> None:
    sleeps = sum(len(op.tiles) for op in operations() if isinstance(op, Attend))

    def late_ms(host: HostProcessors) -> float:
        """Return the delay per sleep."""
        return 1e3 * (with_host(replace(host, wake_up_us=1000.0)) - with_host(host)) / sleeps

    assert late_ms(replace(FREE, **messages(transport_s_per_gbyte=0.01))) == pytest.approx(0, abs=1e-3)
    assert 0.1 < late_ms(replace(FREE, cores=2, **messages(transport_s_per_gbyte=0.1))) < 3


def test_every_wake_up_may_be_delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of all tiles, threads that receive, and ranks that have waited, here for every hop: links are slow."""
    woken: list[int] = []

    class Counting:
        def __init__(self, host: HostProcessors, seed: int) -> None:
            pass

        def seconds(self, used: float, sleeps: int) -> float:
            woken.append(sleeps)
            return 0.0

    monkeypatch.setattr("megatron_wallfacer.planning.simulator.WakeUpDelay", Counting)
    slow = {"intra": LinkSpeed(0.1, 0.0), "inter": LinkSpeed(0.1, 0.0)}
    one = choice(replace(PLAIN, transport="gloo", host=replace(FREE, wake_up_us=1.0), **slow), **ALIKE["ring"])
    ops = [op for rank in range(16) for schedule in one.schedules(rank) for op in schedule.ops]
    tiles = sum(len(op.tiles) for op in ops if isinstance(op, Attend))
    hops = [len(op.transfer.sends) for op in ops if isinstance(op, SendRecv)]
    simulated(one, every_rank=True)
    assert sum(woken) == tiles + sum(hops) + len(hops)


def test_messages_flow_on_while_all_processors_work() -> None:
    """A receive needs a hundredth of a processor, and gets it although sixteen ranks copy on two."""
    host = replace(FREE, cores=2, copy_gbyte_s=35.0, **messages(transport_s_per_gbyte=0.01))
    copying, moving = with_host(host, intra=LinkSpeed(None), inter=LinkSpeed(None)), with_host(FREE)
    assert max(copying, moving) <= with_host(host) < 0.7 * (copying + moving)


def test_bytes_of_links_are_counted() -> None:
    one = choice(**ALIKE["ring"])
    both = sum(sum(received_bytes(schedule, SHAPE).values()) for schedule in one.schedules(0))
    nics = {link.direction: size for link, size in one.simulation.link_bytes.items() if link.kind == "nic"}
    assert nics == pytest.approx({"out": both, "in": both})


def test_spans_do_not_overlap_on_a_rank_but_for_moves() -> None:
    spans = choice(with_device(PLAIN, memory_gbyte_s=50.0), **ALIKE["all axes"]).spans()
    busy = sorted(
        (span.start_s, span.end_s) for span in spans if span.kind in ("kernel", "copy", "wait") and span.rank == 0
    )
    assert busy
    assert all(end <= start + 1e-12 for (_, end), (start, _) in pairwise(busy))
    assert {span.kind for span in spans} == {"pass", "kernel", "copy", "wait", "transfer"}
    passes = [span for span in spans if span.kind == "pass" and span.rank == 0]
    assert [span.name for span in passes] == ["forward", "backward"]
    assert passes[0].start_s == 0
    assert passes[0].end_s == passes[1].start_s
    assert busy[-1][1] <= passes[1].end_s


def test_a_message_that_no_rank_sends_is_an_error() -> None:
    one = choice(scheme="ring")

    def without_a_send(rank: int) -> tuple[Schedule, ...]:
        forward = one.schedules(rank)[0]
        ops = list(forward.ops)
        first = next(index for index, op in enumerate(ops) if isinstance(op, SendRecv))
        ops[first] = SendRecv(replace(ops[first].transfer, sends=()))
        return (replace(forward, ops=tuple(ops)),)

    with pytest.raises(DeadlockError, match="wait for messages that no rank sends"):
        simulate(one.job.costs, without_a_send, Symmetry(one.plan.grid, Routing(PLAIN).unit_sizes, every_rank=True))


def test_every_rank_of_the_paper_order_is_simulated() -> None:
    one = choice(scheme="wallfacer", team_size=2)
    assert one.simulation.ranks == 16
    assert one.can_be_simulated
    large = Cluster("large", 64, 4, PLAIN.intra, PLAIN.inter, PLAIN.device, nics=4)
    assert not choice(large, cp_size=256, scheme="wallfacer", team_size=4).can_be_simulated
