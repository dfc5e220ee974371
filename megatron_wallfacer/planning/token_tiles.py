"""The number of tiles of tokens of the head and the MLPs: the fewest that take their buffers off the peak."""

from __future__ import annotations

from dataclasses import replace

from megatron_wallfacer.planning.inventory import MOMENTS, Activations, Moment, bytes_at, inventory

#: Ratio to the fewest bytes up to which more tiles do not lower a moment's bytes.
NEAR = 1.01
#: Fewest rows of a tile: below, matrix kernels are slower, and weight gradients are rewritten for little memory.
LEAST_ROWS = 1024


def most_tiles(rows: int) -> int:
    """Return the largest power of two that leaves :data:`LEAST_ROWS` rows to each tile."""
    return 1 << max(0, (rows // LEAST_ROWS).bit_length() - 1)


def tiled(work: Activations, *, loss: bool = True, mlp: bool = True) -> Activations:
    """Return activations with the fewest tiles that take the buffers of head and MLP off the peak.

    The MLP comes first, without regard to the head. If no number of tiles is enough, the result has the fewest tiles
    that come near the least bytes.

    Args:
        work: activations of a micro-batch; its own tiles are kept where none are chosen.
        loss: choose tiles of the head.
        mlp: choose tiles of the MLPs.
    """
    if mlp:
        work = _fewest(work, "mlp_tiles", "mlp", ("head",))
    return _fewest(work, "loss_tiles", "head", ()) if loss else work


def recomputed_part(work: Activations) -> float:
    """Return the FLOPs that tiles recompute, over those of all matrix products of a step without attention."""
    model, tokens = work.model, work.tokens
    recomputed = 0.0
    if work.loss_tiles > 1:
        recomputed += tokens * model.head_flops()
    if work.mlp_tiles > 1:
        recomputed += model.layers * tokens * model.mlp_flops()
    return recomputed / (3.0 * tokens * (model.layers * model.matmul_flops() + model.head_flops()))


def _fewest(work: Activations, name: str, moment: Moment, ignored: tuple[Moment, ...]) -> Activations:
    tiles, most = 1, most_tiles(work.tokens)
    least = NEAR * bytes_at(inventory(replace(work, **{name: most})), moment)
    while True:
        work = replace(work, **{name: tiles})
        buffers = inventory(work)
        others = max(bytes_at(buffers, other) for other in MOMENTS if other != moment and other not in ignored)
        if tiles >= most or bytes_at(buffers, moment) <= max(others, least):
            return work
        tiles *= 2
