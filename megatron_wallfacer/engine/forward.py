"""The forward pass: a loop over the steps of a schedule."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_wallfacer.engine.merge import PartialOutput, merge_stacked
from megatron_wallfacer.engine.runtime import Arrivals, Runtime, tile_slices
from megatron_wallfacer.engine.transfers import Tensors
from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.moves import KV, Combine, Q
from megatron_wallfacer.schedule.schedule import Schedule
from megatron_wallfacer.schedule.tiles import Tile


def run_forward(schedule: Schedule, runtime: Runtime, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of this rank's queries to everyone's keys.

    Args:
        schedule: this rank's forward schedule.
        runtime: transfers, kernel, scale.
        q, k, v: local shards, sbhd.

    Returns:
        out (sbhd, dtype of q), lse ``[tokens, batch, q_heads]``, and the query block of the team.
    """
    chunk = q.shape[0] // CHUNKS_PER_RANK
    arrivals = Arrivals(schedule, runtime, {"q": q, "k": k, "v": v})
    kv_block = arrivals.take(KV)
    partial = PartialOutput(len(schedule.steps[0].q_ranks), q, v.shape[-1], accumulation_dtype(q.dtype))
    q_block = None
    for step in schedule.steps:
        incoming = runtime.start(step.hop, kv_block)
        if q_block is None:
            (q_block,) = arrivals.take(Q)
        _run_tiles(step.tiles, chunk, runtime, q_block, kv_block, partial)
        if incoming is not None:
            kv_block = incoming.wait()
    out, lse = partial.out, partial.lse
    for move in schedule.epilogue:
        assert isinstance(move, Combine)
        out, lse = merge_stacked(*runtime.transfers.exchange(move, (out, lse)).wait())
    return out.to(q.dtype), lse, q_block


def _run_tiles(
    tiles: Sequence[Tile], chunk: int, runtime: Runtime, q_block: Tensor, kv_block: Tensors, partial: PartialOutput
) -> None:
    """Merge each tile's result. A function of its own, so that no slice of a block outlives the step."""
    for tile in tiles:
        rows, cols = tile_slices(tile, chunk)
        k_cols, v_cols = (tensor[cols] for tensor in kv_block)
        # Not kept in a name: a tile's result must be gone before the next tile is computed.
        partial.add(
            rows, *runtime.kernel.forward(q_block[rows], k_cols, v_cols, causal=tile.causal, scale=runtime.scale)
        )
