"""The proof can fail: each schedule here is broken on purpose, and the checks that should notice do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import pytest

from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ops import (
    Accumulate,
    Attend,
    Concat,
    Message,
    Op,
    PostRecv,
    SendRecv,
    Transfer,
    WriteResult,
)
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.tiles import Tile
from tests.schedule.cases import published
from tests.schedule.machine import check_play
from tests.schedule.proof import (
    Broken,
    Programs,
    check_balance,
    check_coverage,
    check_kept,
    check_messages,
    check_own,
    check_program,
    check_transfers,
    check_turn,
)

#: The rank that is broken, unless all are.
RANK = 2
TEAM_RING = partial(Programs, Plan(Grid(team=2, ring_outer=4)))
MERGED = partial(Programs, Plan(Grid(team=3, ring_outer=4), shard_work=0))
HEADS = partial(Programs, Plan(Grid(head=2, ring_outer=2)), groups=2)
PAPER = partial(Programs, published(8, 2))

Change = Callable[[Op], Op | Iterable[Op]]


def each(check: Callable[[Programs, int], None]) -> Callable[[Programs], None]:
    """A check of one rank, for all."""

    def check_all(programs: Programs) -> None:
        for rank in programs.ranks:
            check(programs, rank)

    return check_all


def balance(programs: Programs) -> None:
    check_balance(programs, programs.ranks)


def kept(programs: Programs) -> None:
    after = Programs(programs.plan, backward=True, causal=programs.causal, groups=programs.groups)
    each(lambda forward, rank: check_kept(forward, after, rank))(programs)


program = each(lambda programs, rank: check_program(programs[rank], causal=programs.causal))
own = each(lambda programs, rank: check_own(programs[rank]))
turn, transfers, messages = each(check_turn), each(check_transfers), each(check_messages)


# --- how to break ---


def change(kind: type[Op], index: int, to: Change, rank: int = RANK) -> Callable[[Programs], None]:
    """Put something else in place of the operation of that kind and index."""

    def apply(broken: Programs) -> None:
        ops = list(broken[rank].ops)
        at = [place for place, op in enumerate(ops) if isinstance(op, kind)][index]
        new = to(ops[at])
        ops[at : at + 1] = [new] if isinstance(new, Op) else new
        broken[rank] = replace(broken[rank], ops=tuple(ops))

    return apply


def with_(**fields: object) -> Change:
    return lambda op: replace(op, **fields)


def drop(op: Op) -> Iterable[Op]:
    return ()


def twice(op: Op) -> Iterable[Op]:
    return op, op


def with_transfer(**fields: object) -> Change:
    return lambda op: replace(op, transfer=replace(op.transfer, **fields))


def with_sent(**fields: object) -> Change:
    return lambda op: replace(
        op, transfer=replace(op.transfer, sends=tuple(replace(m, **fields) for m in op.transfer.sends))
    )


def with_tile(**fields: object) -> Change:
    return lambda op: replace(op, tiles=(replace(op.tiles[0], **fields), *op.tiles[1:]))


def before(kind: type[Op], index: int, other: type[Op], other_index: int, rank: int = RANK) -> Callable:
    """Transfer an operation to just before another."""

    def apply(broken: Programs) -> None:
        ops = list(broken[rank].ops)
        moved = [op for op in ops if isinstance(op, kind)][index]
        ops = [op for op in ops if op is not moved]
        at = [place for place, op in enumerate(ops) if isinstance(op, other)][other_index]
        ops.insert(at, moved)
        broken[rank] = replace(broken[rank], ops=tuple(ops))

    return apply


def value(name: str, rank: int = RANK, **fields: object) -> Callable[[Programs], None]:
    """Let a name stand for something else."""

    def apply(broken: Programs) -> None:
        values = dict(broken[rank].values)
        values[name] = replace(values[name], **fields)
        broken[rank] = replace(broken[rank], values=values)

    return apply


def without_value(name: str) -> Callable[[Programs], None]:
    def apply(broken: Programs) -> None:
        values = {key: value for key, value in broken[RANK].values.items() if key != name}
        broken[RANK] = replace(broken[RANK], values=values)

    return apply


def everywhere(breaking: Callable[..., Callable], *args: object) -> Callable[[Programs], None]:
    def apply(broken: Programs) -> None:
        for rank in broken.ranks:
            breaking(*args, rank=rank)(broken)

    return apply


def both(*breakings: Callable[[Programs], None]) -> Callable[[Programs], None]:
    def apply(broken: Programs) -> None:
        for breaking in breakings:
            breaking(broken)

    return apply


def receive_then_send(op: SendRecv) -> Iterable[Op]:
    """Everyone waits for the peer before, before anything leaves for the one after."""
    yield SendRecv(replace(op.transfer, sends=()))
    yield SendRecv(replace(op.transfer, receives=()))


def with_send_more(op: WriteResult) -> Iterable[Op]:
    """A message that nobody expects."""
    yield SendRecv(Transfer("team", ("q",), (Message(3, "local.q.0", (2, 13), 999),), ()))
    yield op


def keep_nothing(broken: Programs) -> None:
    broken[RANK] = replace(broken[RANK], keeps=())


def with_ends(transfer: Transfer, **fields: object) -> Transfer:
    """Every message otherwise, at both ends."""
    sends, receives = (tuple(replace(m, **fields) for m in end) for end in (transfer.sends, transfer.receives))
    return replace(transfer, sends=sends, receives=receives)


def same_tag(op: SendRecv) -> Op:
    """The tag of the transfer before."""
    return replace(op, transfer=with_ends(op.transfer, tag=88))


def with_copy_more(broken: Programs) -> None:
    """Everyone sends its own keys on twice."""
    for rank in broken.ranks:
        values = broken[rank].values
        broken[rank] = replace(broken[rank], values={**values, "copy": values["step1.kv.0"]})
        change(SendRecv, 1, _and_again, rank)(broken)


def _and_again(op: SendRecv) -> Iterable[Op]:
    again = with_ends(op.transfer, tag=1)
    yield op
    yield SendRecv(replace(again, receives=tuple(replace(message, value="copy") for message in again.receives)))


@dataclass(frozen=True)
class Case:
    """What is broken in which program, and what each check says of it."""

    name: str
    of: Callable[..., Programs]
    breaking: Callable[[Programs], None]
    found: dict[Callable[[Programs], None], str]
    backward: bool = False


INCOMPLETE = "the sum is not complete"
FORWARD = [
    # What is computed.
    Case(
        "a tile dropped",
        TEAM_RING,
        change(Attend, 5, with_(tiles=())),
        {check_coverage: "has not seen", turn: "has not seen", balance: "its share is", check_play: INCOMPLETE},
    ),
    Case(
        "a causal tile in full",
        TEAM_RING,
        change(Attend, 0, with_tile(causal=False)),
        {program: "sees keys that it must not", check_coverage: "has not seen", check_play: INCOMPLETE},
    ),
    Case(
        "a full tile as a causal one",
        TEAM_RING,
        change(Attend, 5, with_(tiles=(Tile((0, 2), (0, 2), causal=True),))),
        {program: "sees keys that it must not", check_coverage: "has not seen", check_play: INCOMPLETE},
    ),
    Case(
        "a tile twice",
        TEAM_RING,
        change(Attend, 5, lambda op: replace(op, tiles=op.tiles * 2)),
        {program: "meets a key chunk twice in one go", check_coverage: "twice in one go", check_play: "in one go"},
    ),
    Case("a tile outside", TEAM_RING, change(Attend, 5, with_tile(rows=(0, 9))), {program: "outside its block"}),
    Case("an empty tile", TEAM_RING, change(Attend, 5, with_tile(rows=(1, 1))), {program: "a tile is empty"}),
    Case(
        "an oblong causal tile",
        TEAM_RING,
        change(Attend, 5, with_tile(rows=(1, 2), cols=(0, 2), causal=True)),
        {program: "not square"},
    ),
    Case(
        "tiles left out",
        TEAM_RING,
        change(Attend, 4, drop),
        {check_coverage: "has not seen", balance: "its share is", check_play: INCOMPLETE},
    ),
    Case(
        "tiles computed twice",
        TEAM_RING,
        change(Attend, 4, twice),
        {check_coverage: "computes again", turn: "computes again", check_play: "counted twice"},
    ),
    Case(
        "keys of another visit",
        TEAM_RING,
        change(Attend, 5, with_(kv=("step3.kv.0",))),
        {check_coverage: "computes again", check_play: "counted twice"},
    ),
    Case(
        "results into others' accumulator",
        TEAM_RING,
        change(Attend, 5, with_(q_into="gathered.acc.q.0")),
        {program: "adds to", check_play: "are added to"},
    ),
    Case(
        "keys of another head slice",
        HEADS,
        change(Attend, 1, with_(kv=("local.kv.0",))),
        {program: "different head slices", check_play: "meet keys of head slice"},
    ),
    # Names.
    Case("an unknown name", TEAM_RING, without_value("step1.kv.0"), {program: "nothing says what"}),
    Case("rows out of order", TEAM_RING, value("local.q.0", chunks=(13, 2)), {program: "has rows"}),
    Case(
        "others' rows loaded",
        TEAM_RING,
        value("local.q.0", chunks=(3, 12)),
        {program: "not its own", check_play: "should be"},
    ),
    Case("a head slice that does not exist", TEAM_RING, value("local.q.0", head_slice=1), {program: "of head slice 1"}),
    Case(
        "a gradient loaded",
        TEAM_RING,
        value("local.q.0", payload=("dq",)),
        {program: "which no rank has yet"},
    ),
    Case(
        "a Concat without one source",
        HEADS,
        change(Concat, 0, lambda op: replace(op, sources=op.sources[1:])),
        {program: "nobody reads", check_play: "should be"},
    ),
    Case(
        "a Concat with one source twice",
        HEADS,
        change(Concat, 0, lambda op: replace(op, sources=(*op.sources, op.sources[0]))),
        {program: "is of", check_play: "should be"},
    ),
    # Order.
    Case(
        "a block read before its transfer starts",
        TEAM_RING,
        before(Attend, 3, SendRecv, 0),
        {program: "has no value yet", check_play: "does not exist"},
    ),
    Case(
        "a partial output sent before it is complete",
        TEAM_RING,
        before(SendRecv, 4, Attend, 6),
        {program: "which were sent or stored", check_play: "after it was sent or stored"},
    ),
    Case(
        "a result stored before it is complete",
        TEAM_RING,
        before(WriteResult, 0, Accumulate, 0),
        {program: "which were sent or stored", check_play: "after it was sent or stored"},
    ),
    Case(
        "something added to what is on its way here",
        TEAM_RING,
        change(SendRecv, 4, lambda op: (op, Accumulate("local.acc.q.0", "scatter3.q.0"))),
        {program: "still on its way", check_play: "while it is on its way"},
    ),
    # Results.
    Case(
        "an Accumulate missing",
        TEAM_RING,
        change(Accumulate, 0, drop),
        {program: "nobody reads", check_play: INCOMPLETE},
    ),
    Case("an Accumulate twice", TEAM_RING, change(Accumulate, 0, twice), {check_play: "counted twice"}),
    Case(
        "an Accumulate into rows of others",
        TEAM_RING,
        change(Accumulate, 0, with_(into="gathered.acc.q.0")),
        {program: "Accumulate", check_play: INCOMPLETE},
    ),
    Case(
        "a result not stored",
        TEAM_RING,
        change(WriteResult, 0, drop),
        {program: "nobody reads", own: "store every result once", check_play: "ends with"},
    ),
    Case(
        "a head slice not stored",
        HEADS,
        change(WriteResult, 0, lambda op: replace(op, sources=op.sources[:-1])),
        {program: "nobody reads", own: "store every result once", check_play: "ends with"},
    ),
    Case(
        "a result stored twice",
        TEAM_RING,
        change(WriteResult, 0, twice),
        {program: "store every result once", check_play: "stores"},
    ),
    Case(
        "others' results stored",
        TEAM_RING,
        change(WriteResult, 0, with_(sources=("gathered.acc.q.0",))),
        {program: "nobody reads", own: "not its own", check_play: "its own are"},
    ),
    Case("what backward needs is not kept", HEADS, keep_nothing, {kept: "is given"}),
    Case(
        "something else is kept for backward",
        HEADS,
        value("local.q.0", chunks=(0, 1)),
        {kept: "in backward", check_play: "should be"},
    ),
    # Merged rows.
    Case(
        "merged rows computed after they were sent",
        MERGED,
        before(Attend, 2, WriteResult, 0),
        {program: "which were sent or stored", check_play: "after it was sent or stored"},
    ),
    Case(
        "local rows of the last ring step left out",
        MERGED,
        change(Attend, -1, drop),
        {check_coverage: "has not seen", balance: "its share is", check_play: INCOMPLETE},
    ),
    Case(
        "an accumulator without the rows of a rank",
        MERGED,
        value("team.acc.q.0", chunks=(1, 2, 21, 22)),
        {program: "adds to", check_play: "are added to"},
    ),
    Case(
        "merged rows against columns of the last ring step",
        MERGED,
        change(Attend, 3, with_(kv=("step3.kv.0",))),
        {check_coverage: "computes again", check_play: "counted twice"},
    ),
    Case(
        "merged results sent to another rank of the team",
        MERGED,
        change(SendRecv, -1, with_sent(chunks=(2, 21))),
        {messages: "expected", check_play: "should be"},
    ),
    # Transfers.
    Case(
        "a message to a wrong peer",
        TEAM_RING,
        change(SendRecv, 2, with_sent(peer=6)),
        {messages: "expected", check_play: "stuck"},
    ),
    Case(
        "a message off its axis",
        TEAM_RING,
        change(SendRecv, 2, with_sent(peer=3)),
        {transfers: "outside its axis", messages: "expected", check_play: "stuck"},
    ),
    Case(
        "a message to oneself",
        TEAM_RING,
        change(SendRecv, 2, with_sent(peer=RANK)),
        {transfers: "outside its axis", check_play: "stuck"},
    ),
    Case(
        "a message with another tag",
        TEAM_RING,
        change(SendRecv, 2, with_sent(tag=7)),
        {messages: "expected", check_play: "stuck"},
    ),
    Case(
        "two messages with the same tag",
        TEAM_RING,
        everywhere(change, SendRecv, 3, same_tag),
        {transfers: "used before"},
    ),
    Case(
        "some rows only",
        TEAM_RING,
        change(SendRecv, 2, with_sent(chunks=(0,))),
        {messages: "expected", check_play: "should be"},
    ),
    Case(
        "rows that are not there",
        TEAM_RING,
        change(SendRecv, 2, with_sent(chunks=(2, 13))),
        {transfers: "is not in", messages: "expected", check_play: "sends"},
    ),
    Case(
        "another value sent",
        TEAM_RING,
        change(SendRecv, 2, with_sent(value="local.kv.0", chunks=(2, 13))),
        {messages: "expected", check_play: "should be"},
    ),
    Case(
        "another head slice sent",
        HEADS,
        value("local.q.0>3", head_slice=1),
        {messages: "expected", check_play: "should be"},
    ),
    Case(
        "another payload",
        TEAM_RING,
        change(SendRecv, 2, with_transfer(payload=("v", "k"))),
        {transfers: "is not in", messages: "expected", check_play: "stuck"},
    ),
    Case(
        "a message not sent",
        TEAM_RING,
        change(SendRecv, 0, with_transfer(sends=())),
        {messages: "expected", check_play: "stuck"},
    ),
    Case(
        "a message not received",
        TEAM_RING,
        change(SendRecv, 4, with_transfer(receives=())),
        {program: "has no value yet", messages: "expected", check_play: "does not exist"},
    ),
    Case(
        "a transfer of nothing",
        TEAM_RING,
        change(SendRecv, 0, lambda op: (op, SendRecv(replace(op.transfer, sends=(), receives=())))),
        {transfers: "a transfer of nothing"},
    ),
    Case(
        "a transfer left out",
        TEAM_RING,
        change(SendRecv, 2, drop),
        {program: "has no value yet", messages: "expected", check_play: "does not exist"},
    ),
    Case(
        "a message that nobody expects",
        TEAM_RING,
        change(WriteResult, 0, with_send_more),
        {messages: "expected", check_play: "started and never met"},
    ),
    Case("an arrival that nobody reads", TEAM_RING, with_copy_more, {program: "nobody reads"}),
    Case(
        "everyone receives before sending",
        TEAM_RING,
        everywhere(change, SendRecv, 1, receive_then_send),
        {check_play: "stuck"},
    ),
    # Expectations.
    Case(
        "another transfer expected",
        TEAM_RING,
        change(PostRecv, 0, with_transfer(axis="team")),
        {program: "expects and does not start later"},
    ),
    Case("a transfer expected twice", TEAM_RING, change(PostRecv, 0, twice), {program: "expects twice"}),
    Case(
        "a transfer expected after it started",
        TEAM_RING,
        lambda broken: change(WriteResult, 0, lambda op: (PostRecv(broken[RANK].transfers[0]), op))(broken),
        {program: "expects and does not start later"},
    ),
]
BACKWARD = [
    Case(
        "two transfers of a channel in another order than at the peers'",
        TEAM_RING,
        before(SendRecv, 1, SendRecv, 0),
        {messages: "expected", check_play: "stuck"},
        backward=True,
    ),
    Case(
        "gradients without what comes along",
        TEAM_RING,
        change(Attend, 0, with_(q=("local.q.0",))),
        {program: "does not have", check_play: "and needs"},
        backward=True,
    ),
    Case(
        "gradients of keys not counted",
        TEAM_RING,
        change(Attend, 0, with_(kv_into=None)),
        {program: "wrong set of results", check_play: INCOMPLETE},
        backward=True,
    ),
    Case(
        "a gradient passed on without what had come",
        TEAM_RING,
        change(Accumulate, 0, drop),
        {program: "nobody reads", check_play: INCOMPLETE},
        backward=True,
    ),
    Case(
        "a gradient passed on before what had come is added",
        TEAM_RING,
        before(Accumulate, 0, WriteResult, 0),
        {program: "which were sent or stored", check_play: "after it was sent or stored"},
        backward=True,
    ),
    Case(
        "a gradient passed on before it is computed",
        TEAM_RING,
        before(SendRecv, 4, Attend, 2),
        {program: "which were sent or stored", check_play: "after it was sent or stored"},
        backward=True,
    ),
    Case(
        "a gradient that leaves the published order for another rank",
        PAPER,
        change(SendRecv, -2, with_sent(peer=5)),
        {messages: "expected", check_play: "stuck"},
        backward=True,
    ),
    Case(
        "queries that were not kept",
        HEADS,
        lambda broken: broken.update({RANK: replace(broken[RANK], given=())}),
        {program: "has no value yet", check_play: "does not exist"},
        backward=True,
    ),
    Case(
        "keys' gradients folded into queries'",
        TEAM_RING,
        change(Accumulate, -1, with_(into="local.acc.q.0")),
        {program: "Accumulate", check_play: "adds"},
        backward=True,
    ),
]


@pytest.mark.parametrize("case", [*FORWARD, *BACKWARD], ids=lambda case: case.name)
def test_breakage_is_found(case: Case) -> None:
    broken = case.of(backward=case.backward, causal=True)
    case.breaking(broken)
    for check, said in case.found.items():
        with pytest.raises(Broken, match=said):
            check(broken)


@pytest.mark.parametrize("of", [TEAM_RING, MERGED, HEADS, PAPER])
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_found_where_nothing_is_broken(of: Callable[..., Programs], backward: bool) -> None:
    for check in (program, check_coverage, turn, balance, transfers, messages, check_play):
        check(of(backward=backward, causal=True))


def test_order_over_different_channels_is_free_where_nobody_waits_between() -> None:
    programs = TEAM_RING(causal=True)
    before(SendRecv, 1, SendRecv, 0)(programs)
    messages(programs)
    check_play(programs)


def test_waits_that_only_the_machine_sees() -> None:
    """Each message has its counterpart, in the same order, and still everyone waits for everyone."""
    programs = TEAM_RING(causal=True)
    everywhere(change, SendRecv, 1, receive_then_send)(programs)
    for check in (program, transfers, messages):
        check(programs)
    with pytest.raises(Broken, match="stuck"):
        check_play(programs)
