"""Blocks: sizes, the one buffer in which tensors travel, and rows by chunk."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_wallfacer.engine.blocks import Block, Sizes, loaded, select
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ops import DKV, DOUT, DQ, KV, PARTIAL_OUT, Q, Value
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import forward_schedule

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PAYLOADS = (Q, KV, DOUT, PARTIAL_OUT, DQ, DKV)


def sizes(
    *,
    chunk: int = 3,
    batch: int = 1,
    heads: tuple[int, int] = (4, 2),
    parts: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Sizes:
    return Sizes(chunk, batch, *heads, 5, 7, parts, dtype, torch.device("cpu"))


def numbered(of: Sizes, payload: tuple[str, ...], chunks: tuple[int, ...]) -> Block:
    """A block in which each row of a chunk holds the number of the chunk."""
    block = of.empty(payload, chunks, 0)
    for tensor in block.tensors.values():
        for index, chunk in enumerate(chunks):
            tensor[of.rows((index, index + 1))] = chunk
    return block


def chunk_of_rows(block: Block, tensor: str, of: Sizes) -> list[float]:
    """The number that all of a chunk's rows hold."""
    found = block.tensors[tensor].flatten(1).unflatten(0, (-1, of.chunk)).flatten(1)
    assert (found == found[:, :1]).all()
    return found[:, 0].tolist()


# --- sizes ---


def test_sizes_of_a_call() -> None:
    q = torch.zeros(6, 2, 4, 8, dtype=torch.bfloat16)
    assert Sizes.of(q, 2, 8, 5, 2) == Sizes(3, 2, 4, 2, 8, 5, 2, torch.bfloat16, torch.device("cpu"))


def test_shapes_by_tensor() -> None:
    block = sizes(batch=2).empty(("q", "k", "v", "dq", "dk", "dv", "out", "dout", "lse", "delta"), (0, 1), 0)
    shapes = {name: tuple(tensor.shape) for name, tensor in block.tensors.items()}
    statistics = (6, 2, 4)
    assert shapes == {
        **dict.fromkeys(("q", "dq"), (6, 2, 4, 5)),
        **dict.fromkeys(("k", "dk"), (6, 2, 2, 5)),
        **dict.fromkeys(("v", "dv"), (6, 2, 2, 7)),
        **dict.fromkeys(("out", "dout"), (6, 2, 4, 7)),
        **dict.fromkeys(("lse", "delta"), statistics),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_statistics_are_in_the_accumulation_dtype(dtype: torch.dtype) -> None:
    block = sizes(dtype=dtype).empty(("q", "k", "v", "dout", "out", "lse", "delta", "dq", "dk", "dv"), (0,), 0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"q", "k", "v", "dout"}
    assert {name: tensor.dtype for name, tensor in block.tensors.items()} == {
        name: dtype if name in inputs else wide for name in block.tensors
    }


def test_heads_of_the_parts_are_all_heads_once() -> None:
    of = sizes(heads=(8, 4), parts=4)
    for tensor, heads in (("q", 8), ("k", 4)):
        slices = [of.heads(tensor, part) for part in range(4)]
        assert [head for where in slices for head in range(*where.indices(heads))] == list(range(heads))


def test_parts_share_kv_heads_where_there_are_fewer() -> None:
    of = sizes(heads=(8, 2), parts=4)
    assert [of.heads("dv", part) for part in range(4)] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]


# --- the buffer ---


@pytest.mark.parametrize("payload", PAYLOADS, ids=" ".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("chunk", "batch", "heads"), [(1, 1, (1, 1)), (3, 1, (3, 1)), (5, 3, (4, 2))])
def test_the_tensors_of_a_block_lie_side_by_side_in_one_buffer(
    payload: tuple[str, ...], dtype: torch.dtype, chunk: int, batch: int, heads: tuple[int, int]
) -> None:
    """Odd sizes too: with bfloat16 no view of the statistics may begin at a multiple of two only."""
    block = sizes(chunk=chunk, batch=batch, heads=heads, dtype=dtype).empty(payload, (0, 3, 4), 0)
    start, end = block.packet.data_ptr(), block.packet.data_ptr() + block.packet.nbytes
    ranges = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in block.tensors.values())
    assert block.packet.dtype == torch.uint8
    assert (ranges[0][0], ranges[-1][1]) == (start, end)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    for tensor in block.tensors.values():
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % tensor.element_size() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("payload", PAYLOADS, ids=" ".join)
def test_unpacking_finds_what_was_packed(payload: tuple[str, ...], dtype: torch.dtype) -> None:
    of = sizes(dtype=dtype)
    packed = of.empty(payload, (1, 6), 0)
    for tensor in packed.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    unpacked = of.unpack(Value(payload, (1, 6), 0), packed.packet.clone())
    assert unpacked.chunks == packed.chunks
    assert unpacked.tensors.keys() == packed.tensors.keys()
    assert all(torch.equal(unpacked.tensors[name], tensor) for name, tensor in packed.tensors.items())


