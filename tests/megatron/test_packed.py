"""Packed sequences: what attention is told of a batch, and where a rank's tokens stand in their documents."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.any_device.thd import partitioned_indices
from megatron_wallfacer.megatron.core_attention import core_attention_class
from megatron_wallfacer.megatron.hooks.rope import positions_in_documents, rope_hook
from megatron_wallfacer.megatron.packed import Documents, as_laid_out, shards_whole_sequence
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.megatron.unsupported import unsupported
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.schemes import make_plan
from tests.megatron.test_core_attention import CAUSAL, PlannedState, build, config, dense, q

#: Of one token, of a few, and of more than a rank holds.
ENDS = (0, 1, 4, 25, 32)


def packed(ends: tuple[int, ...] = ENDS, **changes: object) -> SimpleNamespace:
    """As Megatron's PackedSeqParams: one tensor of boundaries for queries and keys."""
    boundaries = torch.tensor(ends, dtype=torch.int32)
    plain = {"qkv_format": "thd", "cu_seqlens_q": boundaries, "cu_seqlens_kv": boundaries}
    return SimpleNamespace(**(plain | {"cu_seqlens_q_padded": None, "cu_seqlens_kv_padded": None} | changes))


# --- what attention is told ---


@pytest.mark.parametrize(("inter", "sft", "whole"), [(False, False, False), (True, False, True), (True, True, False)])
def test_what_megatrons_batches_cut(inter: bool, sft: bool, whole: bool) -> None:
    assert shards_whole_sequence(SimpleNamespace(dataloader_inter_document_masking=inter, sft=sft)) is whole
    assert shards_whole_sequence(SimpleNamespace(sft=sft)) is False  # Megatron before 0.19


def test_boundaries_are_read_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or tolist(tensor))
    documents, first, second = Documents(2, "sequence"), packed(), packed((0, 32))
    for _ in range(3):
        assert documents.read(first, 16, "layer 1").documents == ENDS
    assert len(reads) == 1
    assert documents.read(second, 16, "layer 1").documents is None  # a single document is a plain sequence
    assert documents.read(first, 16, "layer 1").documents == ENDS
    assert len(reads) == 3
    first.cu_seqlens_q[2] = 8  # written in place
    assert documents.read(first, 16, "layer 1").documents == (0, 1, 8, 25, 32)


def test_repeated_boundaries_are_no_documents() -> None:
    assert Documents(1, "per_document").read(packed((0, 0, 8, 8, 32, 32)), 32, "").documents == (0, 8, 32)


def test_a_shift_sees_documents_with_their_padding() -> None:
    padded, batch = torch.tensor([0, 8, 32]), packed((0, 5, 29))
    assert as_laid_out(batch) is batch
    batch.cu_seqlens_q_padded = padded
    assert as_laid_out(batch).cu_seqlens_q is padded
    assert batch.cu_seqlens_q is not padded


def test_documents_with_their_padding_are_what_lies_in_memory() -> None:
    padded = torch.tensor([0, 8, 32])
    batch = packed((0, 5, 29), cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded)
    assert Documents(2, "per_document").read(batch, 16, "") == ((0, 8, 32), True)
    assert Documents(2, "per_document").read(packed((0, 8, 32)), 16, "") == ((0, 8, 32), False)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (packed(cu_seqlens_kv=torch.tensor([0, 32])), "layer 2: .* the same documents in queries and keys"),
        (packed((0, 8, 30)), r"layer 2: cu_seqlens \[\.\.\., 30\]: must be a list that ends with 32, the number of"),
        (packed((0, 6, 32)), "layer 2: cu_seqlens with a document of 6 tokens: must be padded to multiples of 2P = 4"),
        (packed((0, 16, 8, 32)), "layer 2: cu_seqlens .*: must be ascending"),
    ],
)
def test_a_batch_that_is_not_supported_is_rejected(batch: SimpleNamespace, message: str) -> None:
    with pytest.raises(WallfacerError, match=message):
        Documents(2, "per_document").read(batch, 16, "layer 2")


# --- attention on one rank against the formula ---


def thd(heads: int = 2, width: int = 8) -> torch.Tensor:
    return torch.randn(ENDS[-1], heads, width, dtype=torch.float64)


def same_document() -> torch.Tensor:
    """[queries, keys]: whether they are of one document, and the key not after the query."""
    number = torch.bucketize(torch.arange(ENDS[-1]), torch.tensor(ENDS[1:]), right=True)
    return (number[:, None] == number[None, :]).tril()


@pytest.mark.parametrize("kind", ["vanilla", "learnable"])
@pytest.mark.parametrize("window", [None, (3, 0)])
def test_documents_do_not_see_each_other(window: tuple[int, int] | None, kind: str) -> None:
    query, key, value = thd(), thd(), thd(width=6)
    rows = torch.arange(ENDS[-1])
    live = same_document() & (rows[:, None] - rows[None, :] <= (99 if window is None else window[0]))
    module = build(config=config(window_size=window, softmax_type=kind), v_channels=6)
    out = module(query, key, value, None, packed_seq_params=packed())
    want = dense(*(x.unsqueeze(1) for x in (query, key, value)), live, getattr(module, "softmax_offset", None))
    assert out.shape == (ENDS[-1], 2 * 6)
    torch.testing.assert_close(out, want.squeeze(1).flatten(1))


def test_padding_is_rejected_where_it_would_be_seen() -> None:
    batch = packed(cu_seqlens_q_padded=torch.tensor(ENDS))
    build()(thd(), thd(), thd(), None, packed_seq_params=batch)
    everything = build(attn_mask_type=SimpleNamespace(name="no_mask"))
    with pytest.raises(WallfacerError, match="layer 3: padded documents need a causal mask"):
        everything(thd(), thd(), thd(), None, packed_seq_params=batch)


