"""How many tiles of tokens the head and the MLPs need: the fewest that take their buffers off the peak."""

from __future__ import annotations

from dataclasses import replace

from megatron_wallfacer.planning.inventory import MOMENTS, Activations, Moment, bytes_at, inventory

#: A moment this close to its least bytes is as small as tiles make it.
NEAR = 1.01
#: Fewest rows of a tile: below them matrix kernels are slower, and weight gradients are rewritten for little.
LEAST_ROWS = 1024


def most_tiles(rows: int) -> int:
    """Return the largest power of two that leaves :data:`LEAST_ROWS` rows to each tile."""
    return 1 << max(0, (rows // LEAST_ROWS).bit_length() - 1)


def tiled(work: Activations, *, loss: bool = True, mlp: bool = True) -> Activations:
    """Return the micro-batch with the fewest tiles that take the head's and the MLP's buffers off the peak.

    The MLP comes first, and the head is not counted then. Where no number of tiles does, it is the fewest that come
    near.

    Args:
        work: the micro-batch; its own tiles are kept where none are chosen.
        loss: choose tiles of the head.
        mlp: choose tiles of the MLPs.
    """
    if mlp:
        work = _fewest(work, "mlp_tiles", "mlp", ("head",))
    return _fewest(work, "loss_tiles", "head", ()) if loss else work


def _fewest(work: Activations, name: str, moment: Moment, apart: tuple[Moment, ...]) -> Activations:
    tiles, most = 1, most_tiles(work.tokens)
    least = NEAR * bytes_at(inventory(replace(work, **{name: most})), moment)
    while True:
        work = replace(work, **{name: tiles})
        buffers = inventory(work)
        others = max(bytes_at(buffers, other) for other in MOMENTS if other != moment and other not in apart)
        if tiles >= most or bytes_at(buffers, moment) <= max(others, least):
            return work
        tiles *= 2
