"""Verified passes: no false alarm, and no flipped bit, swapped rows, NaN or different mask that goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.attention import forget_groups
from megatron_wallfacer.engine import operators
from megatron_wallfacer.engine.call import Call
from megatron_wallfacer.engine.compiled import CompiledPass
from megatron_wallfacer.engine.connections import connected
from megatron_wallfacer.engine.groups import CPU
from megatron_wallfacer.engine.transfers import BoundTransfer, Transfers
from megatron_wallfacer.engine.verify import checksum
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.schedule.grid import AXES, Grid
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.messages import message_tensors
from megatron_wallfacer.schedule.ops import PostRecv, SendRecv
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.passes import Case, call_of, leaves
from tests.support.dense import Problem
from tests.support.pool import Pool

SMALL = Problem(4, kv_heads=2, q_heads=4, dtype=torch.bfloat16)
#: Between them they send every tensor along every axis that it can take.
PLANS = {
    "head": Plan(Grid(head=4)),
    "head groups": Plan(Grid(head=2, ring_outer=2), head_groups=2),
    "team": Plan(Grid(team=4)),
    "team q": Plan(Grid(team=2, ring_outer=2), forward="pass-q", backward="pass-q"),
    "kv_team": Plan(Grid(kv_team=4), forward="pass-q", backward="pass-q"),
    "rings": Plan(Grid(ring_outer=2, ring_inner=2)),
    "rings q": Plan(Grid(ring_outer=2, ring_inner=2), forward="pass-q", backward="pass-q"),
    "paper": Plan(Grid(team=2, kv_team=2), kv_order="paper", backward="pass-q"),
    "permuted": Plan(Grid(team=2, kv_team=2), kv_order="permuted"),
}
MASKED = [
    Case(PLANS["rings"], replace(SMALL, window=(3, 0))),
    Case(PLANS["team q"], replace(SMALL, documents=(0, 8, 16), shard_mode="per_document"), keep_gathered_q=True),
    Case(PLANS["kv_team"], replace(SMALL, documents=(0, 3, 16), dtype=torch.float64, causal=False)),
]


@dataclass
class Wire:
    """What happens to the bytes of a pass.

    Attributes:
        arrived: called with (number of the transfer, operands) once it has been waited for.
        leaving: the same before it starts.
    """

    arrived: Callable[[int, Any], None] | None = None
    leaving: Callable[[int, Any], None] | None = None


def tap(transfers: Transfers) -> Wire:
    """Let a wire change the bytes of transfers that are bound from now on."""
    wire, bind = Wire(), transfers.bind

    def tapped(number: int, *args: Any) -> BoundTransfer:
        bound = bind(number, *args)

        def start(operands: Any, works: Any) -> None:
            if wire.leaving is not None:
                wire.leaving(number, operands)
            bound.start(operands, works)

        def wait(operands: Any, works: Any) -> None:
            bound.wait(operands, works)
            if wire.arrived is not None:
                wire.arrived(number, operands)

        return bound._replace(start=start, wait=wait)

    transfers.bind = tapped
    return wire


class Passes:
    """Forward and backward of a case on a worker, without what follows an exception."""

    def __init__(self, rank: int, case: Case, transfers: Transfers) -> None:
        # The schedule numbers rows in the order of chunks: documents that are cut are not asked about here.
        self.call = replace(call_of(case, transfers), verify=True, layer=5)
        self.q, self.k, self.v, self.dout = (x.detach() for x in leaves(rank, case.problem))

    def forward(self, call: Call | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        return operators._forward(call or self.call, self.q, self.k, self.v, None)

    def backward(self, done: tuple[Tensor, Tensor, list[Tensor]]) -> tuple[Tensor, ...]:
        out, lse, kept = done
        inputs = () if self.call.plan.grid.head > 1 else (self.q, self.k, self.v)
        heads, dim = self.k.shape[2], self.k.shape[3]
        return operators._backward(self.call, self.dout, out, lse, None, kept, inputs, heads, dim)

    def compiled(self) -> dict[bool, CompiledPass]:
        """The compiled passes by whether they are backward; runs both."""
        found, run = {}, self.call.run

        def seen(compiled: CompiledPass, *args: Any) -> Any:
            found[compiled.program.schedule.backward] = compiled
            return run(compiled, *args)

        object.__setattr__(self.call, "run", seen)
        self.backward(self.forward())
        object.__setattr__(self.call, "run", run)
        return found


@dataclass(frozen=True)
class Place:
    """Bytes of one tensor of a message.

    Attributes:
        transfer: its number.
        operand: of the message.
        first: byte.
        row: bytes of a row.
        rows: number of rows.
    """

    transfer: int
    operand: int
    first: int
    row: int
    rows: int


def places(compiled: CompiledPass, inputs: dict[str, Tensor]) -> dict[tuple[str, str], Place]:
    """By axis and tensor, the place of the last message that brings it."""
    program, found = compiled.program, {}
    tensors = message_tensors(program, {name: x.stride() for name, x in inputs.items()})
    transfers = {id(op.transfer): op.transfer for op in program.schedule.ops if isinstance(op, PostRecv | SendRecv)}
    sizes = {"input": SMALL.dtype.itemsize, "wide": 4}
    for number, transfer in enumerate(transfers.values()):
        operands = {(one.peer, one.tag): one.operand for one in program.transfers[number].receives}
        for tensor in tensors[id(transfer)].receives:
            operand, (piece,) = operands[tensor.peer, tensor.tag], tensor.pieces
            size = sizes[piece.view]
            start = piece.offset * size - program.operands[operand].offset
            found[tensor.axis, tensor.name] = Place(number, operand, start, piece.strides[0] * size, piece.shape[0])
    return found


def flip(place: Place) -> Callable[[int, Any], None]:
    """Flip the lowest bit of the second row's first byte."""

    def flipped(number: int, operands: Any) -> None:
        if number == place.transfer:
            operands[place.operand][place.first + place.row] ^= 1

    return flipped


