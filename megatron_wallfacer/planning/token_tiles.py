"""The number of token tiles of the head and the MLPs: the fewest that remove their buffers from the memory peak."""

from __future__ import annotations

from dataclasses import replace

from megatron_wallfacer.planning.inventory import MOMENTS, Activations, Moment, bytes_at, inventory

#: Ratio to the fewest bytes at a moment below which more tiles are not useful.
NEAR = 1.01
#: Fewest rows of a tile. With fewer rows, matrix kernels are slower, and more tiles save little memory.
LEAST_ROWS = 1024


def most_tiles(rows: int) -> int:
    """Return the largest power of two of tiles with at least :data:`LEAST_ROWS` rows each."""
    return 1 << max(0, (rows // LEAST_ROWS).bit_length() - 1)


def tiled(work: Activations, *, loss: bool = True, mlp: bool = True) -> Activations:
    """Return activations with the fewest tiles that remove the buffers of head and MLP from the memory peak.

    Tiles of the MLP are chosen first, without regard to the head. If no number of tiles suffices, the result has the
    fewest tiles whose bytes are near the minimum. Numbers of tiles that are not to be chosen stay the same.
    """
    if mlp:
        work = _fewest(work, "mlp_tiles", "mlp", ("head",))
    return _fewest(work, "loss_tiles", "head", ()) if loss else work


def recomputed_part(work: Activations) -> float:
    """Return the FLOPs that tiles recompute, relative to all matrix products of a step without attention."""
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
