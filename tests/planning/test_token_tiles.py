"""The fewest tiles that take head and MLPs off the peak."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.inventory import MOMENTS, Activations, bytes_at, inventory, peak
from megatron_wallfacer.planning.model import MODELS
from megatron_wallfacer.planning.token_tiles import LEAST_ROWS, most_tiles, tiled

WORK = Activations(MODELS["llama3-8b"], 131072, layers=32, recompute="keep-attention")


@pytest.mark.parametrize("attention_gb", [0.0, 5.0, 20.0])
def test_one_tile_fewer_would_be_the_peak(attention_gb: float) -> None:
    found = tiled(replace(WORK, attention=AttentionMemory(backward=attention_gb * 1e9)))
    buffers = inventory(found)
    assert found.loss_tiles > 1
    assert bytes_at(buffers, "head") <= max(bytes_at(buffers, one) for one in MOMENTS if one != "head")
    halved = inventory(replace(found, loss_tiles=found.loss_tiles // 2))
    assert peak(halved)[0] == "head"
    if found.mlp_tiles > 1:
        halved = inventory(replace(found, mlp_tiles=found.mlp_tiles // 2))
        assert bytes_at(halved, "mlp") > bytes_at(buffers, "attention")


@pytest.mark.parametrize("attention_gb", [0.0, 5.0, 30.0])
def test_tiled_mlps_save_less_where_nothing_else_is_recomputed(attention_gb: float) -> None:
    """Two tiles are recomputed in backward. Their activations are then not saved, whichever part has the peak."""
    attention = AttentionMemory(backward=attention_gb * 1e9)
    found = tiled(replace(WORK, tokens=16384, recompute="none", attention=attention), loss=False)
    peaks = [peak(inventory(replace(found, mlp_tiles=tiles)))[1] for tiles in (1, 2, 4, 8, 16)]
    assert found.mlp_tiles > 1
    assert peak(inventory(found))[1] <= 1.01 * min(peaks) < peaks[0]


def test_larger_buffers_of_attention_need_fewer_tiles() -> None:
    few, many = (tiled(replace(WORK, attention=AttentionMemory(backward=size))) for size in (30e9, 1e9))
    assert (few.loss_tiles, few.mlp_tiles) < (many.loss_tiles, many.mlp_tiles)


def test_only_what_is_asked_for_is_tiled() -> None:
    assert tiled(WORK, loss=False).loss_tiles == 1
    assert tiled(WORK, mlp=False).mlp_tiles == 1


def test_tiles_keep_their_rows() -> None:
    assert [most_tiles(rows) for rows in (1, 1023, 1024, 4095, 131072)] == [1, 1, 1, 2, 128]
    few = tiled(replace(WORK, tokens=2048))
    assert 2048 // max(few.loss_tiles, few.mlp_tiles) >= LEAST_ROWS