def swap(place: Place) -> Callable[[int, Any], None]:
    """Exchange two rows that differ; where none do, all being zero, write one."""

    def swapped(number: int, operands: Any) -> None:
        if number != place.transfer:
            return
        rows = operands[place.operand][place.first : place.first + place.rows * place.row].view(place.rows, -1)
        other = next((row for row in range(1, place.rows) if not torch.equal(rows[row], rows[0])), None)
        if other is None:
            rows[0] = 1
        else:
            rows[[0, other]] = rows[[other, 0]]

    return swapped


def error_of(run: Callable[[], object]) -> str:
    try:
        run()
    except WallfacerError as error:
        return str(error)
    return ""


def run_changed(rank: int) -> dict[tuple[str, bool, str, str, str], tuple[int, str]]:
    """On a worker: by plan, pass, axis, tensor and change, the rank that receives it, and this rank's error."""
    found = {}
    for name, plan in PLANS.items():
        transfers = connected(None, plan.grid, "direct", CPU)
        wire = tap(transfers)
        passes = Passes(rank, Case(plan, SMALL), transfers)
        done = passes.forward()
        for backward, compiled in passes.compiled().items():
            strides = dict.fromkeys(compiled.program.inputs, passes.q)  # of received tensors they are not needed
            mine = places(compiled, strides)
            everyone: list[Any] = [None] * 4
            dist.all_gather_object(everyone, sorted(mine))
            for axis, tensor in sorted({key for keys in everyone for key in keys}):
                receiver = max(other for other in range(4) if (axis, tensor) in everyone[other])
                for change in (flip, swap):
                    wire.arrived = change(mine[axis, tensor]) if rank == receiver else None
                    error = error_of(partial(passes.backward, done) if backward else passes.forward)
                    found[name, backward, axis, tensor, change.__name__] = receiver, error
                wire.arrived = None
        forget_groups()
    return found


@pytest.fixture(scope="module")
def changed(pools: Callable[[int], Pool]) -> list[dict[tuple[str, bool, str, str, str], tuple[int, str]]]:
    return pools(4).run(run_changed)


def test_no_change_of_any_tensor_on_any_axis_goes_unnoticed(changed: list[dict[Any, tuple[int, str]]]) -> None:
    for (name, backward, axis, tensor, change), (receiver, error) in changed[0].items():
        where = f"{'backward' if backward else 'forward'} pass of layer 5: {tensor} of rank "
        key = name, backward, axis, tensor, change
        assert error.startswith(where), (key, error)
        assert f" arrived changed at rank {receiver} ({axis})" in error, (key, error)
    assert all(one == changed[0] for one in changed)


def test_every_axis_and_tensor_was_changed_in_both_passes(changed: list[dict[Any, tuple[int, str]]]) -> None:
    met = {key[1:4] for key in changed[0]}
    assert {axis for _, axis, _ in met} == {*AXES, "cp"}
    forward, backward = ({tensor for pass_, _, tensor in met if pass_ == which} for which in (False, True))
    assert forward == {"q", "k", "v", "out", "lse"}
    assert backward == {"q", "k", "v", "dout", "lse", "delta", "dq", "dk", "dv"}


