"""The backward pass: a loop over the steps of a schedule.

Both sides of the square have inputs and gradients; one side rides, the other stays. The loop is the
same whichever it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_wallfacer.engine.merge import surrogate_output
from megatron_wallfacer.engine.runtime import Arrivals, Runtime, tile_slices
from megatron_wallfacer.engine.transfers import Tensors
from megatron_wallfacer.schedule.layout import CHUNKS_PER_RANK
from megatron_wallfacer.schedule.moves import DKV, KV, Q_BACKWARD, Hop
from megatron_wallfacer.schedule.schedule import Schedule
from megatron_wallfacer.schedule.tiles import Tile

_INPUTS = {"q": Q_BACKWARD, "kv": KV}


def run_backward(schedule: Schedule, runtime: Runtime, local: Mapping[str, Tensor]) -> Tensors:
    """Gradients of this rank's q, k, v.

    Args:
        schedule: this rank's backward schedule.
        runtime: transfers, kernel, scale.
        local: shards ``q k v out lse dout``, sbhd; ``q`` is the team's block if the schedule was built with ``q_kept``.

    Returns:
        dq, dk, dv, sbhd, in the accumulation dtype.
    """
    chunk = local["k"].shape[0] // CHUNKS_PER_RANK
    delta = (local["dout"].to(local["lse"].dtype) * local["out"]).sum(-1)
    arrivals = Arrivals(schedule, runtime, {**local, "delta": delta})
    rider = schedule.rider
    resident = "q" if rider == "kv" else "kv"
    blocks = {rider: arrivals.take(_INPUTS[rider])}
    grads: dict[str, Tensors] = {}
    kept = travelling = stand_in = None
    for index, step in enumerate(schedule.steps):
        incoming = runtime.start(step.hop, blocks[rider])
        arriving = runtime.start(step.grad_hop, travelling)
        if index == 0:
            blocks[resident] = arrivals.take(_INPUTS[resident])
            grads[resident] = _zero_grads(resident, blocks[resident], delta.dtype)
        grads[rider] = _zero_grads(rider, blocks[rider], delta.dtype)
        if index == 0 or rider == "q":
            stand_in = _stand_in(blocks["q"])
        _run_tiles(step.tiles, chunk, runtime, blocks, stand_in, grads)
        if arriving is not None:
            _add(grads[rider], arriving.wait())
        if index == 0 and schedule.keeps_first:
            kept = grads[rider]
        else:
            travelling = grads[rider]
        if incoming is not None:
            blocks[rider] = incoming.wait()
    grads[rider] = travelling if kept is None else kept
    return _bring_home(schedule, runtime, grads, travelling)


def _bring_home(schedule: Schedule, runtime: Runtime, grads: dict[str, Tensors], travelling: Tensors | None) -> Tensors:
    for move in schedule.epilogue:
        side = "kv" if move.payload == DKV else "q"
        if isinstance(move, Hop):
            arrived = runtime.transfers.hop(move, travelling).wait()
            grads[side] = _add(grads[side], arrived) if schedule.keeps_first else arrived
        else:
            grads[side] = runtime.transfers.reduce(move, grads[side]).wait()
    return (*grads["q"], *grads["kv"])


def _stand_in(q_block: Tensors) -> Tensor:
    _, dout, _, delta = q_block
    return surrogate_output(dout, delta)


def _run_tiles(
    tiles: Sequence[Tile],
    chunk: int,
    runtime: Runtime,
    blocks: Mapping[str, Tensors],
    stand_in: Tensor,
    grads: Mapping[str, Tensors],
) -> None:
    q, dout, lse, _ = blocks["q"]
    for tile in tiles:
        rows, cols = tile_slices(tile, chunk)
        dout_rows, q_rows, out_rows, lse_rows = (tensor[rows] for tensor in (dout, q, stand_in, lse))
        k_cols, v_cols = (tensor[cols] for tensor in blocks["kv"])
        sums = (*(grad[rows] for grad in grads["q"]), *(grad[cols] for grad in grads["kv"]))
        # Not kept in a name: a tile's result must be gone before the next tile is computed.
        _add(
            sums,
            runtime.kernel.backward(
                dout_rows, q_rows, k_cols, v_cols, out_rows, lse_rows, causal=tile.causal, scale=runtime.scale
            ),
        )


def _zero_grads(side: str, block: Tensors, dtype: torch.dtype) -> Tensors:
    wanted = block[:1] if side == "q" else block
    return tuple(torch.zeros_like(tensor, dtype=dtype) for tensor in wanted)


def _add(sums: Tensors, parts: Tensors) -> Tensors:
    for total, part in zip(sums, parts, strict=True):
        total.add_(part)
    return sums
