"""Which context-parallel sizes, sequence lengths and heads are measured, most important first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: (query heads, kv heads).
HEADS = ((32, 8), (32, 32), (8, 1))
#: What most runs are: 2 to 8 context-parallel ranks of 2K to 8K tokens each; (cp_size, tokens of the whole sequence).
COMMON = tuple((cp_size, cp_size * shard) for shard in (8192, 4096, 2048) for cp_size in (8, 4, 2))
#: Large runs.
LARGE = (
    (64, 1 << 20),
    (64, 1 << 18),
    (512, 1 << 20),
    (8, 1 << 18),
    (64, 1 << 16),
    (512, 1 << 18),
    (8, 1 << 20),
    (512, 1 << 16),
)


@dataclass(frozen=True)
class Setting:
    """One size: ranks, tokens of the whole sequence, (query heads, kv heads)."""

    cp_size: int
    tokens: int
    heads: tuple[int, int]

    @property
    def names(self) -> tuple[object, ...]:
        """Cells of a table's columns :data:`COLUMNS`."""
        shard = self.tokens // self.cp_size
        return self.cp_size, f"{self.tokens / 1024:g}K", shard, f"{self.heads[0]},{self.heads[1]}"

    @property
    def cost(self) -> float:
        """Query-key pairs of one rank times query heads."""
        return self.tokens**2 / self.cp_size * self.heads[0]


COLUMNS = ("P", "tokens", "tokens per rank", "heads")


def settings(
    cp_sizes: Sequence[int] | None, tokens: Sequence[int] | None, heads: Sequence[tuple[int, int]]
) -> list[Setting]:
    """Return every setting in the order of its importance.

    Args:
        cp_sizes: only these sizes; all unless given.
        tokens: lengths of the whole sequence, each with every size; the lists above unless given.
        heads: (query heads, kv heads), first the most important.
    """
    if tokens is not None:
        sizes = [(cp_size, length) for cp_size in cp_sizes or (8, 64, 512) for length in tokens]
    else:
        sizes = [size for size in (*COMMON, *LARGE) if cp_sizes is None or size[0] in cp_sizes]
    return [Setting(*size, pair) for pair in heads for size in sizes]