def run_wrong(rank: int) -> list[str]:
    """On a worker: errors of a message that was packed wrongly, of NaN, of another mask, another shape."""
    case = Case(Plan(Grid(ring_outer=4)), SMALL)
    transfers = connected(None, case.plan.grid, "direct", CPU)
    wire = tap(transfers)
    passes = Passes(rank, case, transfers)
    done = passes.forward()

    def packed_wrongly(number: int, operands: Any) -> None:
        if rank == 1 and number == 0:
            message = operands[transfers_of(passes)[0].sends[0].operand]
            message.copy_(message.roll(SMALL.dtype.itemsize * SMALL.head_dim))

    wire.leaving = packed_wrongly
    errors = [error_of(passes.forward)]
    wire.leaving = None
    if rank == 2:
        passes.v[1, 0, 0, 0] = float("nan")
    errors.append(error_of(passes.forward))
    passes.v.nan_to_num_()
    if rank in (0, 3):
        passes.dout[0, 0, 0, 0] = float("inf")
    errors.append(error_of(lambda: passes.backward(done)))
    other = replace(passes.call, mask=Mask(left=200, right=0)) if rank == 2 else passes.call
    errors.append(error_of(lambda: passes.forward(other)))
    if rank == 3:
        passes.q, passes.k, passes.v = (x[:2] for x in (passes.q, passes.k, passes.v))
    errors.append(error_of(passes.forward))
    forget_groups()
    return errors


def transfers_of(passes: Passes) -> Any:
    """Transfers of the forward pass."""
    q, k, v = passes.q, passes.k, passes.v
    return passes.call.forward_pass(q, k, v, sinks=False).program.transfers


def test_what_is_wrong_is_named_on_every_rank(pools: Callable[[int], Pool]) -> None:
    every = pools(4).run(run_wrong)
    assert every == [every[0]] * 4
    packed, nan, infinite, mask, shape = every[0]
    where = "forward pass of layer 5: "
    assert packed.startswith(where)
    assert "of rank 1 arrived changed at rank " in packed
    assert packed.endswith(": received and sent data differ; test the network between these ranks")
    assert nan == f"{where}v of rank 2 has values that are not finite"
    assert infinite == "backward pass of layer 5: dout of ranks 0, 3 has values that are not finite"
    assert mask == f"{where}mask of rank 2 differs from that of ranks 0, 1, 3"
    assert shape == f"{where}shape of rank 3 differs from that of ranks 0-2"


def run_unchanged(rank: int, cases: list[Case]) -> list[bool]:
    """On a worker: whether verified passes give what others give, to the last bit."""
    same = []
    for case in cases:
        passes = Passes(rank, case, connected(None, case.plan.grid, "direct", CPU))
        verified = passes.call
        results = []
        for call in (verified, replace(verified, verify=False)):
            passes.call = call
            done = passes.forward()
            results.append([*done[:2], *passes.backward(done)])
        same.append(all(torch.equal(a, b) for a, b in zip(*results, strict=True)))
        forget_groups()
    return same


def test_what_is_right_is_not_changed(pools: Callable[[int], Pool]) -> None:
    cases = [Case(plan, SMALL) for plan in PLANS.values()] + MASKED
    for same in pools(4).run(run_unchanged, cases):
        assert same == [True] * len(cases)


# --- the checksum ---


@cache
def rows(dtype: torch.dtype) -> Tensor:
    return torch.randn(6, 2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_and_strides_do_not_matter(dtype: torch.dtype) -> None:
    x = rows(dtype)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert checksum([x]) == checksum([strided[:1], strided[1:4], strided[4:]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_bit_matters(dtype: torch.dtype) -> None:
    x = rows(dtype)
    bits = x.flatten()[:4].view(torch.uint8)
    for number in range(8 * len(bits)):
        changed = x.clone()
        changed.view(-1)[:4].view(torch.uint8)[number // 8] ^= 1 << number % 8
        assert checksum([changed]) != checksum([x])


@pytest.mark.parametrize("dim", range(4))
def test_order_matters_in_every_dimension(dim: int) -> None:
    x = rows(torch.bfloat16)
    assert checksum([x.flip(dim)]) != checksum([x])
    assert checksum([x.roll(1, dim)]) != checksum([x])


def test_large_tensors_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checksum([rows(torch.float32)])
    monkeypatch.setattr("megatron_wallfacer.engine.verify._ELEMENTS", 30)
    assert checksum([rows(torch.float32)]) == whole
