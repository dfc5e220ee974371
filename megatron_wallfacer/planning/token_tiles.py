"""Numbers of token tiles that lower the memory peaks of the LM head and the MLPs."""

from __future__ import annotations

from dataclasses import replace

from megatron_wallfacer.planning.inventory import MOMENTS, Activations, Moment, bytes_at, inventory

#: Ratio to the fewest bytes at a moment below which more tiles are not useful.
NEAR = 1.01
#: Fewest rows of a tile. With fewer rows, matrix kernels are slower, and more tiles save little memory.
LEAST_ROWS = 1024


def most_tiles(rows: int) -> int:
    """Return the largest number of tiles, a power of two, with at least :data:`LEAST_ROWS` rows per tile."""
    return 1 << max(0, (rows // LEAST_ROWS).bit_length() - 1)


def tiled(work: Activations, *, loss: bool = True, mlp: bool = True) -> Activations:
    """Choose the numbers of token tiles for LM head and MLPs, and return a copy of ``work`` with these numbers.

    The number for MLPs is chosen first, without regard to the LM head. The number of tiles doubles until the tiles no
    longer determine the step's memory peak, or until more tiles would save less than 1 % (:data:`NEAR`) of their own
    memory. It doubles further if the largest number of tiles would lower the peak of the other parts by more than 1 %.
    ``loss`` and ``mlp`` state whether to choose the tiles of the LM head and of the MLPs.
    """
    if mlp:
        work = _fewest(work, "mlp_tiles", "mlp", ("head",))
    return _fewest(work, "loss_tiles", "head", ()) if loss else work


def recomputed_part(work: Activations) -> float:
    """Return the FLOPs that tiled loss and MLPs recompute, relative to a step's matrix products outside attention."""
    model, tokens = work.model, work.tokens
    recomputed = 0.0
    if work.loss_tiles > 1:
        recomputed += tokens * model.head_flops()
    if work.mlp_tiles > 1:
        recomputed += model.layers * tokens * model.mlp_flops()
    return recomputed / (3.0 * tokens * (model.layers * model.matmul_flops() + model.head_flops()))


def _fewest(work: Activations, name: str, moment: Moment, ignored: tuple[Moment, ...]) -> Activations:
    def choice(tiles: int) -> tuple[Activations, float, float]:
        chosen = replace(work, **{name: tiles})
        buffers = inventory(chosen)
        others = max(bytes_at(buffers, other) for other in MOMENTS if other != moment and other not in ignored)
        return chosen, bytes_at(buffers, moment), others

    tiles, most = 1, most_tiles(work.tokens)
    _, least, least_others = choice(most)
    while True:
        chosen, here, others = choice(tiles)
        # Tiles are recomputed, so that layers save less, which lowers the other moments too.
        if tiles >= most or (here <= max(others, NEAR * least) and others <= NEAR * max(least, least_others)):
            return chosen
        tiles *= 2