def test_unpacking_makes_no_copy() -> None:
    of, value = sizes(), Value(KV, (1, 6), 0)
    packed = of.like(value)
    packed.packet.zero_()
    of.unpack(value, packed.packet).tensors["v"].fill_(1)
    assert (packed.tensors["v"] == 1).all()
    assert (packed.tensors["k"] == 0).all()


def test_a_packet_of_another_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        sizes().unpack(Value(KV, (1, 6), 0), torch.zeros(8, dtype=torch.uint8))


def test_some_of_a_blocks_tensors_are_views_and_no_packet() -> None:
    block = sizes().empty(DOUT, (0,), 0)
    some = select(block, ("dout",))
    assert some.packet is None
    assert some.tensors["dout"] is block.tensors["dout"]
    assert select(block, ("lse", "delta", "dout")) is block


def test_own_rows_are_views_of_the_heads_of_a_part() -> None:
    plan = Plan(Grid(ring_outer=2))
    schedule = forward_schedule(plan, 1, groups=2)
    q, k, v = (torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, heads, 8).clone() for heads in (4, 2, 2))
    local, of = {"q": q, "k": k, "v": v}, Sizes.of(q, 2, 8, 8, 2)
    block = loaded(schedule, "own.kv.1", of, local)
    assert block.chunks == (1, 2)
    assert block.packet is None
    assert block.tensors["k"].data_ptr() == k[:, :, 1:].data_ptr()
    assert block.tensors["v"].shape == (6, 1, 1, 8)


# --- rows by chunk ---


@pytest.mark.parametrize(
    ("source", "into", "chunks", "ranges"),
    [
        ((0, 7), (0, 7), (0, 7), [((0, 2), (0, 2))]),
        ((0, 7), (0, 3, 4, 7), (0, 7), [((0, 1), (0, 1)), ((1, 2), (3, 4))]),
        ((3, 4), (0, 3, 4, 7), (3, 4), [((0, 2), (1, 3))]),
        ((0, 3, 4, 7), (3, 4), (3, 4), [((1, 3), (0, 2))]),
        ((0, 1, 2, 3), (0, 2), (0, 2), [((0, 1), (0, 1)), ((2, 3), (1, 2))]),
        ((0, 1, 2, 3, 4), (1, 2, 4), (1, 2, 4), [((1, 3), (0, 2)), ((4, 5), (2, 3))]),
        ((0, 1, 5), (0, 1, 3, 4, 5), (0, 1, 5), [((0, 2), (0, 2)), ((2, 3), (4, 5))]),
        ((2, 5), (2, 5), (5,), [((1, 2), (1, 2))]),
        ((2, 5), (2, 5), (), []),
    ],
)
def test_ranges_of_common_rows(
    source: tuple[int, ...],
    into: tuple[int, ...],
    chunks: tuple[int, ...],
    ranges: list[tuple[tuple[int, int], tuple[int, int]]],
) -> None:
    of = sizes()
    found = of.common(of.empty(Q, source, 0), of.empty(Q, into, 0), chunks)
    assert list(found) == ranges


def test_common_ranges_of_any_two_blocks_hold_the_same_chunks_each_once() -> None:
    of, chunks = sizes(chunk=1), range(5)
    blocks = [one for size in range(1, 6) for one in itertools.combinations(chunks, size)]
    for source, into in itertools.product(blocks, repeat=2):
        both = sorted(set(source) & set(into))
        found = list(of.common(of.empty(Q, source, 0), of.empty(Q, into, 0), both))
        assert [chunk for (first, end), _ in found for chunk in source[first:end]] == both
        assert [chunk for _, (first, end) in found for chunk in into[first:end]] == both
        for (_, end), (start, _) in itertools.pairwise(there for there, _ in found):
            assert end < start or into.index(source[start]) > into.index(source[end - 1]) + 1


def test_copied_rows_stand_at_their_chunks_and_nothing_else_changes() -> None:
    of = sizes()
    into = numbered(of, KV, (0, 3, 4, 7))
    for tensor in into.tensors.values():
        tensor.fill_(-1)
    of.copy_rows(numbered(of, KV, (3, 4, 6, 7)), into, (3, 7), ("k",))
    assert chunk_of_rows(into, "k", of) == [-1, 3, -1, 7]
    assert chunk_of_rows(into, "v", of) == [-1, -1, -1, -1]


def test_sources_fill_a_whole() -> None:
    of = sizes()
    whole = of.empty(KV, (0, 1, 6, 7), 0)
    for chunks in ((1, 6), (0, 7)):
        source = numbered(of, KV, chunks)
        of.copy_rows(source, whole, source.chunks, KV)
    assert chunk_of_rows(whole, "k", of) == chunk_of_rows(whole, "v", of) == [0, 1, 6, 7]