def test_the_layout_that_attention_computes_may_be_named() -> None:
    assert unsupported("call", packed(cp_partition_mode="zigzag"), 2) is None
    # On one rank all layouts are one.
    assert unsupported("call", packed(cp_partition_mode="contiguous"), 1) is None
    message = unsupported("call", packed(attention_cp_layout="striped"), 2)
    assert message.startswith("attention_cp_layout striped: must be zigzag, because")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cp_group": object()}, r"layer 3: cp_group .*: must be None, .*leave --hybrid-context-parallel out"),
        ({"local_cp_size": 1}, r"layer 3: local_cp_size 1: must be None, .*leave --hybrid-context-parallel out"),
        ({"qkv_format": "sbhd"}, "layer 3: qkv_format sbhd: must be thd"),
    ],
)
def test_a_call_with_another_kind_of_packing_is_an_error(changes: dict[str, object], message: str) -> None:
    with pytest.raises(WallfacerError, match=message):
        build()(thd(), thd(), thd(), None, packed_seq_params=packed(**changes))


def test_another_layout_without_documents_is_rejected() -> None:
    settings = Settings(make_plan("ulysses", 2))
    state = PlannedState((0, 19, 2), torch.device("cpu"), settings=settings)
    named = config(cp_partition_mode="contiguous")
    layer = core_attention_class(state)(named, 3, CAUSAL, "self", pg_collection=SimpleNamespace(cp=1))
    with pytest.raises(WallfacerError, match="layer 3: cp_partition_mode contiguous: must be zigzag"):
        layer(q(), q(), q(), None)


# --- which tokens are a rank's, and where they stand ---


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_cut_documents_are_cut_as_the_mask_says(cp_size: int) -> None:
    """The stand-in for TransformerEngine against the layout that the engine takes packed batches for."""
    ends, seen = (0, 8, 8, 32, 40, 64), []
    for rank in range(cp_size):
        found = partitioned_indices(torch.tensor(ends), 64, cp_size, rank)
        seen += found.tolist()
        mask = Mask(documents=(0, 8, 32, 40, 64), shard_mode="per_document")
        chunks = rank, 2 * cp_size - 1 - rank
        want = []
        for document, (first, end) in enumerate(pairwise(mask.boundaries(rank, cp_size, 32 // cp_size))):
            for chunk in chunks:
                start = mask.documents[document] + chunk * (end - first)
                want += range(start, start + end - first)
        assert found.tolist() == want
    assert sorted(seen) == list(range(64))


@pytest.mark.parametrize(("ends", "message"), [((0, 6, 32), "6 tokens cannot be cut"), ((0, 8), "end at 8")])
def test_documents_that_cannot_be_cut(ends: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partitioned_indices(torch.tensor(ends), 32, 2, 0)


def global_positions(rank: int, cp_size: int, total: int) -> list[int]:
    size = total // (2 * cp_size)
    return [c * size + i for c in (rank, 2 * cp_size - 1 - rank) for i in range(size)]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_positions_are_counted_in_each_document(cp_size: int) -> None:
    counted = [i for start, end in pairwise(ENDS) for i in range(end - start)]
    for rank in range(cp_size):
        found = positions_in_documents(torch.tensor((*ENDS, 32)), 32 // cp_size, rank, cp_size)
        assert found.tolist() == [counted[position] for position in global_positions(rank, cp_size, 32)]


@pytest.fixture
def rotate() -> Callable[..., torch.Tensor]:
    """Megatron's own."""
    from megatron.core.models.common.embeddings import rope_utils

    return rope_utils._apply_rotary_pos_emb_thd


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_tokens_are_turned_as_on_one_rank(rotate: Callable[..., torch.Tensor], cp_size: int, interleaved: bool) -> None:
    """Also where the longest document is as long as a rank's part, which Megatron takes for another kind of table."""
    ends, t = torch.tensor(ENDS), thd()
    for longest in (21, 32, 32 // cp_size + 21):
        freqs = torch.randn(longest, 1, 1, 4, dtype=torch.float64)
        options = {"rotary_interleaved": interleaved, "mscale": 1.5}
        whole = torch.cat(
            [
                rotate(t[a:b], torch.tensor([0, b - a]), freqs[: b - a], cp_group=Group(0, 1), **options)
                for a, b in pairwise(ENDS)
            ]
        )
        for rank in range(cp_size):
            mine = global_positions(rank, cp_size, 32)
            found = rope_hook.run(None, rotate, t[mine], ends, freqs, cp_group=Group(rank, cp_size), **options)
            torch.testing.assert_close(found, whole[mine])


def test_megatrons_own_turning_fails_there(rotate: Callable[..., torch.Tensor]) -> None:
    """Why there is a hook. When this fails Megatron has mended it, or turns by wrong angles in silence."""
    mine, freqs = global_positions(1, 2, 32), torch.randn(21, 1, 1, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        rotate(thd()[mine], torch.tensor(ENDS), freqs, cp_group=Group(1, 2))


def test_on_one_rank_megatron_turns_by_itself() -> None:
    calls = []
    rope_hook.run(None, lambda *args, **kwargs: calls.append((args, kwargs)), 1, 2, 3, cp_group=Group(0, 1))
    assert calls[0][0] == (1, 2, 3)
    assert calls[0][1]["cp_group"].size() == 1


class Group:
    """A context-parallel group, as far as a rotary embedding asks."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank
